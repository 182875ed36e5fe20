"""Straight-through gradients: the gradient passes through rounding, and is 0 for clipped values.

Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013. For scales: Esser et al.,
"Learned Step Size Quantization", ICLR 2020; Choi et al., "PACT", 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from penjing.numerics.grid import broadcast, on_grid, rows
from penjing.steps.plan import QuantSpec


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is: bfloat16 is too coarse for the values of an 8-bit grid."""
    return x if x.dtype == torch.float64 else x.float()


class Grid(torch.autograd.Function):
    """`on_grid` with straight-through gradients, and the gradient of its scale (LSQ, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec, method: str
    ) -> torch.Tensor:
        """x of any shape, scale and zero_point (scales,); see `grid.integers`."""
        y = on_grid(wide(x), scale.detach(), zero_point, spec)
        ctx.save_for_backward(x, scale, zero_point, y)
        ctx.spec, ctx.method = spec, method
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and scale."""
        (gradient,) = gradients
        method = ctx.method if ctx.needs_input_grad[1] else ""
        x, scale, zero_point, y = ctx.saved_tensors
        return *_of_x_and_scale(gradient, x, scale, zero_point, y, ctx.spec, method), None, None, None


class Listed(torch.autograd.Function):
    """`Grid` of a few integers, which have gradients too: Han et al., "Deep Compression", ICLR 2016.

    In the paper the gradient of an entry is the sum of its weights' gradients. Here it is the step of all weights,
    projected on what the entry can move, Σ g·r / Σ r² with r the weight that the integer `high` stands for: weights
    that share an entry move by the mean of their gradients, so that the learning rates of plain training fit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, entries: torch.Tensor, zero_point: torch.Tensor,
        spec: QuantSpec, method: str,
    ) -> torch.Tensor:  # fmt: skip
        """x of any shape, scale and zero_point (scales,), entries (entries,) in units of the largest integer."""
        integers, order = listed(entries.detach(), spec).sort()
        steps, zero = broadcast(scale.detach(), x, spec), broadcast(zero_point, x, spec)
        places = torch.bucketize((wide(x) / steps + zero).contiguous(), (integers[1:] + integers[:-1]) / 2)
        y = (integers[places] - zero) * steps
        ctx.save_for_backward(x, scale, zero_point, y, order[places])
        ctx.spec, ctx.method, ctx.count = spec, method, len(entries)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, scale and entries."""
        (gradient,) = gradients
        x, scale, zero_point, y, places = ctx.saved_tensors
        method = ctx.method if ctx.needs_input_grad[1] else ""
        of_x, of_scale = _of_x_and_scale(gradient, x, scale, zero_point, y, ctx.spec, method)
        if not ctx.needs_input_grad[2]:
            return of_x, of_scale, None, None, None, None
        reach = (broadcast(scale, x, ctx.spec) * ctx.spec.limits[1]).expand_as(gradient)
        flat = places.reshape(-1)
        sums = torch.bincount(flat, (gradient * reach).reshape(-1).double(), minlength=ctx.count)
        of_entries = sums / torch.bincount(flat, reach.square().reshape(-1).double(), minlength=ctx.count).clamp(1e-30)
        return of_x, of_scale, of_entries.float(), None, None, None


def listed(entries: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The integers of entries that are in units of the largest integer, (entries,)."""
    low, high = spec.limits
    return (entries * high).round().clamp(low, high)


def _of_x_and_scale(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, y: torch.Tensor,
    spec: QuantSpec, method: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Gradients of x and of scale, for a rounded y; without a method none of scale."""
    low, high = spec.limits
    if scale.numel() == 1:
        step, zero = float(scale), int(zero_point)
        # Values that round to an integer of the grid pass; one kernel does the comparison and the product.
        of_x = torch.ops.aten.hardtanh_backward(
            gradient, wide(x), (low - zero - 0.5) * step, (high - zero + 0.5) * step
        )
    else:
        steps, zeros = broadcast(scale, x, spec), broadcast(zero_point, x, spec)
        inside = (x >= (low - zeros - 0.5) * steps) & (x <= (high - zeros + 0.5) * steps)
        of_x = torch.where(inside, gradient, 0.0)
    if not method:
        return of_x.to(x.dtype), None
    if method == "pact":  # only values clipped at the upper end have a gradient
        top = (high - broadcast(zero_point, x, spec)) * broadcast(scale, x, spec)
        of_scale = rows(torch.where(x > top, gradient, 0.0), spec).sum(1) * (high - zero_point)
    else:
        # Inside, the gradient is (x̂ − x) / s, outside x̂ / s: two inner products.
        of_scale = (_inner(gradient, y, spec) - _inner(of_x, wide(x), spec)) / scale
    count = x.numel() / scale.numel() / (x.shape[0] if spec.axis is None else 1)
    steps_up = len(spec.values) / 2 if spec.values else high
    # Entries of a codebook are several integers apart: its scale moves as the distance of two entries would.
    of_scale = of_scale.reshape(scale.shape) * (steps_up / high) ** 2
    return of_x.to(x.dtype), of_scale / math.sqrt(max(1.0, count * steps_up))


def _inner(a: torch.Tensor, b: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Σ a·b over the values of each scale, (scales,)."""
    if spec.axis is not None:
        return rows(a * b, spec).sum(1)
    by_memory = sorted(range(a.dim()), key=a.stride, reverse=True)  # contiguous in channels-last format, too
    return torch.dot(a.permute(by_memory).reshape(-1), b.permute(by_memory).reshape(-1)).reshape(1)
