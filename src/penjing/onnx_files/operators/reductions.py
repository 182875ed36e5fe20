"""ONNX operators that reduce axes, and those that normalize along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, number, sizes, tensor


def _reduce(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Callable[..., Any]:
    def apply(node: Node, x: Value, axes: Value = None) -> torch.Tensor:
        value = tensor(x)
        listed = node.get("axes") if axes is None else sizes(node, axes, "axes")
        if not listed:
            if node.get("noop_with_empty_axes", 0):
                # Nothing is reduced, and what is done to every element still is.
                return function(value.unsqueeze(0), [0], False) if value.dtype != torch.bool else value
            listed = list(range(value.dim()))
        axis = [int(a) % max(value.dim(), 1) for a in listed]
        if not axis:
            axis, value = [0], value.reshape(1)
            return function(value, axis, False)
        wide = value
        if value.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.uint64):
            wide = value.long()
        return function(wide, axis, bool(node.get("keepdims", 1))).to(value.dtype)

    return apply


def _sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.sum(axes, keepdim=keep)


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.mean(axes, keepdim=keep) if x.is_floating_point() else x.double().mean(axes, keepdim=keep)


def _largest(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if any(x.shape[a] == 0 for a in axes):
        return torch.full_like(x.sum(axes, keepdim=keep), _limits(x.dtype)[0])
    return x.int().amax(axes, keepdim=keep).bool() if x.dtype == torch.bool else x.amax(axes, keepdim=keep)


def _smallest(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if any(x.shape[a] == 0 for a in axes):
        return torch.full_like(x.sum(axes, keepdim=keep), _limits(x.dtype)[1])
    return x.int().amin(axes, keepdim=keep).bool() if x.dtype == torch.bool else x.amin(axes, keepdim=keep)


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_floating_point:
        return float("-inf"), float("inf")
    return (torch.iinfo(dtype).min, torch.iinfo(dtype).max) if dtype != torch.bool else (0, 1)


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _l1(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.abs().sum(axes, keepdim=keep)


def _l2(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.square().sum(axes, keepdim=keep).to(_float(x)).sqrt()


def _log_sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.sum(axes, keepdim=keep).to(_float(x)).log()


def _log_sum_exp(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if any(x.shape[a] == 0 for a in axes):
        return torch.full_like(x.sum(axes, keepdim=keep), float("-inf"))
    return torch.logsumexp(x.to(_float(x)), axes, keepdim=keep)


def _sum_square(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return x.square().sum(axes, keepdim=keep)


def _float(x: torch.Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float64


def _arg(largest: bool) -> Callable[..., Any]:
    def apply(node: Node, x: Value) -> torch.Tensor:
        value, axis, keep = tensor(x), node.get("axis", 0), bool(node.get("keepdims", 1))
        function = torch.argmax if largest else torch.argmin
        if not node.get("select_last_index", 0):
            places: torch.Tensor = function(value, axis, keepdim=keep)
            return places
        mirrored: torch.Tensor = function(value.flip(axis), axis, keepdim=keep)
        last: torch.Tensor = value.shape[axis] - 1 - mirrored
        return last

    return apply


def _softmax(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def apply(node: Node, x: Value) -> torch.Tensor:
        value = tensor(x)
        if node.opset >= 13:
            return function(value, node.get("axis", -1))
        axis = node.get("axis", 1) % max(value.dim(), 1)
        if axis == value.dim() - 1:
            return function(value, -1)
        return function(value.flatten(axis), -1).reshape(value.shape)

    return apply


def _hard(x: torch.Tensor, axis: int) -> torch.Tensor:
    places = torch.arange(x.shape[axis], device=x.device).reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))
    return (places == x.argmax(axis, keepdim=True)).to(x.dtype)


def _cumulative(function: Callable[..., torch.Tensor], start: int) -> Callable[..., Any]:
    def apply(node: Node, x: Value, axis: Value) -> torch.Tensor:
        value, at = tensor(x), int(number(node, axis, "axis"))
        wide = value.long() if value.dtype == torch.int32 else value
        if node.get("reverse", 0):
            wide = wide.flip(at)
        if node.get("exclusive", 0):
            first = torch.full_like(wide.narrow(at, 0, 1), start)
            wide = torch.cat([first, wide.narrow(at, 0, wide.shape[at] - 1)], at)
        result = function(wide, at)
        return (result.flip(at) if node.get("reverse", 0) else result).to(value.dtype)

    return apply


def _lp(node: Node, x: Value) -> torch.Tensor:
    value, p, axis = tensor(x), node.get("p", 2), node.get("axis", -1)
    norm = value.abs().sum(axis, keepdim=True) if p == 1 else value.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(value), value / norm)


OPERATORS: dict[str, Callable[..., Any]] = {
    "ArgMax": _arg(True),
    "ArgMin": _arg(False),
    "CumProd": _cumulative(torch.cumprod, 1),
    "CumSum": _cumulative(torch.cumsum, 0),
    "Hardmax": _softmax(_hard),
    "LogSoftmax": _softmax(F.log_softmax),
    "LpNormalization": _lp,
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(_log_sum_exp),
    "ReduceMax": _reduce(_largest),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(_smallest),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(_sum_square),
    "Softmax": _softmax(F.softmax),
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "CumProd": (1,), "CumSum": (1,),
    **{name: (1,) for name in OPERATORS if name.startswith("Reduce")},
}  # fmt: skip

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
