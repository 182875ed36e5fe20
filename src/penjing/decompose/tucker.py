"""Tucker-2 decomposition of a convolution: fewer input channels, a small convolution, and back to all outputs.

Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", ICLR 2016.
The decomposition is tensorly's (Kossaifi et al., JMLR 20, 2019), by higher-order orthogonal iteration, in the basis of
the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from penjing.decompose.moments import Basis
from penjing.decompose.tensors import tensorly

ITERATIONS, TOLERANCE = 10, 1e-4


def energies(weight: torch.Tensor, basis: Basis) -> np.ndarray:
    """The fraction of the outputs' energy that is left at ranks (r_in, r_out), (in + 1, out + 1), from 0 to 1.

    It is that of the truncated higher-order singular value decomposition, which iterating improves a little.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
    """
    turned = basis.into(weight).flatten(2)
    out, inputs = (_directions(turned.movedim(axis, 0).flatten(1)) for axis in (0, 1))
    core = torch.einsum("oit,or,is->srt", turned, out, inputs).square().sum(2)
    rows, columns = core.shape  # a mode has at most as many components as the other two together
    sums = np.zeros((weight.shape[1] + 1, weight.shape[0] + 1))
    sums[1 : rows + 1, 1 : columns + 1] = core.cumsum(0).cumsum(1)
    sums[rows + 1 :] = sums[rows]
    sums[:, columns + 1 :] = sums[:, columns, None]
    return np.asarray(sums / max(sums[-1, -1], 1e-300))


def _directions(matrix: torch.Tensor) -> torch.Tensor:
    """Its left singular vectors, those of the largest values first; as many as its smaller side."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    largest: torch.Tensor = vectors.flip(1)[:, : min(matrix.shape)]
    return largest


def factors(weight: torch.Tensor, basis: Basis, ranks: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The weights of the layers; a factor of full rank is left out, as it would change nothing.

    Args:
        weight: (out, in, …), float64.
        basis: Of its inputs.
        ranks: r_in, r_out.

    Returns:
        (r_in, in, 1, …), (r_out, r_in, …) and (out, r_out, 1, …); the last one has orthonormal columns.

    Raises:
        MissingDependency: tensorly is not installed.
    """
    reduced, core = ranks
    used = {mode: rank for mode, rank in ((0, core), (1, reduced)) if rank < weight.shape[mode]}
    turned = basis.into(weight).flatten(2)
    with tensorly() as decomposition:
        (middle, directions), _ = decomposition.partial_tucker(
            turned.numpy(),
            rank=list(used.values()),
            modes=list(used),
            n_iter_max=ITERATIONS,
            tol=TOLERANCE,
            random_state=0,  # of directions without energy
        )
    by_mode = {mode: torch.from_numpy(np.ascontiguousarray(d)) for mode, d in zip(used, directions, strict=True)}
    small = torch.from_numpy(np.ascontiguousarray(middle))
    small = small if basis.taps_inverse is None else small @ basis.taps_inverse
    if 1 not in used:
        small = basis.back(small, taps=False)
    ones = [1] * (weight.dim() - 2)
    parts = [small.reshape(*small.shape[:2], *weight.shape[2:])]
    if 1 in used:
        parts.insert(0, basis.back(by_mode[1].T, taps=False).reshape(reduced, -1, *ones))
    if 0 in used:
        parts.append(by_mode[0].reshape(-1, core, *ones))
    return tuple(parts)


__all__ = ["energies", "factors"]
