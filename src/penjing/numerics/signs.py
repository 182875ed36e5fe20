"""Weights of two or three levels: maths on tensors.

Two: Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV 2016. Three:
Li et al., "Ternary Weight Networks", 2016.
"""

from __future__ import annotations

import torch

THRESHOLD = 0.7  # Li et al., equation 6: of the mean magnitude


def binary(weights: torch.Tensor) -> torch.Tensor:
    """α·sign(w) with α the mean magnitude of every output, (outputs, …); a weight of 0 counts as positive."""
    rows = weights.flatten(1)
    scale = rows.abs().mean(1, keepdim=True)
    return torch.where(rows >= 0, scale, -scale).reshape(weights.shape)


def ternary(weights: torch.Tensor, threshold: float = THRESHOLD) -> torch.Tensor:
    """α, 0 or −α for every output, (outputs, …): 0 within `threshold` times the mean magnitude, α the mean outside."""
    rows = weights.flatten(1)
    outside = rows.abs() > threshold * rows.abs().mean(1, keepdim=True)
    scale = (rows.abs() * outside).sum(1, keepdim=True) / outside.sum(1, keepdim=True).clamp(min=1)
    return (torch.where(rows >= 0, scale, -scale) * outside).reshape(weights.shape)


def in_bytes(weights: torch.Tensor) -> torch.Tensor:
    """Whole multiples, −127 to 127, of a step for every output, (outputs, …): of its largest magnitude / 127."""
    rows = weights.flatten(1)
    step = rows.abs().amax(1, keepdim=True) / 127
    return (torch.where(step > 0, rows / step, 0.0).round() * step).reshape(weights.shape)


def signs(x: torch.Tensor) -> torch.Tensor:
    """1 where x ≥ 0, else −1, in the type of x."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class Signs(torch.autograd.Function):
    """`signs` whose gradient is that of a parabola within ±1, and 0 outside.

    Clipped straight-through gradients: Hubara et al., "Binarized Neural Networks", NeurIPS 2016; the parabola: Liu et
    al., "Bi-Real Net", ECCV 2018, equation 4.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        """x of any shape."""
        ctx.save_for_backward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x: torch.Tensor = gradients[0] * (2 - 2 * x.abs()).clamp(min=0)
        return of_x


class Levels(torch.autograd.Function):
    """`binary` or `ternary` of weights, whose gradients pass to the weights as they are."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weights: torch.Tensor, threshold: float) -> torch.Tensor:
        """Weights (outputs, …); a threshold of 0 is two levels."""
        return ternary(weights, threshold) if threshold else binary(weights)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the weights."""
        return gradients[0], None


__all__ = ["THRESHOLD", "Levels", "Signs", "binary", "in_bytes", "signs", "ternary"]
