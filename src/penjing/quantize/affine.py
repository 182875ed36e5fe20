"""Linear quantization, pure maths on tensors.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.
"""

from __future__ import annotations

import torch

from penjing.errors import RecipeError
from penjing.plan import QuantSpec

SMALLEST_SCALE = 1e-12  # of a range that is zero everywhere: any scale is right, and this one divides safely


def scale_and_zero_point(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point whose integers cover low..high.

    Args:
        low: (channels,) or (1,), smallest values. 0 is always made representable.
        high: Same shape, largest values.
        spec: Bits, signedness, symmetry.

    Returns:
        scale float32 and zero_point int32, both in the shape of `low`.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    smallest, largest = spec.limits
    if spec.symmetric and spec.signed:
        scale = (torch.maximum(-low, high) / largest).clamp(min=SMALLEST_SCALE)
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (largest - smallest)).clamp(min=SMALLEST_SCALE)
    zero_point = torch.round(smallest - low / scale).clamp(smallest, largest)
    return scale.float(), zero_point.to(torch.int32)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Round x to its grid: ``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``.

    Args:
        x: Any shape.
        scale: Broadcastable to x.
        zero_point: Broadcastable to x.
        low: Smallest integer.
        high: Largest integer.
    """
    return (torch.clamp(torch.round(x / scale) + zero_point, low, high) - zero_point) * scale


def weight_range(weight: torch.Tensor, spec: QuantSpec, steps: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of a weight per channel of `spec.axis`, or of the whole.

    Args:
        weight: (out, in, …) or with the channels on `spec.axis`.
        spec: ``spec.range`` is "minmax", or "mse": the shrunk range with the smallest squared error of the
            rounded weight (Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1).
        steps: How many shrunk ranges are tried, from the whole range down to half of it at 8 bits.

    Returns:
        low, high, each (channels,) or (1,).

    Raises:
        RecipeError: There is no such estimator for weights.
    """
    if spec.range not in ("minmax", "mse"):
        raise RecipeError("there is no such range estimator for weights", got=spec.range, expected="minmax or mse")
    rows = weight.detach().reshape(1, -1) if spec.axis is None else weight.detach().movedim(spec.axis, 0).flatten(1)
    low, high = rows.amin(1), rows.amax(1)
    if spec.range == "minmax":
        return low, high
    # Fewer bits gain from a harder cut: the smallest ratio tried falls from 0.5 at 8 bits to 0.1 at 2.
    smallest = {8: 0.5, 7: 0.5, 6: 0.4, 5: 0.3, 4: 0.2}.get(spec.bits, 0.1)
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for ratio in torch.linspace(1, smallest, steps).tolist():
        scale, zero = scale_and_zero_point(low * ratio, high * ratio, spec)
        error = (fake_quantize(rows, scale[:, None], zero[:, None], *spec.limits) - rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * ratio, best_low)
        best_high = torch.where(better, high * ratio, best_high)
    return best_low, best_high
