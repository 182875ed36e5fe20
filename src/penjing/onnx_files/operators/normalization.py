"""ONNX normalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, check_growth, tensor


def _batch(node: Node, x: Value, scale: Value, bias: Value, mean: Value, var: Value) -> Any:
    value, epsilon = tensor(x), node.get("epsilon", 1e-5)
    if node.get("training_mode", 0) or (node.opset < 7 and not node.get("is_test", 0)):
        raise node.refuse("it is in training mode", "training_mode 1", "export the network in eval mode")
    if value.dim() < 2:
        value = value.reshape(-1, 1)
        return F.batch_norm(value, tensor(mean), tensor(var), tensor(scale), tensor(bias), False, 0.0, epsilon).reshape(
            -1
        )
    return F.batch_norm(value, tensor(mean), tensor(var), tensor(scale), tensor(bias), False, 0.0, epsilon)


def _instance(node: Node, x: Value, scale: Value, bias: Value) -> torch.Tensor:
    return F.instance_norm(tensor(x), None, None, tensor(scale), tensor(bias), True, 0.0, node.get("epsilon", 1e-5))


def _layer(node: Node, x: Value, scale: Value, bias: Value = None) -> Any:
    value, weight, epsilon = tensor(x), tensor(scale), node.get("epsilon", 1e-5)
    axis = node.get("axis", -1) % value.dim()
    shape = list(value.shape[axis:])
    if list(weight.shape) == shape and all(isinstance(n, int) for n in shape):
        result = F.layer_norm(value, shape, weight, None if bias is None else tensor(bias), epsilon)
    else:
        axes = list(range(axis, value.dim()))
        centred = value - value.mean(axes, keepdim=True)
        result = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon) * weight
        result = result if bias is None else result + tensor(bias)
    if len(node.outputs) == 1:
        return result
    axes = list(range(axis, value.dim()))
    mean = value.mean(axes, keepdim=True)
    return result, mean, torch.rsqrt((value - mean).square().mean(axes, keepdim=True) + epsilon)


def _rms(node: Node, x: Value, scale: Value) -> torch.Tensor:
    value = tensor(x)
    axes = list(range(node.get("axis", -1) % value.dim(), value.dim()))
    root = torch.rsqrt(value.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5))
    return value * root * tensor(scale)


def _group(node: Node, x: Value, scale: Value, bias: Value) -> torch.Tensor:
    value, weight, groups = tensor(x), tensor(scale), node.get("num_groups")
    epsilon = node.get("epsilon", 1e-5)
    if weight.shape[0] == value.shape[1]:
        return F.group_norm(value, groups, weight, tensor(bias), epsilon)
    each = value.shape[1] // groups  # before version 21 of the set, one scale for a group
    return F.group_norm(value, groups, weight.repeat_interleave(each), tensor(bias).repeat_interleave(each), epsilon)


def _mean_variance(node: Node, x: Value) -> torch.Tensor:
    value, axes = tensor(x), node.get("axes", [0, 2, 3])
    centred = value - value.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def _lrn(node: Node, x: Value) -> torch.Tensor:
    value, size = tensor(x), node.get("size")
    alpha, beta, k = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    check_growth(node, value.shape, [value.shape[0], value.shape[1] + size, *value.shape[2:]])
    squares = F.pad(value.square().flatten(2).unsqueeze(1), (0, 0, (size - 1) // 2, size // 2))
    total: torch.Tensor = F.avg_pool2d(squares, (size, 1), 1).squeeze(1).reshape(value.shape)
    divisor: torch.Tensor = (k + alpha * total).pow(beta)
    return value / divisor


OPERATORS: dict[str, Callable[..., Any]] = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _lrn,
    "LayerNormalization": _layer,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _rms,
}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
