"""The ONNX operators that are taken, each as a function on tensors: ``(node, *inputs) -> output or outputs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penjing.onnx_files.operators import (
    attention,
    convolutions,
    detection,
    elementwise,
    images,
    indexing,
    integers,
    normalization,
    pools,
    products,
    recurrent,
    reductions,
    shapes,
    signals,
)

_FAMILIES: tuple[Any, ...] = (
    attention,
    convolutions,
    detection,
    elementwise,
    images,
    indexing,
    integers,
    normalization,
    pools,
    products,
    recurrent,
    reductions,
    shapes,
    signals,
)

OPERATORS: dict[str, Callable[..., Any]] = {
    name: function for family in _FAMILIES for name, function in family.OPERATORS.items()
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    name: positions for family in _FAMILIES for name, positions in family.KNOWN_INPUTS.items()
}
"""Operator → positions of inputs that it has to know before anything is computed."""

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
