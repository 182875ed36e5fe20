"""Pooling as ONNX operators whose output sizes and divisors are torch's in every runtime.

`ceil_mode` means another size and another divisor in torch, in the standard and in each runtime, in floating point and
in integers; `divisor_override` has no ONNX form at all. What the last windows hang over is written as padding behind
the image instead, and a divisor as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from penjing.errors import ExportError


def overhang(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Places by which the last window ends behind the padding; below 0 where some of the padding is left unread.

    A window that would start behind the image, in its padding, is none (torch's `pooling_output_shape`).

    >>> overhang(9, kernel=2, stride=2, padding=0)
    1
    >>> overhang(4, kernel=1, stride=4, padding=0)
    -3
    """
    reach = dilation * (kernel - 1) + 1
    windows = -(-(size + 2 * padding - reach) // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return (windows - 1) * stride + reach - size - 2 * padding


def translations() -> dict[Any, Callable[..., Any]]:
    """ATen's pooling operators → how they are written, for `torch.onnx.export`."""
    aten = torch.ops.aten
    averages = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
    maxima = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
    table = {operator: _average(rank) for rank, operator in enumerate(averages, 1)}
    return table | {operator: _maximum(rank) for rank, operator in enumerate(maxima, 1)}


def _average(rank: int) -> Callable[..., Any]:
    op = _opset()

    def avg_pool(  # type: ignore[no-untyped-def]
        x, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ):  # fmt: skip
        kernel, pads = _each(kernel_size, rank), _each(padding, rank)
        strides = _each(stride, rank) if stride else kernel
        behind, unknown = _behind(x, kernel, strides, pads, [1] * rank) if ceil_mode else (pads, False)
        before, ends, whole = pads, behind, len(x.shape) == rank + 2
        if divisor_override is not None:
            if unknown:  # whatever the size, so many zeros give as many windows as rounding up does
                x = _padded(op, x, pads, [p + s - 1 for p, s in zip(pads, strides, strict=True)])
                before = ends = [0] * rank
            count_include_pad, unknown = True, False
        elif count_include_pad and any(pads) and (unknown or behind != pads):
            # Padding counts, what hangs over does not: zeros of an image of its own are told apart from it.
            x = _padded(op, x, pads, pads)
            before, ends = [0] * rank, [e - p for e, p in zip(behind, pads, strict=True)]
            count_include_pad = False
        elif behind != pads:
            count_include_pad = False

        def pool(value: Any) -> Any:
            return op.AveragePool(
                value, ceil_mode=unknown, count_include_pad=count_include_pad, kernel_shape=kernel,
                pads=[*before, *ends], strides=strides,
            )  # fmt: skip

        result = _batched(op, pool, x, whole)
        if divisor_override is None or divisor_override == math.prod(kernel):
            return result
        return op.Mul(result, op.Constant(value_float=math.prod(kernel) / divisor_override))

    return avg_pool


def _maximum(rank: int) -> Callable[..., Any]:
    op = _opset()

    def max_pool(  # type: ignore[no-untyped-def]
        x, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,), ceil_mode: bool = False,
    ):  # fmt: skip
        kernel, pads, dilations = _each(kernel_size, rank), _each(padding, rank), _each(dilation, rank)
        strides = _each(stride, rank) if stride else kernel
        behind, unknown = _behind(x, kernel, strides, pads, dilations) if ceil_mode else (pads, False)

        def pool(value: Any) -> Any:
            result, _ = op.MaxPool(
                value, ceil_mode=unknown, dilations=dilations, kernel_shape=kernel, pads=[*pads, *behind],
                strides=strides,
            )  # fmt: skip
            return result

        return _batched(op, pool, x, len(x.shape) == rank + 2)

    return max_pool


def _behind(
    x: Any, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], bool]:
    """Padding behind the image that stands for rounding up; and whether the runtime has to round up itself.

    Raises:
        ExportError: It would have to, and some of its windows would lie in the padding alone.
    """
    sizes = list(x.shape)[-len(kernel) :]
    settings = list(zip(kernel, strides, pads, dilations, strict=True))
    if all(isinstance(size, int) for size in sizes):
        more = [overhang(size, *setting) for size, setting in zip(sizes, settings, strict=True)]
        behind = [p + max(0, e) for p, e in zip(pads, more, strict=True)]
        if all(b < k for b, k in zip(behind, kernel, strict=True)):  # ONNX Runtime takes no padding as wide as a kernel
            return behind, False
        behind = [p + min(0, e) for p, e in zip(pads, more, strict=True)]
        if min(behind) >= 0:
            return behind, True
    elif all(s + p <= d * (k - 1) + 1 for k, s, p, d in settings):
        return list(pads), True
    raise ExportError(
        "pooling with this ceil_mode has no ONNX form",
        code="ceil-mode",
        got=f"kernel {list(kernel)}, stride {list(strides)}, padding {list(pads)} of sizes {sizes}",
        expected="sizes that do not vary, or a stride and a padding that are together at most the kernel",
        remedy="fix the sizes with Task(dynamic=...), or pool without ceil_mode",
    )


def _padded(op: Any, x: Any, before: Sequence[int], behind: Sequence[int]) -> Any:
    others = [0] * (len(x.shape) - len(before))
    return op.Pad(x, op.Constant(value_ints=[*others, *before, *others, *behind]))


def _batched(op: Any, pool: Callable[[Any], Any], x: Any, whole: bool) -> Any:
    """ONNX pools with a batch axis alone."""
    if whole:
        return pool(x)
    return op.Squeeze(pool(op.Unsqueeze(x, op.Constant(value_ints=[0]))), op.Constant(value_ints=[0]))


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _opset() -> Any:
    import onnxscript

    return onnxscript.opset18
