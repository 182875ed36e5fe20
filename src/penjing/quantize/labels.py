"""Labels: a tensor of a value's shape that says which channel each of its elements belongs to.

They go through the operators in the value's stead, as far as a positive scale of the channels passes through, so that
views, transposes and flattening need no rules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, flat_inputs, kind, operator_name
from penjing.tasks.task import Call

ELEMENTWISE = frozenset({"relu", "leaky_relu", "prelu", "dropout"})  # f(s·x) = s·f(x) for every s > 0
MOVES = frozenset({"reshape", "transpose", "select", "slice", "expand", "identity"})
Sizes = dict[fx.Node, Any]  # torch.Size of what is a tensor, the number of what is one, None for everything else


def sizes(network: fx.GraphModule, call: Call) -> Sizes:
    """The sizes of all values in one forward."""
    found: Sizes = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            number = result if isinstance(result, int | float) else None
            found[n] = result.shape if isinstance(result, torch.Tensor) else number
            return result

    with torch.no_grad():
        Recorder(network).run(*flat_inputs(network, call))
    return found


def behind(
    network: fx.GraphModule, sizes: Sizes, node: fx.Node, user: fx.Node, labels: torch.Tensor
) -> torch.Tensor | None:
    """Labels of the result of `user`, which reads `node`; None when scaling the channels does not scale the result.

    Args:
        network: The captured network.
        sizes: Of all its values.
        node: The value that is labelled.
        user: An operator that reads it.
        labels: Integers in the value's shape.
    """
    what, size = kind(network, user), sizes[user]
    read: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), read.append)
    if user.op not in ("call_module", "call_function") or not isinstance(size, torch.Size) or read.count(node) != 1:
        return None
    if what == "attention":  # a mean over positions (axis -2), whose weights know nothing of the values
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
    """Labels of a sum over axis -2, where all that is summed has one label."""
    if labels.dim() < 2 or labels.dim() != len(size):
        return None
    first = labels[..., :1, :]
    fits = all(a in (1, b) for a, b in zip(first.shape, size, strict=True)) and labels.shape[-1] == size[-1]
    return first.expand(size) if fits and bool((first == labels).all()) else None


def _over_space(node: fx.Node, labels: torch.Tensor, size: torch.Size) -> torch.Tensor | None:
    """Labels behind a pooling or padding that keeps to the axes behind the channels, axis 1."""
    first = labels[(slice(None), slice(None), *[slice(1)] * (labels.dim() - 2))] if labels.dim() > 2 else labels
    if not _spatial(node, labels.dim()) or size[:2] != labels.shape[:2] or not bool((first == labels).all()):
        return None
    return first.expand(size) if len(size) == labels.dim() else first.reshape(size)


def _spatial(node: fx.Node, rank: int) -> bool:
    """Whether it touches only the axes behind axis 1, and adds nothing but zeros and values that are there."""
    given, name = arguments(node), operator_name(node)
    if name in ("pad", "constant_pad_nd"):
        constant = given.get("mode", "constant") == "constant"
        return len(given["pad"]) // 2 <= rank - 2 and not (constant and given["value"])
    return rank == (4 if name == "mean" else int(name[-2]) + 2)  # avg_pool2d pools four axes' last two


def _cuts_at_zero(node: fx.Node) -> bool:
    """A clamp to 0 and more is a relu; one with an upper end cuts somewhere else when its input is scaled."""
    if node.op != "call_function" or operator_name(node) not in ("clamp", "clamp_min"):
        return False
    given = arguments(node)
    return given["min"] == 0 and given.get("max") is None
