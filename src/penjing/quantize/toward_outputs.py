"""What lies between a network's last products and its outputs: joining, rearranging and decoding of what they give.

A detector's heads end there: boxes, scores and points are decoded (a grid is added, a stride multiplied, exp, sigmoid),
joined, and sorted. Nothing there is worth integers: no product is saved, and a step of a few pixels or a hundredth of a
score is lost for good. It is found by where it stands, not by names: every way on from it leads to an output without
passing a product with weights, or anything else that mixes its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from penjing.analyze.cost import multiplies
from penjing.network.graph import RECURRENT, is_tensor, kind, tensor_inputs

JOINS = "on the way to an output it only joins, rearranges or decodes values"
EXPECTS = "it takes the mean of a distribution on the way to an output, as a box is decoded from bins"

_MIXES = frozenset({"layer_norm", "group_norm", "instance_norm", "rms_norm", "embedding", "output", *RECURRENT})
_MOVES = frozenset(
    "reshape transpose select slice split split_with_sizes chunk unbind getitem expand identity dropout pad resize "
    "pixel_shuffle movedim to".split()
)
_FUSED = frozenset({"relu", "clip"})  # a kernel does these itself
_POOLS = frozenset({"avg_pool", "max_pool", "mean", "sum", "amax"})


def leading(network: fx.GraphModule) -> set[fx.Node]:
    """Return the operators from which some way leads to an output and keeps columns apart, and the output itself."""
    return _on_way(network, any)


def leading_only(network: fx.GraphModule) -> set[fx.Node]:
    """Return the operators from which every way leads to an output like that, and the output itself."""
    return _on_way(network, all)


def in_floats(network: fx.GraphModule) -> dict[str, str]:
    """Return name of every operator on the way to an output that joins, decodes, or is decoded → why it stays float.

    What only adds or pools, and leaves as it is or rearranged, is not among them: that is a network's own arithmetic.
    """
    way = leading_only(network)
    decoded: set[fx.Node] = set()
    for node in reversed(network.graph.nodes):
        if node in way and node.op != "output" and (computes(network, node) or any(u in decoded for u in node.users)):
            decoded.add(node)
    return {n.name: EXPECTS if multiplies(network, n) else JOINS for n in network.graph.nodes if n in decoded}


def expects(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator takes the mean of a distribution: a product of a softmax with one row of weights."""
    if kind(network, node) not in ("conv", "linear", "matmul", "mv") or not tensor_inputs(node):
        return False
    if node.op == "call_module":
        layer: Any = network.get_submodule(str(node.target))
        weight: torch.Tensor = layer.weight
        if weight.numel() != weight.shape[1]:  # (1, bins) or (1, bins, 1, 1)
            return False
    elif not any(t.op == "get_attr" for t in tensor_inputs(node)[1:]):
        return False
    before = tensor_inputs(node)[0]
    while kind(network, before) in _MOVES and tensor_inputs(before):
        before = tensor_inputs(before)[0]
    return kind(network, before) == "softmax"


def _on_way(network: fx.GraphModule, which: Callable[[Iterable[bool]], bool]) -> set[fx.Node]:
    way: set[fx.Node] = set()
    for node in reversed(network.graph.nodes):
        # What reads only a size does not read the values.
        users = [user for user in node.users if user.op == "output" or is_tensor(user)]
        if node.op == "output" or (users and which(user in way for user in users) and _keeps(network, node)):
            way.add(node)
    return way


def _keeps(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator keeps the columns of what it reads apart."""
    if node.op not in ("call_function", "call_module"):
        return False
    mixes = multiplies(network, node) or kind(network, node) in _MIXES
    return is_tensor(node) and (not mixes or expects(network, node))


def computes(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator joins or decodes; additions of two activations and pooling are arithmetic of a network."""
    what = kind(network, node)
    if what in _MOVES | _FUSED | _POOLS:
        return False
    if what == "add":
        return any(t.op == "get_attr" for t in tensor_inputs(node)) or len(tensor_inputs(node)) < 2
    return True


__all__ = ["EXPECTS", "JOINS", "computes", "expects", "in_floats", "leading", "leading_only"]
