"""Affine quantization: pure functions on tensors.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from penjing.errors import RecipeError
from penjing.numerics.grid import on_grid, rows
from penjing.steps.plan import QuantSpec

SMALLEST_SCALE = 1e-12  # for a range that is zero everywhere: any scale is correct, and this one is safe to divide by
_LARGEST_HALF = 65504.0


def scale_and_zero_point(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the scale and zero point whose integers cover low..high.

    Args:
        low: (channels,) or (1,), smallest values. The range is extended to contain 0.
        high: Same shape, largest values.
        spec: Bits, signedness, symmetry.

    Returns:
        scale float32 and zero_point int32, both in the shape of `low`.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    smallest, largest = spec.limits
    if spec.symmetric and spec.signed:
        scale = representable(torch.maximum(low / smallest, high / largest), spec)
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32)
    scale = representable((high - low) / (largest - smallest), spec)
    zero_point = torch.round(smallest - low / scale).clamp(smallest, largest)
    return scale.float(), zero_point.to(torch.int32)


def representable(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the scale itself, or the next larger power of two or float16 if the spec asks for one."""
    scale = scale.clamp(min=SMALLEST_SCALE)
    if spec.scale == "power_of_two":
        return torch.exp2(torch.ceil(torch.log2(scale) - 1e-6))
    if spec.scale == "half":
        nearest = scale.clamp(max=_LARGEST_HALF).to(torch.float16)
        larger = (nearest.view(torch.int16) + 1).view(torch.float16)  # of positive numbers the next
        return torch.where(nearest.to(scale.dtype) < scale, larger, nearest).to(scale.dtype)
    return scale


def weight_range(weight: torch.Tensor, spec: QuantSpec, steps: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the range of a weight per channel (`spec.axis`), per group of a channel, or per tensor.

    Args:
        weight: (out, in, …) or with the channels on `spec.axis`; one range for every row of `grid.rows`.
        spec: ``spec.range`` is "minmax", or "mse": the shrunk range with the smallest squared error of the
            rounded weight (Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1).
        steps: Number of shrunk ranges that are tried, from the full range down to half of it at 8 bits.

    Returns:
        low, high, each (scales,).

    Raises:
        RecipeError: `spec.range` is not an estimator for weights.
    """
    if spec.range not in ("minmax", "mse"):
        raise RecipeError(
            "this is not a range estimator for weights", code="estimator", got=spec.range, expected="minmax or mse"
        )
    values = rows(weight.detach(), spec)
    low, high = values.amin(1), values.amax(1)
    if spec.range == "minmax":
        return low, high
    # Fewer bits gain from clipping more: the smallest ratio tried falls from 0.5 at 8 bits to 0.1 at 2.
    smallest = {8: 0.5, 7: 0.5, 6: 0.4, 5: 0.3, 4: 0.2}.get(spec.bits, 0.1)
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    one_row_a_scale = replace(spec, axis=0, group=None)
    for ratio in torch.linspace(1, smallest, steps).tolist():
        scale, zero = scale_and_zero_point(low * ratio, high * ratio, spec)
        error = on_grid(values, scale, zero, one_row_a_scale).sub_(values).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * ratio, best_low)
        best_high = torch.where(better, high * ratio, best_high)
    return best_low, best_high


def centred_where_cheap(spec: QuantSpec, ends: tuple[float, float], limit: float) -> QuantSpec:
    """Return the format without a zero point if that coarsens the grid of a range by at most `limit` dB.

    >>> centred_where_cheap(QuantSpec(signed=False, symmetric=False), (-3.0, 3.2), 1.0).symmetric
    True
    >>> centred_where_cheap(QuantSpec(signed=False, symmetric=False), (-0.3, 6.0), 1.0).symmetric
    False
    """
    low, high = ends[0], max(ends[1], 0.0)
    if spec.symmetric or low >= 0 or (spec.bits, spec.grid, spec.scale) != (8, "uniform", "free"):
        return spec
    if 20 * math.log10(2 * max(-low, high) / (high - low)) > limit:
        return spec
    return replace(spec, symmetric=True, signed=True, narrow=False)
