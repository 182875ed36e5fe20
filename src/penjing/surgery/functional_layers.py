"""Layers as functional operators, for a module whose weight is quantized in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import kind
from penjing.steps.plan import Entry, Plan


def functional_layer(
    network: fx.GraphModule,
    node: fx.Node,
    plan: Plan,
    entry: Entry,
    weight: Callable[[str, Entry], fx.Node],
    bias: Callable[[str, Entry | None], fx.Node | None],
    dynamic: Callable[[str, fx.Node, Entry], fx.Node] | None,
    rows: Callable[[str, fx.Node, Entry], fx.Node] | None,
) -> None:
    """Replace the call of a module, in place, by the functional operator with a quantized weight.

    Args:
        network: A captured network with the module.
        node: The call of the module.
        plan: The plan, for the entry of the input.
        entry: The entry of the weight.
        weight: Writes the node of a layer's weight.
        bias: Writes the node of a layer's bias.
        dynamic: Writes a linear layer with a range at run time; None to write quantizers instead.
        rows: Writes the lookup of rows of a quantized table; None to look them up in the dequantized table.
    """
    layer, site = str(node.target), str(node.meta["site"])
    module: Any = network.get_submodule(layer)
    what = kind(network, node)
    x: Any = node.args[0]
    inputs = plan.entries.get(f"{site}:in0")
    with network.graph.inserting_before(node):
        # With groups of values per scale the runtime quantizes the input itself, when the weights are integers.
        by_operator = dynamic is not None and inputs is not None and inputs.dynamic and inputs.spec.group is None
        by_rows = what == "embedding" and rows is not None
        w = None if by_operator or by_rows else weight(layer, entry)
        if rows is not None and by_rows:
            new = rows(layer, x, entry)
        elif what == "embedding":
            padding = -1 if module.padding_idx is None else module.padding_idx
            new = network.graph.call_function(torch.ops.aten.embedding.default, (w, x, padding))
        elif dynamic is not None and by_operator:
            new = dynamic(layer, x, entry)
        elif what == "linear":
            # An integer bias needs an integer accumulator, but a 3-D linear is run as a matrix product and an addition.
            b = bias(layer, bias_entry(plan, site) if node.meta.get("rank", 2) == 2 else None)
            new = network.graph.call_function(torch.ops.aten.linear.default, (x, w, b))
        else:
            b = bias(layer, bias_entry(plan, site))
            new = network.graph.call_function(_convolution(module), (x, w, b, *_conv_settings(module)))
    new.meta["site"] = site
    node.replace_all_uses_with(new)
    network.graph.erase_node(node)


def _conv_settings(module: Any) -> tuple[Any, ...]:
    padding = module.padding if isinstance(module.padding, str) else list(module.padding)
    if module.transposed:
        return (list(module.stride), padding, list(module.output_padding), module.groups, list(module.dilation))
    return (list(module.stride), padding, list(module.dilation), module.groups)


def _convolution(module: nn.Module) -> Any:
    operator = _CONVOLUTIONS[type(module)]
    if not hasattr(operator, "default"):
        return operator.input
    return operator.padding if isinstance(module.padding, str) else operator.default


_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: torch.ops.aten.conv1d,
    nn.Conv2d: torch.ops.aten.conv2d,
    nn.Conv3d: torch.ops.aten.conv3d,
    nn.ConvTranspose1d: torch.ops.aten.conv_transpose1d,
    nn.ConvTranspose2d: torch.ops.aten.conv_transpose2d,
    nn.ConvTranspose3d: torch.ops.aten.conv_transpose3d,
}


def bias_entry(plan: Plan, layer: str) -> Entry | None:
    """The grid of a bias: int32, scale = weight scale × input scale, as in the accumulator; None without them."""
    weight, inputs = plan.entries.get(f"{layer}:weight"), plan.entries.get(f"{layer}:in0")
    if weight is None or inputs is None or inputs.dynamic or weight.spec.group is not None:
        return None
    spec = type(weight.spec)(bits=32, signed=True, symmetric=True, axis=0 if len(weight.scale) > 1 else None)
    # In float32, as the runtimes multiply them.
    scales = (torch.tensor(weight.scale) * torch.tensor(inputs.scale)).tolist()
    return Entry(spec, tuple(scales), (0,) * len(scales))
