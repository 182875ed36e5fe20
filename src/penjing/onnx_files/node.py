"""A node of an ONNX graph, and the values that pass between nodes while the graph is run with torch.

A value is a tensor, or a NumPy array that is known before anything is computed: constants, and sizes. An array of
sizes may hold symbols (`torch.SymInt`) where an axis varies; its type is then ``object``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penjing.errors import SourceError

Value = Any
"""A tensor, a known array, or None for an input that is left out."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of a graph.

    Attributes:
        operator: Its type, as ``"Conv"``.
        name: As the file calls it; may be empty.
        line: Its place among the nodes of its graph, from 1.
        opset: The version of the operators' set that the file is written for.
        attributes: As Python values; tensors as arrays, subgraphs as they are.
        inputs: Names of the values that it reads; empty for those left out.
        outputs: Names of the values that it gives; empty for those that nobody reads.
    """

    operator: str
    name: str
    line: int
    opset: int
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or the default where the file leaves it out."""
        return self.attributes.get(attribute, default)

    def refuse(self, what: str, got: str, remedy: str | None = None, code: str = "operator") -> SourceError:
        """The error of an operator that can't be taken, with its place in the file."""
        return SourceError(
            f"the ONNX operator {self.operator} can't be taken: {what}",
            code=code,
            got=f"{got} (node {self.line}{f', {self.name!r}' if self.name else ''})",
            expected="an operator whose result follows from its inputs' values, and whose shapes follow from shapes",
            remedy=remedy
            or "run onnxsim or onnxruntime's basic optimization on the file, which may compute it away, or "
            "give the network that the file was exported from",
        )


def is_known(value: Value) -> bool:
    """Whether a value is known before anything is computed."""
    return isinstance(value, np.ndarray)


def array(values: Sequence[Any]) -> np.ndarray:
    """Sizes as a known value: int64, or objects where some are symbols."""
    if any(isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) for value in values):
        result = np.empty(len(values), dtype=object)
        result[:] = list(values)
        return result
    return np.asarray([int(value) for value in values], dtype=np.int64)


def sizes(node: Node, value: Value, role: str) -> list[Any]:
    """A known value as a list of integers and symbols.

    Raises:
        SourceError: It is computed from the values of tensors.
    """
    if not is_known(value):
        raise node.refuse(f"its {role} is computed from the values of tensors", "sizes that change with the values")
    return [item if isinstance(item, torch.SymInt) else int(item) for item in np.asarray(value).reshape(-1)]


FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What functions of torch and NumPy raise for inputs and attributes that no valid node has."""

LARGEST = 1 << 28
"""Most elements of a tensor that an operator makes out of a few numbers."""


def bounded(node: Node, shape: Sequence[Any]) -> list[Any]:
    """A shape as it is.

    Raises:
        SourceError: It has more elements than `LARGEST`, which no network means, or a negative size.
    """
    count = 1
    for n in shape:
        if isinstance(n, int) and n < 0:
            raise node.refuse("its result has a negative size", f"shape {list(shape)}")
        count = count * max(n, 1) if isinstance(n, int) else count
    if count > LARGEST:
        raise node.refuse("its result is too large", f"shape {list(shape)}")
    return list(shape)


def check_growth(node: Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Refuse paddings, strides and windows that make a small tensor one that no memory holds.

    Args:
        node: With the numbers.
        before: Shape of the tensor.
        after: Shape of what the node makes of it; symbols, of axes that vary, are not counted in either.

    Raises:
        SourceError: It has more than `LARGEST` elements, and more than 16 times those of the tensor.
    """
    own, result = (math.prod(max(n, 1) for n in shape if isinstance(n, int)) for shape in (before, after))
    if result > LARGEST and result > 16 * own:
        raise node.refuse("its result is too large", f"shape {list(after)} from {list(before)}")


def largest(a: Any, b: Any) -> Any:
    """The larger of two sizes, of which each may be a symbol."""
    return torch.sym_max(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else max(a, b)  # type: ignore[no-untyped-call]


def smallest(a: Any, b: Any) -> Any:
    """The smaller of two sizes, of which each may be a symbol."""
    return torch.sym_min(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else min(a, b)  # type: ignore[no-untyped-call]


def number(node: Node, value: Value, role: str) -> Any:
    """A known value of one element as a number."""
    if not is_known(value):
        raise node.refuse(f"its {role} is computed from the values of tensors", "a number that changes with the values")
    item = np.asarray(value).reshape(-1)[0]
    return item if isinstance(item, torch.SymInt | torch.SymFloat) else item.item() if hasattr(item, "item") else item


def tensor(value: Value, declared: torch.dtype | None = None) -> torch.Tensor:
    """A value as a tensor.

    Args:
        value: A tensor, or what is known.
        declared: Its type, where the file says it: an array of symbols does not know of which size its numbers are.
    """
    if isinstance(value, torch.Tensor):
        return value
    if value.dtype == object:
        items = list(value.reshape(-1))
        dtype = declared or _type_of(items)
        rows = [torch.scalar_tensor(item, dtype=dtype) for item in items]
        return torch.stack(rows).reshape(value.shape) if rows else torch.zeros(value.shape, dtype=dtype)
    return from_array(value)


def _type_of(items: list[Any]) -> torch.dtype:
    if any(isinstance(item, torch.SymFloat | float | np.floating) for item in items):
        return torch.float32
    return torch.bool if all(isinstance(item, torch.SymBool | bool | np.bool_) for item in items) else torch.int64


def from_array(value: np.ndarray) -> torch.Tensor:
    """An array of numbers as a tensor of its own memory; bfloat16 too, which NumPy knows by another package."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    # C has two types of 64 bits without sign, of which torch takes one.
    copied = np.array(value, order="C")
    return torch.from_numpy(copied.view(np.uint64) if copied.dtype == np.uint64 else copied)


__all__ = [
    "FAILURES",
    "LARGEST",
    "Node",
    "Value",
    "array",
    "bounded",
    "check_growth",
    "from_array",
    "is_known",
    "largest",
    "number",
    "sizes",
    "smallest",
    "tensor",
]
