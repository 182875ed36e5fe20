"""Labels: a tensor in a value's shape with the channel that each element belongs to.

Labels are passed through the operators in place of the value, as long as these commute with a positive channel scale,
so that views, transposes and flattening need no rules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, flat_inputs, kind, operator_name
from penjing.tasks.task import Call

ELEMENTWISE = frozenset({"relu", "leaky_relu", "prelu", "dropout"})  # f(s·x) = s·f(x) for every s > 0
MOVES = frozenset({"reshape", "transpose", "select", "slice", "expand", "identity"})
Sizes = dict[fx.Node, Any]  # torch.Size of a tensor, a number itself, None for anything else


def sizes(network: fx.GraphModule, call: Call) -> Sizes:
    """Record the sizes of all values in one forward pass."""
    recorded: Sizes = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            number = result if isinstance(result, int | float) else None
            recorded[n] = result.shape if isinstance(result, torch.Tensor) else number
            return result

    with torch.no_grad():
        Recorder(network).run(*flat_inputs(network, call))
    return recorded


def behind(
    network: fx.GraphModule, sizes: Sizes, node: fx.Node, user: fx.Node, labels: torch.Tensor
) -> torch.Tensor | None:
    """Propagate labels from `node` to its reader `user`; None if scaling the channels does not scale the result.

    Args:
        network: The captured network.
        sizes: Sizes of all its values.
        node: The labelled value.
        user: An operator that reads it.
        labels: Channel numbers in the value's shape.
    """
    what, size = kind(network, user), sizes[user]
    read: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), read.append)
    if user.op not in ("call_module", "call_function") or not isinstance(size, torch.Size) or read.count(node) != 1:
        return None
    if what == "attention":  # a weighted mean over positions (axis -2); its weights do not depend on the values
        return _over_positions(labels, size) if arguments(user)["value"] is node else None
    if what == "matmul" and user.args[1] is node:
        return _over_positions(labels, size)
    if user.args[0] is not node:
        return None
    if what in ELEMENTWISE or _cuts_at_zero(user):
        return labels if labels.shape == size else None
    if what in MOVES and callable(user.target):
        args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: labels if n is node else sizes[n])
        moved: torch.Tensor = user.target(*args, **kwargs)
        return moved
    return _over_space(user, labels, size) if what in ("avg_pool", "max_pool", "pad") else None


def _over_positions(labels: torch.Tensor, size: torch.Size) -> torch.Tensor | None:
    """Labels of a sum over axis -2, if all summed elements have the same label."""
    if labels.dim() < 2 or labels.dim() != len(size):
        return None
    first = labels[..., :1, :]
    fits = all(a in (1, b) for a, b in zip(first.shape, size, strict=True)) and labels.shape[-1] == size[-1]
    return first.expand(size) if fits and bool((first == labels).all()) else None


def _over_space(node: fx.Node, labels: torch.Tensor, size: torch.Size) -> torch.Tensor | None:
    """Labels after pooling or padding of the axes behind the channel axis 1."""
    first = labels[(slice(None), slice(None), *[slice(1)] * (labels.dim() - 2))] if labels.dim() > 2 else labels
    if not _spatial(node, labels.dim()) or size[:2] != labels.shape[:2] or not bool((first == labels).all()):
        return None
    return first.expand(size) if len(size) == labels.dim() else first.reshape(size)


def _spatial(node: fx.Node, rank: int) -> bool:
    """Whether it affects only the axes behind axis 1, and adds only zeros or existing values."""
    named, name = arguments(node), operator_name(node)
    if name in ("pad", "constant_pad_nd"):
        constant = named.get("mode", "constant") == "constant"
        return len(named["pad"]) // 2 <= rank - 2 and not (constant and named["value"])
    return rank == (4 if name == "mean" else int(name[-2]) + 2)  # avg_pool2d pools the last two of four axes


def _cuts_at_zero(node: fx.Node) -> bool:
    """Whether it is a clamp at 0, which is a ReLU; an upper bound would not scale with its input."""
    if node.op != "call_function" or operator_name(node) not in ("clamp", "clamp_min"):
        return False
    named = arguments(node)
    return named["min"] == 0 and named.get("max") is None
