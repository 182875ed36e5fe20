"""Replacing a layer by a product of smaller ones, as low-rank decompositions do.

The last factor keeps the layer's name and its bias, so that whatever names the layer still means the same value. The
factors before it are called ``NAME_in``, ``NAME_core`` or, of a convolution split along its axes, ``NAME_axis0``, ….
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import sites
from penjing.steps.draft import Edit

FORMS = ("svd", "tucker", "cp")
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def factorize(
    network: fx.GraphModule,
    layer: str,
    form: str,
    ranks: Sequence[int],
    weights: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
) -> Edit:
    """Replace a layer by its factors, in place.

    | form | layer | ranks | factors |
    |---|---|---|---|
    | svd | linear | r | linear to r, linear |
    | svd | convolution | r | the convolution to r channels, kernel 1 |
    | tucker | convolution | r_in, r_out | kernel 1 to r_in, the convolution to r_out, kernel 1 |
    | cp | convolution | r | kernel 1 to r, one depthwise convolution along each axis, kernel 1 |

    A Tucker factor whose rank is the layer's own number of channels is left out.

    Args:
        network: A captured network.
        layer: Name of a linear layer, or of a convolution without groups, that is called once.
        form: One of `FORMS`.
        ranks: At least 1, and at most the layer's channels; of "cp" at most the product of all sizes but the largest.
        weights: Of the factors in the order of execution; None where they are loaded later.
        bias: Of the last factor; None for the layer's own.

    Returns:
        The edit.

    Raises:
        TypeError: It is not such a layer.
        ValueError: A rank does not fit the layer.
    """
    node = sites(network)[layer]
    module: Any = network.get_submodule(layer)
    if node.op != "call_module" or sum(n.target == node.target for n in network.graph.nodes) != 1:
        raise TypeError(f"{layer} is not a layer that is called once")
    ranks = [int(rank) for rank in ranks]
    parts = layers_of(module, form, ranks)
    _fill(module, [part for _, part in parts], weights, bias)
    last = parts[-1][1]
    value: Any = node.args[0]
    for _, part in parts:
        part.train(network.training)
    for role, part in parts[:-1]:
        name = _free(network, f"{layer}_{role}")
        network.add_submodule(name, part)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(name, (value,))
        call.meta = {word: node.meta[word] for word in ("rank", "floating", "stack_trace") if word in node.meta}
        call.meta |= {"site": name}
        if isinstance(part, nn.Linear):
            call.meta["width"] = part.out_features
        value = call
    network.add_submodule(layer, last)
    node.args = (value, *node.args[1:])
    network.graph.lint()
    network.recompile()
    return {"edit": "factorize", "layer": layer, "form": form, "ranks": ranks}


def _fill(module: Any, parts: Sequence[Any], weights: Sequence[torch.Tensor] | None, bias: torch.Tensor | None) -> None:
    """Give the factors of a layer their weights, and what else the layer has: device, type, and which are trained."""
    with torch.no_grad():
        for part, weight in zip(parts, [0.0] * len(parts) if weights is None else weights, strict=True):
            part.weight.copy_(torch.as_tensor(weight))
            part.to(module.weight)
            part.weight.requires_grad_(module.weight.requires_grad)
        if module.bias is not None:
            parts[-1].bias.copy_(module.bias if bias is None else bias)
            parts[-1].bias.requires_grad_(module.bias.requires_grad)


def layers_of(module: Any, form: str, ranks: Sequence[int]) -> list[tuple[str, Any]]:
    """(role, layer) of the factors in the order of execution, with weights that are not set; the last has the bias.

    Raises:
        TypeError: The layer has no such form.
        ValueError: A rank does not fit the layer.
    """
    bias = module.bias is not None
    if form == "svd" and isinstance(module, nn.Linear):
        (rank,) = _within(ranks, [min(module.in_features, module.out_features)])
        first = _empty(nn.Linear, module.in_features, rank, bias=False)
        return [("in", first), ("out", _empty(nn.Linear, rank, module.out_features, bias=bias))]
    if not isinstance(module, _CONVOLUTIONS) or module.groups != 1 or form not in FORMS:
        raise TypeError(f"a {type(module).__name__} has no form {form}")
    layer: Any = module
    kind, axes = type(module), len(layer.kernel_size)

    def conv(inputs: int, outputs: int, bias: bool = False, **settings: Any) -> Any:
        settings = {"kernel_size": (1,) * axes} | settings
        return _empty(kind, inputs, outputs, bias=bias, **settings)

    inputs, outputs = int(layer.in_channels), int(layer.out_channels)
    sliding = _sliding(layer)
    if form == "svd":
        (rank,) = _within(ranks, [min(inputs * layer.weight[0, 0].numel(), outputs)])
        return [("in", conv(inputs, rank, **sliding)), ("out", conv(rank, outputs, bias))]
    if form == "tucker":
        reduced, core = _within(ranks, [inputs, outputs])
        narrow = reduced < inputs
        parts = [("in", conv(inputs, reduced))] if narrow else []
        if core == outputs:
            return [*parts, ("out", conv(reduced, outputs, bias, **sliding))]
        return [*parts, ("core", conv(reduced, core, **sliding)), ("out", conv(core, outputs, bias))]
    (rank,) = _within(ranks, [layer.weight.numel() // max(inputs, outputs)])
    long = [axis for axis, size in enumerate(layer.kernel_size) if size > 1]
    along = [(f"axis{axis}", conv(rank, rank, groups=rank, **_along(sliding, axis))) for axis in long]
    if not long or not all(axis in long or _pointwise(sliding, axis) for axis in range(axes)):
        raise TypeError("a kernel of 1 along an axis with a stride or padding has no form cp")
    return [("in", conv(inputs, rank)), *along, ("out", conv(rank, outputs, bias))]


def _empty(kind: Any, *sizes: int, **settings: Any) -> Any:
    """A layer whose weights are not drawn: the global generator stays as it is."""
    return kind(*sizes, device="meta", **settings).to_empty(device="cpu")


def _free(network: fx.GraphModule, name: str) -> str:
    taken, number, free = dict(network.named_modules()), 2, name
    while free in taken:
        free, number = f"{name}{number}", number + 1
    return free


def _within(ranks: Sequence[int], most: Sequence[int]) -> Sequence[int]:
    if len(ranks) != len(most) or not all(1 <= rank <= limit for rank, limit in zip(ranks, most, strict=True)):
        raise ValueError(f"ranks {list(ranks)}, where {len(most)} from 1 to {list(most)} fit")
    return ranks


def _sliding(conv: Any) -> dict[str, Any]:
    """How a convolution moves over its input."""
    return {
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
    }


def _pointwise(sliding: dict[str, Any], axis: int) -> bool:
    """Whether every output position along an axis depends on the same position of the input alone."""
    padding = sliding["padding"]
    return sliding["stride"][axis] == 1 and (isinstance(padding, str) or padding[axis] == 0)


def _along(sliding: dict[str, Any], axis: int) -> dict[str, Any]:
    """The same along one axis alone."""

    def only(word: str, other: int) -> tuple[int, ...]:
        return tuple(value if i == axis else other for i, value in enumerate(sliding[word]))

    padding = sliding["padding"] if isinstance(sliding["padding"], str) else only("padding", 0)
    return sliding | {
        "kernel_size": only("kernel_size", 1),
        "stride": only("stride", 1),
        "dilation": only("dilation", 1),
        "padding": padding,
    }


__all__ = ["FORMS", "factorize", "layers_of"]
