"""ONNX pooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, check_growth, largest, sizes, tensor
from penjing.onnx_files.operators.convolutions import pad_spatial, padded_shape, spatial_pads

_AVERAGES: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMA: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _window(node: Node, x: torch.Tensor) -> tuple[list[int], list[int], list[int], list[Any], list[Any]]:
    """Kernel, strides, dilations and the padding before and after; with what a rounded-up size adds after."""
    kernel = list(node.get("kernel_shape"))
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise node.refuse("torch has no pooling of its rank", f"{rank} spatial axes")
    if x.dim() != rank + 2:
        raise node.refuse("its kernel is of another rank than its input", f"{kernel} for shape {list(x.shape)}")
    strides = list(node.get("strides", [1] * rank))
    dilations = list(node.get("dilations", [1] * rank))
    before, after = spatial_pads(node, x.shape[2:], kernel, strides, dilations)
    # The last window may reach beyond the padding by less than its own size.
    check_growth(
        node, x.shape, padded_shape(x, before, [n + k * d for n, k, d in zip(after, kernel, dilations, strict=True)])
    )
    return kernel, strides, dilations, before, after


def _extra(x: torch.Tensor, kernel: Any, strides: Any, dilations: Any, before: Any, after: Any) -> list[Any]:
    """What has to be added after each axis so that the last window, which starts inside, is whole."""
    more = []
    for size, width, stride, dilation, first, last in zip(
        x.shape[2:], kernel, strides, dilations, before, after, strict=True
    ):
        reach = (width - 1) * dilation + 1
        whole = size + first + last
        count = (whole - reach + stride - 1) // stride + 1
        if isinstance(count, int) and isinstance(size, int) and (count - 1) * stride >= size + first:
            count -= 1
        more.append(largest((count - 1) * stride + reach - whole, 0))
    return more


def _average(node: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    kernel, strides, dilations, before, after = _window(node, value)
    rank, counted = len(kernel), bool(node.get("count_include_pad", 0))
    more = _extra(value, kernel, strides, dilations, before, after) if node.get("ceil_mode", 0) else [0] * rank
    none = all(isinstance(n, int) and n == 0 for n in more)
    plain = all(d == 1 for d in dilations) and none
    if plain and all(
        isinstance(a, int) and a == b and 2 * a <= k for a, b, k in zip(before, after, kernel, strict=True)
    ):
        result: torch.Tensor = _AVERAGES[rank - 1](value, kernel, strides, before, False, counted)
        return result
    ones = torch.ones_like(value[:1, :1])
    if counted:
        value, ones = pad_spatial(value, before, after), pad_spatial(ones, before, after, 1.0)
        before, after = [0] * rank, [0] * rank
    tail = [a + b for a, b in zip(after, more, strict=True)]
    total, count = (_sums(pad_spatial(v, before, tail), kernel, strides, dilations) for v in (value, ones))
    return total / count


def _fits(before: list[Any], after: list[Any], kernel: list[int]) -> bool:
    """Whether torch pads so: the same before and after, and no more than half a window."""
    return all(isinstance(a, int) and a == b and 2 * a <= k for a, b, k in zip(before, after, kernel, strict=True))


def _sums(x: torch.Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> torch.Tensor:
    rank = len(kernel)
    if all(d == 1 for d in dilations):
        result: torch.Tensor = _AVERAGES[rank - 1](x, kernel, strides) * math.prod(kernel)
        return result
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    weight = torch.ones(1, 1, *kernel, dtype=x.dtype)
    flat = x.reshape(-1, 1, *x.shape[2:])
    sums: torch.Tensor = convolve(flat, weight, None, strides, 0, dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _maximum(node: Node, x: Value) -> Any:
    value = tensor(x)
    kernel, strides, dilations, before, after = _window(node, value)
    rank = len(kernel)
    ceil = bool(node.get("ceil_mode", 0))
    wide = value if value.is_floating_point() else value.float()
    indices = len(node.outputs) > 1 and bool(node.outputs[1])
    shape = list(value.shape[2:])
    if _fits(before, after, kernel) and not ceil and not indices:
        result: torch.Tensor = _MAXIMA[rank - 1](wide, kernel, strides, before, dilations)
        return result.to(value.dtype)
    more = _extra(value, kernel, strides, dilations, before, after) if ceil else [0] * rank
    tail = [a + b for a, b in zip(after, more, strict=True)]
    padded = pad_spatial(wide, before, tail, -math.inf)
    if not indices:
        result = _MAXIMA[rank - 1](padded, kernel, strides, 0, dilations)
        return result.to(value.dtype)
    result, places = _MAXIMA[rank - 1](padded, kernel, strides, 0, dilations, return_indices=True)
    return result.to(value.dtype), _places(node, value, places, list(padded.shape[2:]), before, shape)


def _places(
    node: Node, value: torch.Tensor, places: torch.Tensor, padded: Any, before: Any, shape: Any
) -> torch.Tensor:
    """Places within a padded channel → places within the whole input, row by row or column by column."""
    coordinates = []
    rest = places
    for size in reversed(padded):
        coordinates.append(rest % size)
        rest = rest // size
    coordinates = [c - first for c, first in zip(reversed(coordinates), before, strict=True)]
    order = list(range(len(shape)))
    if node.get("storage_order", 0):
        order = order[::-1]
    flat = torch.zeros_like(places)
    for axis in order:
        flat = flat * shape[axis] + coordinates[axis]
    area = math.prod(shape)
    channels = torch.arange(value.shape[0] * value.shape[1]).reshape(*value.shape[:2], *[1] * len(shape))
    whole: torch.Tensor = flat + channels * area
    return whole


def _lp(node: Node, x: Value) -> torch.Tensor:
    value, p = tensor(x), node.get("p", 2)
    kernel, strides, dilations, before, after = _window(node, value)
    more = _extra(value, kernel, strides, dilations, before, after) if node.get("ceil_mode", 0) else [0] * len(kernel)
    powers = value.abs() if p == 1 else value.abs().pow(p)
    padded = pad_spatial(powers, before, [a + b for a, b in zip(after, more, strict=True)])
    total = _sums(padded, kernel, strides, dilations)
    return total if p == 1 else total.pow(1 / p)


def _global(function: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> Callable[..., Any]:
    def apply(node: Node, x: Value) -> torch.Tensor:
        value = tensor(x)
        return function(value, list(range(2, value.dim())))

    return apply


def _global_lp(node: Node, x: Value) -> torch.Tensor:
    value, p = tensor(x), node.get("p", 2)
    powers: torch.Tensor = value.abs().pow(p).sum(list(range(2, value.dim())), keepdim=True)
    return powers.pow(1 / p)


def _unpool(node: Node, x: Value, indices: Value, shape: Value = None) -> torch.Tensor:
    value, places = tensor(x), tensor(indices).long()
    kernel = node.get("kernel_shape")
    strides, pads = node.get("strides", [1] * len(kernel)), node.get("pads", [0] * (2 * len(kernel)))
    natural = [
        (n - 1) * s + k - pads[i] - pads[i + len(kernel)]
        for i, (n, s, k) in enumerate(zip(value.shape[2:], strides, kernel, strict=True))
    ]
    whole = [*value.shape[:2], *natural]
    check_growth(node, value.shape, whole)
    flat = torch.zeros(math.prod(whole), dtype=value.dtype).scatter(0, places.reshape(-1), value.reshape(-1))
    result = flat.reshape(whole)
    if shape is None:
        return result
    target = sizes(node, shape, "output shape")
    return pad_spatial(result, [0] * len(kernel), [a - b for a, b in zip(target[2:], natural, strict=True)])


OPERATORS: dict[str, Callable[..., Any]] = {
    "AveragePool": _average,
    "GlobalAveragePool": _global(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalLpPool": _global_lp,
    "GlobalMaxPool": _global(lambda x, axes: x.amax(axes, keepdim=True)),
    "LpPool": _lp,
    "MaxPool": _maximum,
    "MaxUnpool": _unpool,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"MaxUnpool": (2,)}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
