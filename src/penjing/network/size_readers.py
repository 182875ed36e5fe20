"""Where sizes are read: behind the layer's norm and activation, which have its result's sizes.

`torch.export` reads a size wherever it first occurs, often at a convolution whose activation the user's code asks. A
layer with a second reader is not folded with its norm, and runtimes do not fuse it with its activation.
"""

from __future__ import annotations

import torch
from torch import fx

from penjing.network.graph import is_tensor, operator_name, tensor_inputs

_SAME_SIZES = ("batch_norm", "dropout", "hardswish")


def read_behind(graph: fx.Graph) -> None:
    """Let sizes be read of the last value of a chain in which each has the sizes of the one before, and one reader."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or operator_name(node) != "sym_size":
            continue
        first = min((place[user] for user in node.users), default=len(place))
        value = node.args[0]
        while (follower := _follower(value)) is not None and place[follower] < first:
            value = follower
        if value is not node.args[0]:
            node.args = (value, *node.args[1:])
            value.append(node)
            place[node] = place[value]  # readers of its result are behind it all the same


def _follower(value: fx.Node) -> fx.Node | None:
    """The only operator that reads a value, where its result has the same sizes."""
    readers = [user for user in value.users if is_tensor(user) or user.op == "output"]
    target = readers[0].target if len(readers) == 1 else None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    (reader,) = readers
    alike = torch.Tag.pointwise in target.tags or operator_name(reader) in _SAME_SIZES
    others = [x for x in tensor_inputs(reader) if x is not value and x.op != "get_attr"]
    return reader if alike and not others and _sizes(reader) == _sizes(value) else None


def _sizes(node: fx.Node) -> list[str] | None:
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else None
