"""A stored addend per channel becomes the bias of the convolution or the linear layer whose result it is added to.

``x @ w + b`` is how Keras and ONNX files write a linear layer, and some exporters write a convolution so, too. Pruning,
quantization and runtimes know a bias; a sum they compute for itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, operator_name

aten = torch.ops.aten
_CHANNELS = {
    "linear": -1,
    **{f"{name}{rank}d": -1 - rank for name in ("conv", "conv_transpose") for rank in (1, 2, 3)},
}
"""Operator → the axis of its result that its bias is for."""


def as_bias(graph: fx.Graph, stored: Any) -> None:
    """Rewrite, in place, every such sum.

    Args:
        graph: Graph of an exported program whose nodes have example values in ``meta["val"]``.
        stored: Every stored tensor by its name.
    """
    reads: Counter[Any] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            reads[_memory(stored.get(str(node.target)))] += len(node.users)
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor:
            continue
        a = arguments(node)
        for layer, addend in ((a["self"], a["other"]), (a["other"], a["self"])):
            if a["alpha"] == 1 and _is_bias(layer, addend, stored, reads):
                _give(graph, node, layer, addend, stored)
                break


def _is_bias(layer: Any, addend: Any, stored: Any, reads: Counter[Any]) -> bool:
    """Whether an addend is stored, one number for a channel, and nothing else reads what it is added to."""
    if not isinstance(layer, fx.Node) or not isinstance(addend, fx.Node) or addend.op != "get_attr":
        return False
    if not isinstance(stored.get(str(addend.target)), torch.Tensor):
        return False
    name = operator_name(layer) if isinstance(layer.target, torch._ops.OpOverload) else ""
    if name not in _CHANNELS or len(layer.users) != 1 or arguments(layer)["bias"] is not None:
        return False
    value, bias = layer.meta.get("val"), stored[str(addend.target)]
    axis = _CHANNELS[name]
    if not isinstance(value, torch.Tensor) or value.dtype != bias.dtype or bias.dim() > value.dim():
        return False
    if name != "linear" and value.dim() != 1 - axis:  # a convolution of one sample
        return False
    aligned = bias.numel() == 1 or (bias.dim() >= -axis and bias.shape[axis] == bias.numel())
    # What is read in another shape has to be read by nothing else, so that it can be stored in this one.
    return bool(aligned and bias.numel() == value.shape[axis] and (bias.dim() == 1 or reads[_memory(bias)] == 1))


def _give(graph: fx.Graph, node: fx.Node, layer: fx.Node, addend: fx.Node, stored: Any) -> None:
    """Make the addend, which may be read below the layer alone, the layer's bias."""
    tensor = stored[str(addend.target)]
    with graph.inserting_before(layer):
        bias = graph.create_node("get_attr", str(addend.target))
        bias.meta = dict(addend.meta)
        if tensor.dim() != 1:
            bias = graph.call_function(aten.reshape.default, (bias, [tensor.numel()]))
            bias.meta = {key: layer.meta[key] for key in ("nn_module_stack", "stack_trace") if key in layer.meta}
            with layer.meta["val"].fake_mode:
                bias.meta["val"] = torch.empty(tensor.numel(), dtype=tensor.dtype)
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    node.replace_all_uses_with(layer)
    graph.erase_node(node)
    if not addend.users:
        graph.erase_node(addend)


def _memory(tensor: Any) -> Any:
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) and tensor.numel() else id(tensor)
