"""Quantization grids: the meaning of a `QuantSpec`, on tensors.

Uniform: Jacob et al., CVPR 2018. Groups: Shen et al., "Q-BERT", AAAI 2020. Powers of two: Zhou et al., "Incremental
Network Quantization", ICLR 2017. Sums of powers of two: Li et al., "Additive Powers-of-Two Quantization", ICLR 2020.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from penjing.steps.plan import LISTED, QuantSpec, magnitudes


def rows(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Reshape `x` to one row per scale: (scales, values), a view or a copy.

    Args:
        x: (…, channels, …) with the channels on `spec.axis`; any shape for a single scale.
        spec: Its axis and group.
    """
    if spec.axis is None:
        return x.reshape(1, -1)
    by_channel = x.movedim(spec.axis, 0)
    flat = by_channel.reshape(by_channel.shape[0], -1)
    return flat if spec.group is None else flat.reshape(-1, spec.group)


def broadcast(values: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Reshape scales or zero points (scales,) to broadcast over `x`.

    With groups, every element is repeated for the values of its group.
    """
    if values.numel() == 1 and spec.group is None:
        return values.reshape(())
    if spec.axis is None:
        return values.reshape(-1)
    if spec.group is None:
        shape = [1] * x.dim()
        shape[spec.axis] = -1
        return values.reshape(shape)
    moved = x.movedim(spec.axis, 0).shape
    return values.repeat_interleave(spec.group).reshape(moved).movedim(0, spec.axis)


def integers(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Quantize: q = clamp(round(x / scale) + zero_point, low, high), in the dtype of x; ties to even.

    On a grid that is not uniform, q is the nearest of its integers.

    Args:
        x: Any shape, floating point.
        scale: (scales,), float32, above 0; see `rows` for how many.
        zero_point: Same shape, int32.
        spec: Limits, axis, group, grid.
    """
    scale, zero = broadcast(scale, x, spec), broadcast(zero_point, x, spec)
    low, high = spec.limits
    if spec.grid == "uniform":
        return torch.div(x, scale).round_().add_(zero).clamp_(low, high)
    allowed = levels(spec).to(x.device, x.dtype)
    places = torch.bucketize(torch.div(x, scale).add_(zero).contiguous(), (allowed[1:] + allowed[:-1]) / 2)
    return allowed[places]


def on_grid(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Fake-quantize: (q − zero_point) · scale of `integers`, bit-identical to a runtime's dequantized values."""
    if spec.grid == "uniform":
        # (q − z)·s without q: one buffer, and integers below 2**24 are exact in float32.
        step, zero = broadcast(scale, x, spec), broadcast(zero_point, x, spec)
        low, high = spec.limits
        return torch.div(x, step).round_().clamp_(low - zero, high - zero).mul_(step)
    q = integers(x, scale, zero_point, spec)
    return q.sub_(broadcast(zero_point, x, spec)).mul_(broadcast(scale, x, spec))


def measured(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute scales and zero points (scales,) from the range of `x` itself, as DynamicQuantizeLinear does."""
    values = rows(x, spec)
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    smallest, largest = spec.limits
    if spec.symmetric and spec.signed:
        scale = torch.maximum(-low, high) / largest
        return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale, dtype=torch.int32)
    scale = (high - low) / (largest - smallest)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round((smallest - low / scale).clamp(smallest, largest)).to(torch.int32)


def levels(spec: QuantSpec) -> torch.Tensor:
    """Return the integers of the grid of `spec`, ascending, float32."""
    low, high = spec.limits
    if spec.grid == "uniform":
        return torch.arange(low, high + 1, dtype=torch.float32)
    if spec.grid == LISTED:
        return torch.tensor(spec.values, dtype=torch.float32)
    return torch.tensor(_nonuniform(spec.grid, spec.bits, spec.signed), dtype=torch.float32)


@lru_cache
def _nonuniform(grid: str, bits: int, signed: bool) -> tuple[int, ...]:
    positive = magnitudes(grid, bits - signed)
    return tuple(sorted({*positive, *(-m for m in positive)} if signed else positive))
