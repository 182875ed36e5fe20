"""Branches that meet on the way to an output: boxes and scores, which one scale can't serve.

They are known by what decodes them. Branches of a concatenation that different operators decode (a sigmoid here, a
multiplication by a stride there), and columns of one layer that are cut apart and decoded differently, are of different
kinds, whatever their names. With data their magnitudes are measured too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from penjing.network.graph import flat_inputs, is_tensor, kind, site, tensor_inputs
from penjing.quantize.shared_scales import Columns
from penjing.quantize.toward_outputs import computes, leading
from penjing.records import BranchesRow
from penjing.tasks.task import Call

APART = 10.0  # ratio of magnitudes from which branches are told although the same operators decode them
SAMPLES = 16  # whose magnitudes are enough
_JOINS = frozenset({"cat", "stack"})
_CUTS = frozenset({"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow"})


def meeting(network: fx.GraphModule, calls: Iterable[Call] = ()) -> tuple[BranchesRow, ...]:
    """Return the operators at which values of different kinds meet, in the order of the network.

    Args:
        network: A captured network in eval mode.
        calls: Samples to measure magnitudes on; none leaves them out.
    """
    way = leading(network)
    joins = [n for n in network.graph.nodes if n in way and kind(network, n) in _JOINS and len(tensor_inputs(n)) > 1]
    cut = {n: parts for n in _layers(network, way) if len(parts := _parts(network, n, way)) > 1}
    branches, columns = _measured(network, joins, cut, calls)
    rows = []
    for node in network.graph.nodes:
        if node in branches:
            decoders = [_decoders(network, t, way, before=True) for t in tensor_inputs(node)]
            layers = [_sources(network, t, way) for t in tensor_inputs(node)]
            ratio = _ratio(branches[node])
        elif node in cut:
            decoders = [_decoders(network, part, way, before=False) for part in cut[node]]
            layers, ratio = [{node}], max(map(_ratio, columns[node].powers()), default=0.0)
        else:
            continue
        if len(set(decoders)) < 2 and ratio < APART:
            continue
        rows.append(
            BranchesRow(
                name=site(node),
                kind=kind(network, node),
                layers=tuple(dict.fromkeys(site(n) for some in layers for n in _ordered(network, some))),
                decoded=tuple(" ".join(d) or "as they are" for d in dict.fromkeys(decoders)),
                ratio=ratio or None,
            )
        )
    return tuple(rows)


def _layers(network: fx.GraphModule, way: set[fx.Node]) -> list[fx.Node]:
    """The operators just before the way to an output."""
    return [
        n
        for n in network.graph.nodes
        if n not in way and n.op != "get_attr" and is_tensor(n) and any(u in way for u in n.users)
    ]


def _sources(network: fx.GraphModule, node: fx.Node, way: set[fx.Node]) -> set[fx.Node]:
    """The layers whose values a node on the way has."""
    reached, waiting = {node}, [node]
    while waiting:
        for read in tensor_inputs(n) if (n := waiting.pop()) in way else ():
            if read not in reached:
                reached.add(read)
                waiting.append(read)
    return {n for n in reached if n not in way and n.op in ("call_module", "call_function", "placeholder")}


def _decoders(network: fx.GraphModule, node: fx.Node, way: set[fx.Node], before: bool) -> tuple[str, ...]:
    """Kinds of the operators that decode a value, before or behind it on the way."""
    reached, waiting = {node}, [node]
    while waiting:
        n = waiting.pop()
        following = (tensor_inputs(n) if n in way else ()) if before else n.users
        for near in following:
            if near not in reached:
                reached.add(near)
                waiting.append(near)
    passed = [n for n in network.graph.nodes if n in reached and n in way and n.op != "output"]
    return tuple(
        dict.fromkeys(kind(network, n) for n in passed if computes(network, n) and kind(network, n) not in _JOINS)
    )


def _parts(network: fx.GraphModule, node: fx.Node, way: set[fx.Node]) -> list[fx.Node]:
    """What a layer's result is cut into, behind operators that read it alone; empty if it is not cut."""
    waiting, parts = [user for user in node.users if user in way], []
    while waiting:
        user = waiting.pop(0)
        what = kind(network, user)
        if what in ("split", "split_with_sizes", "chunk", "unbind"):
            parts += list(user.users)
        elif what in _CUTS:
            parts.append(user)
        elif user.op != "output" and len(tensor_inputs(user)) == 1:
            waiting += user.users
    return parts


def _measured(
    network: fx.GraphModule, joins: list[fx.Node], cut: Collection[fx.Node], calls: Iterable[Call]
) -> tuple[dict[fx.Node, torch.Tensor], dict[fx.Node, Columns]]:
    """Mean squares of the branches of every join, and of the columns of every layer that is cut."""
    branches = {node: torch.zeros(len(tensor_inputs(node)), dtype=torch.float64) for node in joins}
    columns = {node: Columns() for node in cut}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in columns and isinstance(result, torch.Tensor):
                columns[n].update(result)
            if n in branches:
                values = [self.env[t] for t in tensor_inputs(n)]
                branches[n] += torch.stack([v.double().square().mean() for v in values])
            return result

    with torch.no_grad():
        observer = Observer(network, garbage_collect_values=False)
        for call in calls:
            observer.run(*flat_inputs(network, call))
    return branches, columns


def _ratio(powers: torch.Tensor) -> float:
    used = powers[powers > 0]
    return math.sqrt(float(used.max() / used.min())) if len(used) > 1 else 0.0


def _ordered(network: fx.GraphModule, nodes: set[fx.Node]) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node in nodes]


__all__ = ["APART", "SAMPLES", "meeting"]
