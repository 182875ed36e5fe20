"""Singular value decomposition of a linear layer, or of a convolution seen as one matrix: two layers with r between.

Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation", NeurIPS 2014; with
the inputs' second moments: Wang et al., "SVD-LLM", ICLR 2025. In the inputs' basis the truncated decomposition has the
smallest possible error of the outputs.
"""

from __future__ import annotations

import numpy as np
import torch

from penjing.decompose.moments import Basis


def energies(weight: torch.Tensor, basis: Basis) -> np.ndarray:
    """The fraction of the outputs' energy that is left at every rank, (ranks + 1,), from 0 at rank 0 to 1.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
    """
    matrix = basis.into(weight).flatten(1)
    squares = torch.linalg.eigvalsh(_smaller(matrix)).flip(0).clamp(min=0)
    sums = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return np.asarray(sums / sums[-1].clamp(min=1e-300))


def _smaller(matrix: torch.Tensor) -> torch.Tensor:
    """The products of its rows, or of its columns where they are fewer: much less work than the matrix itself."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def factors(weight: torch.Tensor, basis: Basis, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the two layers.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
        rank: r.

    Returns:
        (r, in, …) and (out, r, 1, …), or (out, r) of a linear layer.
    """
    matrix = basis.into(weight).flatten(1)
    vectors = torch.linalg.eigh(_smaller(matrix)).eigenvectors.flip(1)[:, :rank]  # of the largest singular values
    ones = [1] * (weight.dim() - 2)
    if matrix.shape[0] <= matrix.shape[1]:  # outputs projected on `rank` directions: the basis goes in and out again
        return (vectors.T @ weight.flatten(1)).reshape(rank, *weight.shape[1:]), vectors.reshape(-1, rank, *ones)
    first = basis.back(vectors.T.reshape(rank, *weight.shape[1:]))
    return first, (matrix @ vectors).reshape(-1, rank, *ones)


__all__ = ["energies", "factors"]
