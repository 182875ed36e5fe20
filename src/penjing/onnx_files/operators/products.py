"""ONNX operators that multiply matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, tensor


def _matmul(_: Node, a: Value, b: Value) -> torch.Tensor:
    return torch.matmul(tensor(a), tensor(b))


def _gemm(node: Node, a: Value, b: Value, c: Value = None) -> torch.Tensor:
    left, right = tensor(a), tensor(b)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    left = left.t() if node.get("transA", 0) else left
    bias = None if c is None else tensor(c)
    if (
        alpha == 1
        and node.get("transB", 0)
        and (bias is None or (beta == 1 and bias.dim() == 1 and bias.shape[0] == right.shape[0]))
    ):
        return F.linear(left, right, bias)
    result = torch.matmul(left, right.t() if node.get("transB", 0) else right)
    result = result if alpha == 1 else result * alpha
    return result if bias is None else result + (bias if beta == 1 else bias * beta)


def _einsum(node: Node, *values: Value) -> torch.Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *[tensor(value) for value in values])


def _det(_: Node, x: Value) -> torch.Tensor:
    value = tensor(x)
    # By cofactors for small matrices, which every runtime computes.
    n = value.shape[-1]
    if n > 4:
        result: torch.Tensor = torch.linalg.det(value)
        return result
    return _cofactors(value)


def _cofactors(value: torch.Tensor) -> torch.Tensor:
    n = value.shape[-1]
    if n == 1:
        return value[..., 0, 0]
    total = torch.zeros_like(value[..., 0, 0])
    for column in range(n):
        rest = torch.cat([value[..., 1:, :column], value[..., 1:, column + 1 :]], -1)
        total = total + (-1) ** column * value[..., 0, column] * _cofactors(rest)
    return total


OPERATORS: dict[str, Callable[..., Any]] = {"Det": _det, "Einsum": _einsum, "Gemm": _gemm, "MatMul": _matmul}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
