"""ONNX convolutions, and the paddings that they and pooling share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, check_growth, largest, sizes, tensor


def spatial_pads(
    node: Node, shape: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """Padding before and after every spatial axis, also where the file says only how it is found.

    Args:
        node: With ``pads`` or ``auto_pad``.
        shape: The spatial sizes of the input.
        kernel: Of the window.
        strides: Of the window.
        dilations: Of the window.
    """
    rank = len(kernel)
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = node.get("pads", [0] * (2 * rank))
        return list(pads[:rank]), list(pads[rank:])
    if auto == "VALID":
        return [0] * rank, [0] * rank
    before, after = [], []
    for size, width, stride, dilation in zip(shape, kernel, strides, dilations, strict=True):
        reach = (width - 1) * dilation + 1
        missing = ((size + stride - 1) // stride - 1) * stride + reach - size
        total = reach - 1 if stride == 1 else largest(missing, 0)
        less = total // 2
        before.append(less if auto == "SAME_UPPER" else total - less)
        after.append(total - less if auto == "SAME_UPPER" else less)
    return before, after


def pad_spatial(x: torch.Tensor, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> torch.Tensor:
    """Pad the last axes."""
    flat = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, flat, value=value)


def padded_shape(x: torch.Tensor, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """Shape of what `pad_spatial` gives."""
    return [*x.shape[:2], *(n + a + b for n, a, b in zip(x.shape[2:], before, after, strict=True))]


def _same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return all(isinstance(a, int) and isinstance(b, int) and a == b for a, b in zip(before, after, strict=True))


_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _kernel(node: Node, value: torch.Tensor, weight: torch.Tensor) -> list[Any]:
    """Spatial sizes of a weight, which has to be one for this input and what the node says."""
    kernel = list(weight.shape[2:])
    if value.dim() != weight.dim() or list(node.get("kernel_shape", kernel)) != kernel:
        got = f"kernel_shape {node.get('kernel_shape')}, weight {list(weight.shape)}, input {list(value.shape)}"
        raise node.refuse("its kernel is of another shape than its weight or its input", got)
    return kernel


def _conv(node: Node, x: Value, w: Value, b: Value = None) -> torch.Tensor:
    value, weight = tensor(x), tensor(w)
    kernel = _kernel(node, value, weight)
    rank = len(kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    before, after = spatial_pads(node, value.shape[2:], kernel, strides, dilations)
    check_growth(node, value.shape, padded_shape(value, before, after))
    if not _same(before, after):
        value, before = pad_spatial(value, before, after), [0] * rank
    bias = None if b is None else tensor(b)
    if not 1 <= rank <= 3:
        raise node.refuse("torch has no convolution of its rank", f"{rank} spatial axes")
    result: torch.Tensor = _CONVOLUTIONS[rank - 1](
        value, weight, bias, strides, before, dilations, node.get("group", 1)
    )
    return result


def _conv_transpose(node: Node, x: Value, w: Value, b: Value = None) -> torch.Tensor:
    value, weight = tensor(x), tensor(w)
    kernel = _kernel(node, value, weight)
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise node.refuse("torch has no convolution of its rank", f"{rank} spatial axes")
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    more = list(node.get("output_padding", [0] * rank))
    shape = node.get("output_shape")
    auto = node.get("auto_pad", "NOTSET")
    reach = [(width - 1) * dilation + 1 for width, dilation in zip(kernel, dilations, strict=True)]
    if shape is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        lengths = shape[-rank:] if shape is not None else [n * s for n, s in zip(value.shape[2:], strides, strict=True)]
        for n, stride, extra, width, size in zip(value.shape[2:], strides, more, reach, lengths, strict=True):
            total = stride * (n - 1) + extra + width - size
            less = total // 2
            before.append(less if auto == "SAME_UPPER" else total - less)
            after.append(total - less if auto == "SAME_UPPER" else less)
    else:
        before, after = spatial_pads(node, value.shape[2:], kernel, strides, dilations)
    lengths = [stride * (n - 1) + width for n, stride, width in zip(value.shape[2:], strides, reach, strict=True)]
    check_growth(node, value.shape, [*value.shape[:2], *lengths])
    bias = None if b is None else tensor(b)
    convolve, groups = _TRANSPOSED[rank - 1], node.get("group", 1)
    if _same(before, after) and all(n < max(s, d) for n, s, d in zip(more, strides, dilations, strict=True)):
        result: torch.Tensor = _TRANSPOSED[rank - 1](
            value, weight, bias, strides, before, more, node.get("group", 1), dilations
        )
        return result
    # What torch can't say by one padding is cut from the whole result; negative paddings add zeros.
    whole = convolve(value, weight, None, strides, 0, 0, groups, dilations)
    cut: torch.Tensor = pad_spatial(whole, [-n for n in before], [e - n for e, n in zip(more, after, strict=True)])
    return cut if bias is None else cut + bias.reshape([-1] + [1] * rank)


def _deform_conv(node: Node, x: Value, w: Value, offset: Value, b: Value = None, mask: Value = None) -> torch.Tensor:
    """Deformable convolution v2 (Zhu et al., 2019) as bilinear samples and a product; two spatial axes."""
    value, weight, moved = tensor(x), tensor(w), tensor(offset)
    if value.dim() != 4:
        raise node.refuse("deformable convolutions have two spatial axes here", f"{value.dim() - 2} axes")
    n, channels, height, width = value.shape
    high, wide = weight.shape[2:]
    strides, dilations = node.get("strides", [1, 1]), node.get("dilations", [1, 1])
    pads, groups, spans = node.get("pads", [0] * 4), node.get("group", 1), node.get("offset_group", 1)
    rows, columns = moved.shape[2:]
    moved = moved.reshape(n, spans, high * wide, 2, rows, columns)
    y = torch.arange(rows).reshape(-1, 1) * strides[0] - pads[0] + torch.zeros(1, columns)
    x0 = torch.arange(columns).reshape(1, -1) * strides[1] - pads[1] + torch.zeros(rows, 1)
    taps = [(i * dilations[0], j * dilations[1]) for i in range(high) for j in range(wide)]
    samples = []
    for k, (i, j) in enumerate(taps):
        down = (y + i + moved[:, :, k, 0]).reshape(n * spans, rows, columns)
        along = (x0 + j + moved[:, :, k, 1]).reshape(n * spans, rows, columns)
        grid = torch.stack([(2 * along + 1) / width - 1, (2 * down + 1) / height - 1], -1)
        part = value.reshape(n * spans, channels // spans, height, width)
        taken = F.grid_sample(part, grid, "bilinear", "zeros", False).reshape(n, channels, rows, columns)
        if mask is not None:
            weights = tensor(mask).reshape(n, spans, 1, high * wide, rows, columns)[:, :, :, k]
            taken = (taken.reshape(n, spans, -1, rows, columns) * weights).reshape(n, channels, rows, columns)
        samples.append(taken)
    columns_ = torch.stack(samples, 2).reshape(n, groups, channels // groups * high * wide, rows * columns)
    flat = weight.reshape(groups, weight.shape[0] // groups, -1)
    result = torch.matmul(flat, columns_).reshape(n, weight.shape[0], rows, columns)
    return result if b is None else result + tensor(b).reshape(-1, 1, 1)


def _col2im(node: Node, x: Value, image: Value, block: Value) -> torch.Tensor:
    value = tensor(x)
    size, kernel = sizes(node, image, "image shape"), [int(k) for k in sizes(node, block, "block shape")]
    rank = len(kernel)
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    pads = node.get("pads", [0] * (2 * rank))
    if rank == 2 and pads[:2] == pads[2:]:
        return F.fold(value, tuple(size), tuple(kernel), dilations, pads[:2], strides)
    channels = value.shape[1]
    for k in kernel:
        channels = channels // k
    padded = [s + pads[i] + pads[i + rank] for i, s in enumerate(size)]
    counts = [(p - (k - 1) * d - 1) // s + 1 for p, k, d, s in zip(padded, kernel, dilations, strides, strict=True)]
    places = torch.zeros(*kernel, *counts, dtype=torch.int64)
    for axis in range(rank):
        tap = torch.arange(kernel[axis]).reshape([-1 if a == axis else 1 for a in range(rank)] + [1] * rank)
        at = torch.arange(counts[axis]).reshape([1] * rank + [-1 if a == axis else 1 for a in range(rank)])
        places = places * padded[axis] + tap * dilations[axis] + at * strides[axis]
    total = 1
    for p in padded:
        total *= p
    empty = torch.zeros(value.shape[0], channels, total, dtype=value.dtype)
    parts = value.reshape(value.shape[0], channels, -1)
    whole = empty.scatter_add(2, places.reshape(1, 1, -1).expand_as(parts), parts).reshape(
        value.shape[0], channels, *padded
    )
    return pad_spatial(whole, [-n for n in pads[:rank]], [-n for n in pads[rank:]])


OPERATORS: dict[str, Callable[..., Any]] = {
    "Col2Im": _col2im,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"Col2Im": (1, 2)}

__all__ = ["KNOWN_INPUTS", "OPERATORS", "pad_spatial", "padded_shape", "spatial_pads"]
