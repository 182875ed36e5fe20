"""Singular value decomposition of a linear layer, or of a convolution seen as one matrix: two layers with r between.

Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation", NeurIPS 2014; with
the inputs' second moments: Wang et al., "SVD-LLM", ICLR 2025. In the inputs' basis the truncated decomposition has the
smallest possible error of the outputs.
"""

from __future__ import annotations

import numpy as np
import torch

from penjing.decompose.moments import Basis


def kept(weight: torch.Tensor, basis: Basis) -> np.ndarray:
    """The part of the outputs' energy that every rank keeps, (ranks + 1,), from 0 at rank 0 to 1.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
    """
    squares = torch.linalg.svdvals(basis.into(weight).flatten(1)).square()
    sums = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return np.asarray(sums / sums[-1].clamp(min=1e-300))


def factors(weight: torch.Tensor, basis: Basis, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the two layers.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
        rank: r.

    Returns:
        (r, in, …) and (out, r, 1, …), or (out, r) of a linear layer.
    """
    u, s, vt = torch.linalg.svd(basis.into(weight).flatten(1), full_matrices=False)
    first = basis.back((s[:rank, None] * vt[:rank]).reshape(rank, *weight.shape[1:]))
    return first, u[:, :rank].reshape(len(u), rank, *[1] * (weight.dim() - 2))


__all__ = ["factors", "kept"]
