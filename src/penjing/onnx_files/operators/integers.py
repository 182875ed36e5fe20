"""ONNX operators on integers that stand for real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from penjing.onnx_files.node import Node, Value, tensor
from penjing.onnx_files.operators.convolutions import OPERATORS as CONVOLUTIONS
from penjing.onnx_files.operators.elementwise import torch_type


def _along(value: torch.Tensor, like: torch.Tensor, node: Node) -> torch.Tensor:
    """A scale or zero point, spread over an axis (one of each for a channel or for a block) of a tensor."""
    if value.dim() == 0 or value.numel() == 1:
        return value.reshape([1] * like.dim()) if like.dim() else value.reshape(())
    axis = node.get("axis", 1) % like.dim()
    block = node.get("block_size", 0)
    if value.dim() == like.dim() and block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])
    return value.reshape([-1 if a == axis else 1 for a in range(like.dim())])


def _quantize(node: Node, x: Value, scale: Value, zero: Value = None) -> torch.Tensor:
    value, step = tensor(x), tensor(scale)
    dtype = torch_type(node, node.get("output_dtype", 0) or 2) if zero is None else tensor(zero).dtype
    limits = torch.iinfo(dtype)
    q = torch.round(value.float() / _along(step.float(), value, node))
    if zero is not None:
        q = q + _along(tensor(zero).float(), value, node)
    return q.clamp(limits.min, limits.max).to(dtype)


def _dequantize(node: Node, x: Value, scale: Value, zero: Value = None) -> torch.Tensor:
    value, step = tensor(x), tensor(scale)
    wide = value.to(torch.int32)
    if zero is not None:
        wide = wide - _along(tensor(zero).to(torch.int32), value, node)
    return wide.to(step.dtype) * _along(step, value, node)


def _dynamic(node: Node, x: Value) -> Any:
    value = tensor(x)
    low, high = value.reshape(-1).amin(0).clamp(max=0.0), value.reshape(-1).amax(0).clamp(min=0.0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    q = (torch.round(value / scale) + zero).clamp(0, 255).to(torch.uint8)
    return q, scale, zero.to(torch.uint8)


def _matmul(node: Node, a: Value, b: Value, za: Value = None, zb: Value = None) -> torch.Tensor:
    left, right = tensor(a).to(torch.int32), tensor(b).to(torch.int32)
    if za is not None:
        zero = tensor(za).to(torch.int32)
        left = left - (zero.unsqueeze(-1) if zero.dim() == 1 and zero.numel() > 1 else zero)
    if zb is not None:
        right = right - tensor(zb).to(torch.int32)
    return torch.matmul(left.double(), right.double()).to(torch.int32)


def _conv(node: Node, x: Value, w: Value, zx: Value = None, zw: Value = None) -> torch.Tensor:
    value, weight = tensor(x).float(), tensor(w).float()
    if zx is not None:
        value = value - tensor(zx).float()
    if zw is not None:
        zero = tensor(zw).float()
        weight = weight - (zero.reshape([-1] + [1] * (weight.dim() - 1)) if zero.numel() > 1 else zero)
    return torch.round(CONVOLUTIONS["Conv"](node, value.double(), weight.double())).to(torch.int32)


def _requantized(total: torch.Tensor, scale: torch.Tensor, zero: Value) -> torch.Tensor:
    point = tensor(zero)
    limits = torch.iinfo(point.dtype)
    return (torch.round(total * scale) + point.float()).clamp(limits.min, limits.max).to(point.dtype)


def _linear_matmul(
    node: Node, a: Value, sa: Value, za: Value, b: Value, sb: Value, zb: Value, sy: Value, zy: Value
) -> torch.Tensor:
    total = _matmul(node, a, b, za, zb).float()
    return _requantized(total, tensor(sa).float() * tensor(sb).float() / tensor(sy).float(), zy)


def _linear_conv(
    node: Node, x: Value, sx: Value, zx: Value, w: Value, sw: Value, zw: Value, sy: Value, zy: Value, b: Value = None
) -> torch.Tensor:
    total = _conv(node, x, w, zx, zw).float()
    rank = total.dim() - 2
    if b is not None:
        total = total + tensor(b).float().reshape([-1] + [1] * rank)
    scale = tensor(sx).float() * tensor(sw).float() / tensor(sy).float()
    return _requantized(total, scale.reshape([-1] + [1] * rank) if scale.numel() > 1 else scale.reshape(()), zy)


OPERATORS: dict[str, Callable[..., Any]] = {
    "ConvInteger": _conv,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _matmul,
    "QLinearConv": _linear_conv,
    "QLinearMatMul": _linear_matmul,
    "QuantizeLinear": _quantize,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2),
}  # fmt: skip

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
