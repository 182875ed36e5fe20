"""Vectors of neighbouring weights, and a number for the bits of each."""

from __future__ import annotations

import torch


def as_vectors(weight: torch.Tensor, dimension: int) -> torch.Tensor:
    """Neighbouring values together, (vectors, dimension); −0 as 0."""
    return weight.reshape(-1, dimension) + 0.0


def pattern(vectors: torch.Tensor) -> torch.Tensor:
    """A number for the bits of every vector, (vectors,), int64: of one value in its order, of several a hash."""
    bits = vectors.float().contiguous().view(torch.int32).long()
    key = bits[:, 0] ^ ((bits[:, 0] >> 31) & 0x7FFFFFFF)
    for column in range(1, bits.shape[1]):
        key = (key ^ (key >> 29)) * -7046029254386353131 + bits[:, column]
    return key
