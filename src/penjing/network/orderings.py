"""Cumulative products and extrema, order statistics, and scattered means, from operators that every runtime has."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from penjing.network.rewriting import END, Builder

aten = torch.ops.aten


def cumprod(build: Builder, a: dict[str, Any]) -> Any:
    """Cumulative product."""
    x = a["self"] if a["dtype"] is None else build(aten.to.dtype, a["self"], a["dtype"])
    return _running(build, x, a["dim"], lambda left, right: build(aten.mul.Tensor, left, right))


def cummax(build: Builder, a: dict[str, Any]) -> Any:
    """Cumulative maximum; its indices are left to the exporter."""
    return _extremes(build, a, aten.maximum.default)


def cummin(build: Builder, a: dict[str, Any]) -> Any:
    """Cumulative minimum; its indices are left to the exporter."""
    return _extremes(build, a, aten.minimum.default)


def kthvalue(build: Builder, a: dict[str, Any]) -> Any:
    """The k-th smallest value and its index."""
    if not build.value(a["self"]).dim():
        return None
    ordered = build(aten.sort.default, a["self"], a["dim"])
    results = []
    for position in (0, 1):
        one = build(aten.select.int, build(operator.getitem, ordered, position), a["dim"], a["k"] - 1)
        results.append(build(aten.unsqueeze.default, one, a["dim"]) if a["keepdim"] else one)
    return tuple(results)


def scatter_reduce(build: Builder, a: dict[str, Any]) -> Any:
    """Scattered means as sum over count, which the ONNX exporter translates incorrectly."""
    return _mean(build, a, a["index"], a["src"]) if a["reduce"] == "mean" else None


def index_reduce(build: Builder, a: dict[str, Any]) -> Any:
    """The same with one index per position of an axis, which the exporter does not support."""
    rank = build.value(a["self"]).dim()
    if not rank:
        return None
    dim, index = a["dim"] % rank, a["index"]
    for axis in [*range(dim), *range(dim + 1, rank)]:
        index = build(aten.unsqueeze.default, index, axis)
    index = build(aten.expand_as.default, index, a["source"])
    if a["reduce"] == "mean":
        return _mean(build, a, index, a["source"])
    return build(
        aten.scatter_reduce.two, a["self"], dim, index, a["source"], a["reduce"], include_self=a["include_self"]
    )


def _mean(build: Builder, a: dict[str, Any], index: Any, source: Any) -> Any:
    x, dim, own = a["self"], a["dim"], 1.0 if a["include_self"] else 0.0
    ones = build(aten.ones_like.default, source)
    number = build(aten.scatter_add.default, build(aten.full_like.default, x, own), dim, index, ones)
    total = build(aten.scatter_add.default, build(aten.mul.Scalar, x, own), dim, index, source)
    mean = build(aten.div.Tensor, total, build(aten.clamp.default, number, 1.0))
    return mean if own else build(aten.where.self, build(aten.gt.Scalar, number, 0.5), mean, x)


def _extremes(build: Builder, a: dict[str, Any], choose: Any) -> Any:
    node = build.node
    if any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users):
        return None
    values = _running(build, a["self"], a["dim"], lambda left, right: build(choose, left, right))
    return None if values is None else (values, None)


def _running(build: Builder, x: Any, dim: int, combine: Callable[[Any, Any], Any]) -> Any:
    """A parallel prefix scan with doubling strides; None if the length varies."""
    rank = build.value(x).dim()
    length = build.value(x).shape[dim] if rank else 1
    if not isinstance(length, int):
        return None
    dim, reach = dim % max(1, rank), 1
    while reach < length:
        near = build(aten.slice.Tensor, x, dim, 0, reach)
        far = build(aten.slice.Tensor, x, dim, reach, END)
        before = build(aten.slice.Tensor, x, dim, 0, length - reach)
        x = build(aten.cat.default, [near, combine(before, far)], dim)
        reach *= 2
    return x
