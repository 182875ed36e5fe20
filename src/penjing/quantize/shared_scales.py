"""Values that can't share a scale: columns or branches of very different magnitude that matter individually.

A detector's boxes are hundreds of pixels, its scores below 1; in one 8-bit tensor with one scale, the scores become 0.
Such a tensor stays in floating point if it reaches an output through operators that keep its columns apart, and so does
a concatenation of such branches unless its result is multiplied by weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from penjing.network.graph import kind, operator_name, site, sites, tensor_inputs
from penjing.quantize.histogram import Histogram
from penjing.quantize.placement import Placement
from penjing.steps.plan import Entry

FAINT_DB = 20.0  # signal-to-noise ratio of a column or branch, below which about eight levels are left of it
APART_DB = 10.0  # and this far below that of the whole tensor, since few bits alone are not a reason
_MOVES = frozenset(
    "reshape transpose select slice split split_with_sizes chunk unbind getitem cat stack expand identity dropout pad "
    "resize pixel_shuffle movedim index index_select".split()
)
_ELEMENTWISE = frozenset(
    "add sub mul div neg abs exp log pow sqrt relu clip sigmoid hardsigmoid tanh silu hardswish leaky_relu elu gelu "
    "softplus where masked_fill to".split()
)
_POOLS = frozenset({"avg_pool", "max_pool", "mean", "sum", "amax"})


class Columns:
    """Mean squares of a value's columns along axis 1 and along the last axis."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    def update(self, x: torch.Tensor) -> None:
        """Add the values of x (samples, …); axes of varying size are left out."""
        square = x.detach().double().square()
        for axis in {1, x.dim() - 1} if x.dim() > 1 else ():
            others = [a for a in range(x.dim()) if a != axis]
            total = square.sum(others)
            known = self.sums.get(axis, torch.zeros_like(total))
            if known.shape != total.shape:
                self.sums[axis], self.counts[axis] = total.new_zeros(0), 0
                continue
            self.sums[axis] = known + total
            self.counts[axis] = self.counts.get(axis, 0) + x.numel() // max(1, x.shape[axis])

    def powers(self) -> list[torch.Tensor]:
        """Return (columns,) mean squares for every axis of constant size."""
        return [total / self.counts[axis] for axis, total in self.sums.items() if self.counts[axis]]


def to_watch(network: fx.GraphModule, placement: Placement) -> set[str]:
    """Return the names of the nodes whose columns have to be observed in calibration."""
    on_way = _on_way(network)
    return {value for edge, value in placement.edges.items() if _consumer(edge) in on_way}


@dataclass(frozen=True)
class Apart:
    """What is excluded from a plan.

    Attributes:
        edges: Edges that get no quantizer.
        floats: Site → why it stays in floating point.
    """

    edges: frozenset[str]
    floats: Mapping[str, str]


def apart(
    network: fx.GraphModule,
    placement: Placement,
    entries: Mapping[str, Entry],
    statistics: Mapping[str, Histogram],
    columns: Mapping[str, Columns],
) -> Apart:
    """Find the edges whose scale would erase a column or a branch.

    Args:
        network: The network that the plan is for.
        placement: Where quantizers are placed.
        entries: Their scales.
        statistics: Statistics of the values by node name.
        columns: Column statistics of the values of `to_watch`.
    """
    operators, nodes, on_way = sites(network), {n.name: n for n in network.graph.nodes}, _on_way(network)
    edges: set[str] = set()
    floats: dict[str, str] = {}
    for edge, value in placement.edges.items():
        name = _consumer(edge)
        step = entries[edge].scale[0] if entries[edge].scale and entries[edge].spec.grid == "uniform" else 0.0
        if not step:
            continue
        ratio = _inputs_apart(network, nodes[value], step, placement, statistics)
        if ratio and (name in on_way or edge in placement.results):
            reason = f"its inputs differ by {ratio:.0f}×: they can't share a scale"
        elif name in on_way and (ratio := _columns_apart(columns[value].powers(), step)):
            reason = f"its columns differ by {ratio:.0f}×: they can't share a scale"
        else:
            continue
        edges.add(edge)
        if edge in placement.results:
            floats[_writer(network, nodes[value])] = reason
        elif name in operators and kind(network, operators[name]) not in _MOVES - {"cat"}:
            floats[name] = reason.replace("its", f"{_writer(network, nodes[value])}'s", 1)
    return Apart(frozenset(edges), floats)


def _inputs_apart(
    network: fx.GraphModule, node: fx.Node, step: float, placement: Placement, statistics: Mapping[str, Histogram]
) -> float:
    """The ratio of a concatenation's branches in magnitude, if one would be erased by another; otherwise 0."""
    if kind(network, node) != "cat":
        return 0.0
    values = [placement.edges.get(f"{site(node)}:in{port}", "") for port in range(len(tensor_inputs(node)))]
    powers = [statistics[v].power for v in values if v in statistics]
    return _lost(torch.tensor(powers, dtype=torch.float64), step) if len(powers) > 1 else 0.0


def _columns_apart(powers: Collection[torch.Tensor], step: float) -> float:
    return max((_lost(power, step) for power in powers), default=0.0)


def _lost(powers: torch.Tensor, step: float) -> float:
    """The largest magnitude over the smallest that rounding by `step` would erase; 0 if it erases none.

    What is always 0 can't be erased.
    """
    used = powers[powers > 0]
    if len(used) < 2:
        return 0.0
    noise = step**2 / 12
    whole, least = (10 * math.log10(float(p) / noise) for p in (powers.mean(), used.min()))
    if least >= FAINT_DB or least > whole - APART_DB:
        return 0.0
    return math.sqrt(float(used.max() / used.min()))


def _on_way(network: fx.GraphModule) -> set[str]:
    """Sites of the operators that lead to an output and keep columns apart all the way, and the output's own site."""
    way: set[fx.Node] = set()
    for node in reversed(network.graph.nodes):
        keeps = node.op == "output" or (
            any(user in way for user in node.users)
            and (kind(network, node) in _MOVES | _ELEMENTWISE | _POOLS or operator_name(node).startswith("upsample"))
        )
        if keeps:
            way.add(node)
    return {site(node) for node in way}


def _writer(network: fx.GraphModule, node: fx.Node) -> str:
    """The site of the operator whose kernel writes a value, before whatever runtimes fuse into it."""
    while kind(network, node) in ("relu", "clip", "dropout", "identity") or node.target is operator.getitem:
        node = tensor_inputs(node)[0]
    return site(node)


def _consumer(edge: str) -> str:
    return edge.rpartition(":")[0]
