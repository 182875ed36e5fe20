"""ONNX operators on shapes: reshaping, slices, joins and padding, and tensors made from a shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, array, bounded, check_growth, is_known, number, sizes, tensor
from penjing.onnx_files.operators.elementwise import torch_type


def _shape(node: Node, x: Value) -> np.ndarray:
    whole = list(x.shape)
    return array(whole[slice(node.get("start", 0), node.get("end"))])


def _size(_: Node, x: Value) -> np.ndarray:
    count: Any = 1
    for n in x.shape:
        count = count * n
    return array([count]).reshape(())


def _reshape(node: Node, x: Value, shape: Value = None) -> torch.Tensor:
    value = tensor(x)
    target = node.get("shape") if shape is None else sizes(node, shape, "shape")
    if not node.get("allowzero", 0):
        target = [value.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(target)]
    return value.reshape(target)


def _flatten(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    axis = node.get("axis", 1)
    axis = axis + value.dim() if axis < 0 else axis
    if axis == 1:
        return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)
    first: Any = 1
    for n in value.shape[:axis]:
        first = first * n
    return (
        value.reshape(first, -1) if value.numel() or axis == 0 else value.reshape(first, math.prod(value.shape[axis:]))
    )


def _transpose(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    return value.permute(node.get("perm", list(range(value.dim()))[::-1]))


def _axes(node: Node, axes: Value) -> list[int]:
    return list(node.get("axes", [])) if axes is None else [int(a) for a in sizes(node, axes, "axes")]


def _squeeze(node: Node, x: Value, axes: Value = None) -> torch.Tensor:
    value, listed = tensor(x), _axes(node, axes)
    if not listed:
        listed = [i for i, n in enumerate(value.shape) if isinstance(n, int) and n == 1]
    return value.squeeze(tuple(a % value.dim() for a in listed)) if listed else value


def _unsqueeze(node: Node, x: Value, axes: Value = None) -> torch.Tensor:
    value, listed = tensor(x), _axes(node, axes)
    for axis in sorted(a % (value.dim() + len(listed)) for a in listed):
        value = value.unsqueeze(axis)
    return value


def _concat(node: Node, *values: Value) -> torch.Tensor:
    return torch.cat([tensor(value) for value in values], node.get("axis", 1))


def _split(node: Node, x: Value, parts: Value = None) -> Any:
    value, axis = tensor(x), node.get("axis", 0)
    widths = node.get("split") if parts is None else sizes(node, parts, "parts")
    if widths is None:
        count = node.get("num_outputs", len(node.outputs))
        width = (value.shape[axis] + count - 1) // count
        widths = [width] * (count - 1) + [value.shape[axis] - width * (count - 1)]
    return torch.split(value, widths, axis)


def _slice(
    node: Node, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Any:
    value = tensor(x)
    first = node.get("starts") if starts is None else sizes(node, starts, "starts")
    last = node.get("ends") if ends is None else sizes(node, ends, "ends")
    along = node.get("axes") if axes is None else [int(a) for a in sizes(node, axes, "axes")]
    along = list(range(len(first))) if along is None else along
    by = [1] * len(first) if steps is None else [int(s) for s in sizes(node, steps, "steps")]
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        axis = axis % value.dim()
        if step > 0:
            ranges = [slice(None)] * axis + [
                slice(start, end if not isinstance(end, int) or end < 1 << 31 else None, step)
            ]
            value = value[tuple(ranges)]
            continue
        count = value.shape[axis]
        start = min(start if start >= 0 else start + count, count - 1)
        end = max(end if end >= 0 else end + count, -1) if end > -(1 << 31) else -1
        flipped = value.flip(axis)
        ranges = [slice(None)] * axis + [slice(count - 1 - start, max(count - 1 - end, 0), -step)]
        value = flipped[tuple(ranges)]
    return value


def _expand(node: Node, x: Value, shape: Value) -> torch.Tensor:
    value = tensor(x)
    target = sizes(node, shape, "shape")
    more = len(target) - value.dim()
    if more < 0:
        target = list(value.shape[:-more]) + target
    own = [1] * max(more, 0) + list(value.shape)
    if is_known(x) and x.size == 1 and isinstance(x.item(), bool | int | float) and value.dtype != torch.bfloat16:
        return torch.full(bounded(node, target), x.item(), dtype=value.dtype)
    return value.expand([mine if _is_one(n) else n for n, mine in zip(target, own, strict=True)])


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


def _tile(node: Node, x: Value, repeats: Value) -> torch.Tensor:
    value, counts = tensor(x), sizes(node, repeats, "repeats")
    bounded(node, [a * b for a, b in zip(value.shape, counts, strict=True)])
    return value.repeat(counts)


_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(node: Node, x: Value, pads: Value = None, fill: Value = None, axes: Value = None) -> torch.Tensor:
    value = tensor(x)
    widths = node.get("pads") if pads is None else sizes(node, pads, "pads")
    constant = node.get("value", 0.0) if fill is None else number(node, fill, "value")
    along = list(range(value.dim())) if axes is None else [int(a) % value.dim() for a in sizes(node, axes, "axes")]
    mode = node.get("mode", "constant")
    by_axis = {axis: (widths[i], widths[i + len(along)]) for i, axis in enumerate(along)}
    check_growth(node, value.shape, [n + sum(by_axis.get(axis, (0, 0))) for axis, n in enumerate(value.shape)])
    if mode == "constant":
        flat = [n for axis in reversed(range(value.dim())) for n in by_axis.get(axis, (0, 0))]
        while len(flat) > 2 and all(_is_zero(n) for n in flat[-2:]):
            flat = flat[:-2]
        if value.dtype == torch.bool:
            return F.pad(value.to(torch.uint8), flat, value=int(constant)).bool()
        return F.pad(value, flat, value=constant) if any(not _is_zero(n) for n in flat) else value
    if (
        all(axis >= value.dim() - 2 or both == (0, 0) for axis, both in by_axis.items())
        and value.dim() in (3, 4)
        and value.is_floating_point()
    ):
        last = 1 if all(axis == value.dim() - 1 or both == (0, 0) for axis, both in by_axis.items()) else 2
        if last == value.dim() - 2 and min(n for both in by_axis.values() for n in both) >= 0:
            flat = [n for axis in reversed(range(2, value.dim())) for n in by_axis.get(axis, (0, 0))]
            return F.pad(value, flat, mode=_MODES[mode])
    for axis, (before, after) in by_axis.items():
        value = _padded(value, axis, before, after, mode)
    return value


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0


def _padded(value: torch.Tensor, axis: int, before: Any, after: Any, mode: str) -> torch.Tensor:
    """One axis, by the index of every place of the result."""
    if before == 0 and after == 0:
        return value
    count = value.shape[axis]
    places = torch.arange(-before, count + after, device=value.device)
    if mode == "edge":
        places = places.clamp(0, count - 1)
    elif mode == "wrap":
        places = places % count
    else:
        turn = max(2 * (count - 1), 1)
        places = places % turn
        places = torch.where(places >= count, turn - places, places)
    return value.index_select(axis, places)


def _one_hot(node: Node, indices: Value, depth: Value, values: Value) -> torch.Tensor:
    count = int(number(node, depth, "depth"))
    index, (off, on) = tensor(indices), tensor(values).unbind(0)
    index = index.long() if index.is_floating_point() else index.long()
    axis = node.get("axis", -1)
    at = torch.where(index < 0, index + count, index).unsqueeze(axis)
    shape = [1] * at.dim()
    shape[axis] = count
    places = torch.arange(count, device=index.device).reshape(shape)
    return torch.where(places == at, on, off)


def _range(node: Node, start: Value, limit: Value, step: Value) -> torch.Tensor:
    first, end, by = (number(node, value, "limits") for value in (start, limit, step))
    if not any(isinstance(n, torch.SymInt | torch.SymFloat) for n in (first, end, by)):
        bounded(node, [max(math.ceil((end - first) / by), 0)])
    return torch.arange(first, end, by, dtype=tensor(start).dtype)


def _constant_of_shape(node: Node, shape: Value) -> torch.Tensor:
    value = node.get("value", np.zeros(1, np.float32)).reshape(-1)
    fill = tensor(value)
    return torch.full(bounded(node, sizes(node, shape, "shape")), value[0].item(), dtype=fill.dtype)


def _eye(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    dtype = torch_type(node, node.get("dtype")) if node.get("dtype") else value.dtype
    rows = torch.arange(value.shape[0]).unsqueeze(1)
    diagonal: torch.Tensor = torch.arange(value.shape[1]) - rows == node.get("k", 0)
    return diagonal.to(dtype)


def _trilu(node: Node, x: Value, k: Value = None) -> torch.Tensor:
    value = tensor(x)
    at = 0 if k is None else int(number(node, k, "diagonal"))
    rows = torch.arange(value.shape[-2], device=value.device).unsqueeze(1)
    distance = torch.arange(value.shape[-1], device=value.device) - rows
    inside = distance >= at if node.get("upper", 1) else distance <= at
    return torch.where(inside, value, torch.zeros_like(value))


def _depth_to_space(node: Node, x: Value) -> torch.Tensor:
    value, block = tensor(x), node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(value, block)
    n, c, h, w = value.shape
    split = value.reshape(n, block, block, c // block**2, h, w)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(node: Node, x: Value) -> torch.Tensor:
    value, block = tensor(x), node.get("blocksize")
    n, c, h, w = value.shape
    split = value.reshape(n, c, h // block, block, w // block, block)
    if node.get("mode", "DCR") == "CRD":
        return split.permute(0, 1, 3, 5, 2, 4).reshape(n, c * block**2, h // block, w // block)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


def _center_crop_pad(node: Node, x: Value, shape: Value) -> torch.Tensor:
    value = tensor(x)
    axes = node.get("axes", list(range(value.dim())))
    for axis, size in zip(axes, sizes(node, shape, "shape"), strict=True):
        axis = axis % value.dim()
        more = size - value.shape[axis]
        if more < 0:
            value = value.narrow(axis, -more // 2, size)
        elif more > 0:
            flat = [0, 0] * (value.dim() - 1 - axis) + [more // 2, more - more // 2]
            value = F.pad(value, flat)
    return value


OPERATORS: dict[str, Callable[..., Any]] = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye,
    "Flatten": _flatten,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
