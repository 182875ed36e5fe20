"""Weights as whole numbers of steps, where a number that takes fewer bits is worth some error.

Rate-distortion quantization with a dead zone: Wiedemann et al., "DeepCABAC: A Universal Compression Algorithm for Deep
Neural Networks", IEEE Journal of Selected Topics in Signal Processing, 2020. Columns that follow compensate for the
error of one: Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

import torch

BEYOND = 20.0  # bits of a number that was not seen before
BLOCK = 128


def factor(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Upper triangular U with UᵀU = H⁻¹: row j has the update of the columns behind j, (groups, columns, columns).

    Args:
        hessian: Of each group, (groups, columns, columns), float64.
        damping: Added to the diagonal, as a fraction of its mean.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # Where all inputs of a group are zero or constant, every weight counts the same.
    ridge = torch.where(diagonal.mean(1) > 0, damping * diagonal.mean(1), 1.0)
    damped = hessian + ridge[:, None, None] * torch.eye(hessian.shape[1], dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def bits_of(numbers: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The smallest number, and from it on the bits of each at the frequencies of `numbers`, (n,)."""
    low = int(numbers.min())
    counts = torch.bincount((numbers - low).flatten().long()).double()
    share = (counts + 0.01) / (counts.sum() + 0.01 * len(counts))
    return low, -share.log2()


def quantized(weight: torch.Tensor, upper: torch.Tensor, step: float, slope: float, most: int) -> torch.Tensor:
    """Whole numbers of steps for a layer's weights, (groups, rows, columns).

    Args:
        weight: (groups, rows, columns), float64.
        upper: `factor` of the layer's inputs.
        step: Of all weights.
        slope: What a bit is worth, in squared steps at a weight of mean importance; 0 rounds to the nearest.
        most: Largest magnitude of a number.
    """
    weight = weight.clone()
    numbers = torch.zeros_like(weight)
    low, bits = bits_of((weight / step).round().clamp(-most, most))
    importance = upper.diagonal(dim1=1, dim2=2).square().reciprocal()  # (groups, columns)
    importance = importance / importance.mean().clamp(min=1e-30)
    for first in range(0, weight.shape[2], BLOCK):
        last = min(first + BLOCK, weight.shape[2])
        here, inside = weight[:, :, first:last].clone(), upper[:, first:last, first:last]
        errors = torch.zeros_like(here)
        for j in range(last - first):
            exact = (here[:, :, j] / step).clamp(-most, most)
            nearest = exact.round()
            if slope:
                nearest = _cheapest(exact, nearest, importance[:, first + j, None], low, bits, slope)
            numbers[:, :, first + j] = nearest
            error = (here[:, :, j] - nearest * step) / inside[:, None, j, j]
            here[:, :, j + 1 :] -= error[:, :, None] * inside[:, None, j, j + 1 :]
            errors[:, :, j] = error
        weight[:, :, last:] -= errors @ upper[:, first:last, last:]
    return numbers + 0.0  # no zero is negative


def _cheapest(
    exact: torch.Tensor, nearest: torch.Tensor, importance: torch.Tensor, low: int, bits: torch.Tensor, slope: float
) -> torch.Tensor:
    """Of the nearest number, its neighbour towards zero and zero, that with the least error and bits."""
    options = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])
    places = (options - low).long()
    seen = (places >= 0) & (places < len(bits))
    rate = torch.where(seen, bits[places.clamp(0, len(bits) - 1)], BEYOND)
    costs = (options - exact).square() * importance + slope * rate
    return options.gather(0, costs.argmin(0, keepdim=True))[0]
