"""ONNX operators whose results have as many rows as the values say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from penjing.numerics.suppression import non_max_suppression
from penjing.onnx_files.node import Node, Value, number, tensor


def _suppress(
    node: Node,
    boxes: Value,
    scores: Value,
    most: Value = None,
    overlap: Value = None,
    least: Value = None,
) -> torch.Tensor:
    count = 0 if most is None else int(number(node, most, "number of boxes"))
    result: torch.Tensor = non_max_suppression(
        tensor(boxes),
        tensor(scores),
        min(count, (1 << 62)),
        0.0 if overlap is None else float(number(node, overlap, "overlap")),
        -math.inf if least is None else float(number(node, least, "smallest score")),
        bool(node.get("center_point_box", 0)),
    )
    return result


def _unique(node: Node, x: Value) -> Any:
    value, axis = tensor(x), node.get("axis")
    unsorted = not node.get("sorted", 1)
    flat = value.reshape(-1) if axis is None else value
    dim = 0 if axis is None else axis % flat.dim()
    values, inverse, counts = torch.unique(flat, sorted=True, return_inverse=True, return_counts=True, dim=dim)
    places = torch.arange(inverse.shape[0])
    first = torch.full_like(counts, inverse.shape[0]).scatter_reduce(0, inverse, places, "amin")
    if unsorted:
        order = torch.argsort(first)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
        values, first, counts, inverse = values.index_select(dim, order), first[order], counts[order], back[inverse]
    return (values, first, inverse, counts)[: max(len(node.outputs), 1)] if len(node.outputs) > 1 else values


OPERATORS: dict[str, Callable[..., Any]] = {"NonMaxSuppression": _suppress, "Unique": _unique}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"NonMaxSuppression": (2, 3, 4)}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
