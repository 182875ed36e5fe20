"""ONNX operators that read or write elements by their indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, is_known, number, tensor

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _gather(node: Node, x: Value, indices: Value) -> torch.Tensor:
    value, axis = tensor(x), node.get("axis", 0)
    axis = axis % value.dim()
    if is_known(indices) and indices.ndim == 0:
        at = indices.item()
        return value.select(axis, at if isinstance(at, torch.SymInt) else int(at))
    index = tensor(indices).long()
    if axis == 0 and value.dim() == 2 and value.is_floating_point() and index.dim() > 0 and not is_known(indices):
        return F.embedding(index, value)  # token ids are not negative
    size = value.shape[axis]
    if not is_known(indices) or indices.dtype == object:
        index = torch.where(index < 0, index + size, index)
    elif (indices < 0).any():  # the size may be a symbol, which NumPy would make a number
        known = np.where(indices < 0, indices + size, indices) if isinstance(size, int) else None
        index = torch.where(index < 0, index + size, index) if known is None else tensor(known).long()
    if index.dim() == 1:
        return value.index_select(axis, index)
    flat = value.index_select(axis, index.reshape(-1))
    return flat.reshape(*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])


def _gather_elements(node: Node, x: Value, indices: Value) -> torch.Tensor:
    value, axis, index = tensor(x), node.get("axis", 0), tensor(indices).long()
    return value.gather(axis, torch.where(index < 0, index + value.shape[axis], index))


def _gather_nd(node: Node, x: Value, indices: Value) -> torch.Tensor:
    value, index, batch = tensor(x), tensor(indices).long(), node.get("batch_dims", 0)
    depth = index.shape[-1]
    parts = list(index.unbind(-1))
    for axis in range(batch):
        shape = [1] * (index.dim() - 1)
        shape[axis] = -1
        parts.insert(axis, torch.arange(value.shape[axis], device=index.device).reshape(shape))
    assert depth == len(parts) - batch
    return value[tuple(parts)]


def _scatter_elements(node: Node, x: Value, indices: Value, updates: Value) -> torch.Tensor:
    value, axis, index, new = tensor(x), node.get("axis", 0), tensor(indices).long(), tensor(updates)
    index = torch.where(index < 0, index + value.shape[axis], index)
    how = node.get("reduction", "none")
    if how == "none":
        return value.scatter(axis, index, new)
    return value.scatter_reduce(axis, index, new, _REDUCTIONS[how])


def _scatter_nd(node: Node, x: Value, indices: Value, updates: Value) -> torch.Tensor:
    value, index, new = tensor(x), tensor(indices).long(), tensor(updates)
    how = node.get("reduction", "none")
    if how in ("none", "add"):
        return value.index_put(tuple(index.unbind(-1)), new, accumulate=how == "add")
    depth = index.shape[-1]
    rows = value.reshape(-1, *value.shape[depth:])
    place = torch.zeros_like(index[..., 0])
    for axis in range(depth):
        at = index[..., axis]
        place = place * value.shape[axis] + torch.where(at < 0, at + value.shape[axis], at)
    flat = rows.reshape(rows.shape[0], -1)
    more = new.reshape(-1, flat.shape[1])
    spread = place.reshape(-1, 1).expand_as(more)
    return flat.scatter_reduce(0, spread, more, _REDUCTIONS[how]).reshape(value.shape)


def _tensor_scatter(node: Node, past: Value, update: Value, indices: Value = None) -> torch.Tensor:
    value, new = tensor(past), tensor(update)
    axis = node.get("axis", -2) % value.dim()
    start = torch.zeros(value.shape[0], dtype=torch.int64) if indices is None else tensor(indices).long()
    steps = torch.arange(new.shape[axis], device=value.device)
    places = start.reshape(-1, 1) + steps
    if node.get("mode", "linear") == "circular":
        places = places % value.shape[axis]
    shape = [1] * value.dim()
    shape[0], shape[axis] = new.shape[0], new.shape[axis]
    return value.scatter(axis, places.reshape(shape).expand_as(new), new)


def _reverse_sequence(node: Node, x: Value, lengths: Value) -> torch.Tensor:
    value, count = tensor(x), tensor(lengths).long()
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    steps = torch.arange(value.shape[time], device=value.device)
    moved = value.movedim((batch, time), (0, 1))
    places = torch.where(steps < count.unsqueeze(1), count.unsqueeze(1) - 1 - steps, steps)
    index = places.reshape(*places.shape, *[1] * (moved.dim() - 2)).expand_as(moved)
    return moved.gather(1, index).movedim((0, 1), (batch, time))


def _top_k(node: Node, x: Value, k: Value = None) -> Any:
    value, axis = tensor(x), node.get("axis", -1)
    count = node.get("k") if k is None else int(number(node, k, "number"))
    wide = value.long() if value.dtype in (torch.uint64, torch.uint32, torch.uint16) else value
    top = torch.topk(wide, count, axis, bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return top.values.to(value.dtype), top.indices  # of equal values, torch may take others than ONNX Runtime


def _compress(node: Node, x: Value, condition: Value) -> torch.Tensor:
    value = tensor(x)
    if is_known(condition):
        places = np.flatnonzero(condition)
        index = torch.from_numpy(places)
    else:
        index = tensor(condition).nonzero().squeeze(1)
    axis = node.get("axis")
    return value.reshape(-1).index_select(0, index) if axis is None else value.index_select(axis, index)


def _non_zero(_: Node, x: Value) -> torch.Tensor:
    return tensor(x).nonzero().transpose(0, 1)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {"TopK": (1,)}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
