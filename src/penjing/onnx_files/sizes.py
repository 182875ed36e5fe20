"""What ONNX files compute of sizes: operators on arrays that are known before anything is computed.

An array may hold symbols where an axis varies, so these are NumPy's functions on objects, not torch's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from penjing.onnx_files.node import Node, array, bounded, largest, smallest

_Operator = Callable[..., Any]


def _elementwise(function: Callable[..., Any]) -> _Operator:
    plain = np.frompyfunc(function, 2, 1)

    def apply(_: Node, *values: np.ndarray) -> np.ndarray:
        result = values[0]
        for value in values[1:]:
            result = _tidy(plain(result, value), np.result_type(result, value))
        return result

    return apply


def _tidy(result: Any, dtype: Any) -> np.ndarray:
    """Objects as an array of their type where none is a symbol."""
    objects = np.asarray(result, dtype=object)
    if any(isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool) for item in objects.reshape(-1)):
        return objects
    if np.dtype(dtype).hasobject:
        kinds = {type(item) for item in objects.reshape(-1)}
        dtype = np.bool_ if kinds <= {bool, np.bool_} and kinds else np.float32 if float in kinds else np.int64
    return objects.astype(dtype)


def _compare(function: Callable[..., Any]) -> _Operator:
    plain = np.frompyfunc(function, 2, 1)

    def apply(_: Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _tidy(plain(a, b), np.bool_)

    return apply


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, float | np.floating | torch.SymFloat) or isinstance(b, float | np.floating | torch.SymFloat):
        return a / b
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a // b  # sizes are not negative
    return int(a / b) if abs(int(a)) < 1 << 50 else int(a) // int(b)


_MOST = 1 << 24
"""Most numbers of a known array."""


def _small(node: Node, count: float) -> None:
    """Refuse a known array that is too large."""
    if not count <= _MOST:
        raise node.refuse("its result is too large", f"{count:,} numbers that are known beforehand")


def _axes(node: Node, axes: np.ndarray | None) -> list[int] | None:
    listed = node.get("axes") if axes is None else axes
    return None if listed is None else [int(axis) for axis in np.reshape(listed, -1)]


def _unsqueeze(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, tuple(_axes(node, axes) or ()))


def _squeeze(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    listed = _axes(node, axes)
    return np.squeeze(x, None if listed is None else tuple(listed))


def _gather(node: Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.asarray(np.take(x, np.asarray(indices, dtype=np.int64), axis=node.get("axis", 0)), dtype=x.dtype)


def _slice(node: Node, x: np.ndarray, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    starts = node.get("starts") if starts is None else starts
    ends = node.get("ends") if ends is None else ends
    axes = node.get("axes") if axes is None else axes
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if x.dtype != object and any(isinstance(n, torch.SymInt) for n in (*starts, *ends)):
        from penjing.onnx_files.operators.shapes import OPERATORS

        # A table of numbers, such as positions, cut to a size that varies: its length is no known one.
        return OPERATORS["Slice"](node, x, *(array(list(v)) for v in (starts, ends, axes, steps)))
    ranges = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        end = None if int(step) < 0 and int(end) < -x.shape[int(axis)] else int(end)
        ranges[int(axis)] = slice(int(start), end, int(step))
    return x[tuple(ranges)]


def _concat(node: Node, *values: np.ndarray) -> np.ndarray:
    _small(node, sum(value.size for value in values))
    return np.concatenate(values, axis=node.get("axis", 0))


def _split(node: Node, x: np.ndarray, parts: Any = None) -> list[np.ndarray]:
    axis = node.get("axis", 0)
    parts = node.get("split") if parts is None else parts
    if parts is None:
        count = node.get("num_outputs", len(node.outputs))
        width = -(-x.shape[axis] // count)
        parts = [width] * (count - 1) + [x.shape[axis] - width * (count - 1)]
    return np.split(x, np.cumsum([int(part) for part in parts])[:-1], axis=axis)


def _cast(node: Node, x: np.ndarray) -> np.ndarray:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(node.get("to"))
    if x.dtype != object:
        return x.astype(dtype)
    convert = torch.sym_float if np.issubdtype(dtype, np.floating) else torch.sym_int
    return x if dtype == np.bool_ else np.asarray(np.frompyfunc(convert, 1, 1)(x), dtype=object)


def _each(function: Callable[[Any], Any]) -> _Operator:
    def apply(_: Node, x: np.ndarray) -> np.ndarray:
        return _tidy(np.frompyfunc(function, 1, 1)(x), x.dtype)

    return apply


def _reduce(function: Callable[[Any, Any], Any], start: Any) -> _Operator:
    def apply(node: Node, x: np.ndarray, axes: Any = None) -> np.ndarray:
        listed = _axes(node, axes)
        axis = tuple(range(x.ndim)) if listed is None else tuple(axis % x.ndim for axis in listed)
        moved = np.moveaxis(x, axis, range(len(axis))).reshape(-1, *[n for i, n in enumerate(x.shape) if i not in axis])
        total = np.full(moved.shape[1:], start, dtype=object)
        for row in moved:
            total = np.frompyfunc(function, 2, 1)(total, row)
        keep = [1 if i in axis else n for i, n in enumerate(x.shape)] if node.get("keepdims", 1) else moved.shape[1:]
        return _tidy(total, x.dtype).reshape(keep)

    return apply


def _reshape(node: Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    sizes = [int(n) for n in shape]
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def _constant_of_shape(node: Node, shape: np.ndarray) -> Any:
    value = node.get("value", np.zeros(1, np.float32))
    listed = bounded(node, [n if isinstance(n, torch.SymInt) else int(n) for n in shape])
    if shape.dtype == object or math.prod(listed) > 4096:
        filled = torch.as_tensor(value.reshape(-1)[0])
        return torch.full(listed, filled.item(), dtype=filled.dtype)
    return np.full(listed, value.reshape(-1)[0], value.dtype)


def _range(node: Node, start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> Any:
    first, end, by = (value.reshape(-1)[0] for value in (start, limit, step))
    if any(isinstance(n, torch.SymInt | torch.SymFloat) for n in (first, end, by)):
        return torch.arange(first, end, by)
    _small(node, (float(end) - float(first)) / float(by))
    return np.arange(first, end, by, dtype=start.dtype if start.dtype != object else np.int64)


def _where(_: Node, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def choose(chosen: Any, one: Any, other: Any) -> Any:
        return one if bool(chosen) else other

    return _tidy(np.frompyfunc(choose, 3, 1)(condition, a, b), np.result_type(a, b))


def _expand(node: Node, x: np.ndarray, shape: np.ndarray) -> Any:
    if shape.dtype == object:
        from penjing.onnx_files.operators.shapes import OPERATORS

        return OPERATORS["Expand"](node, x, shape)
    _small(node, math.prod(max(int(n), 1) for n in shape) * x.size)
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape)))


SIZES: dict[str, _Operator] = {
    "Abs": _each(abs),
    "Add": _elementwise(operator.add),
    "And": _compare(lambda a, b: bool(a) and bool(b)),
    "Cast": _cast,
    "Ceil": _each(lambda x: math.ceil(x)),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_divide),
    "Equal": _compare(operator.eq),
    "Expand": _expand,
    "Floor": _each(lambda x: x // 1),
    "Gather": _gather,
    "Greater": _compare(operator.gt),
    "GreaterOrEqual": _compare(operator.ge),
    "Identity": lambda _, x: x,
    "Less": _compare(operator.lt),
    "LessOrEqual": _compare(operator.le),
    "Max": _elementwise(largest),
    "Min": _elementwise(smallest),
    "Mod": _elementwise(lambda a, b: a % b),
    "Mul": _elementwise(operator.mul),
    "Neg": _each(operator.neg),
    "Not": _each(lambda x: not bool(x)),
    "Or": _compare(lambda a, b: bool(a) or bool(b)),
    "Range": _range,
    "ReduceMax": _reduce(lambda a, b: b if a is None or b > a else a, None),
    "ReduceMin": _reduce(lambda a, b: b if a is None or b < a else a, None),
    "ReduceProd": _reduce(operator.mul, 1),
    "ReduceSum": _reduce(operator.add, 0),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(operator.sub),
    "Transpose": lambda node, x: np.transpose(x, node.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}  # fmt: skip
"""Operator → its function on known arrays."""

__all__ = ["SIZES"]
