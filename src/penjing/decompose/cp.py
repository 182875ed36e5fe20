"""CP decomposition of a convolution: a sum of r products of vectors, as depthwise convolutions along each axis.

Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015. The
decomposition is tensorly's, by alternating least squares, in the basis of the layer's input channels.
"""

from __future__ import annotations

import numpy as np
import torch

from penjing.decompose.moments import Basis
from penjing.decompose.tensors import tensorly

ITERATIONS, TOLERANCE, RIDGE = 40, 1e-5, 1e-6


def factors(weight: torch.Tensor, basis: Basis, rank: int) -> tuple[tuple[torch.Tensor, ...], float]:
    """The weights of the layers, and the part of the outputs' energy that they keep.

    Args:
        weight: (out, in, *kernel), float64.
        basis: Of its inputs.
        rank: r.

    Returns:
        (r, in, 1, …), for every axis whose kernel is longer than 1 (r, 1, …, k, …), and (out, r, 1, …); the energy from
        0 to 1, with the positions of the kernel taken for independent.

    Raises:
        MissingDependency: tensorly is not installed.
    """
    turned = basis.into(weight, taps=False)
    power = float(turned.square().sum())
    with tensorly() as decomposition:
        scale, vectors = decomposition.parafac(
            turned.numpy(),
            rank,
            n_iter_max=ITERATIONS,
            tol=TOLERANCE,
            l2_reg=RIDGE * max(power, 1e-300) / max(weight.numel(), 1),
            normalize_factors=True,
            random_state=0,  # of the columns beyond the rank of a mode
        )
    out, inputs, *along = (torch.from_numpy(np.ascontiguousarray(v)) for v in vectors)
    # Shared evenly, so that no layer's outputs are larger by orders of magnitude.
    root = torch.from_numpy(np.ascontiguousarray(scale)).clamp(min=0).sqrt()
    out, inputs = out * root, inputs * root
    approximation = torch.einsum("or,ir,tr->oit", out, inputs, _products(along)).reshape(weight.shape)
    error = float((turned - approximation).square().sum())
    ones = [1] * (weight.dim() - 2)
    for vector in along:
        inputs = inputs * vector[0] if len(vector) == 1 else inputs
    first = basis.back(inputs.T, taps=False).reshape(rank, -1, *ones)
    axes = [
        vector.T.reshape(rank, 1, *(len(vector) if i == axis else 1 for i in range(len(along))))
        for axis, vector in enumerate(along)
        if len(vector) > 1
    ]
    return (first, *axes, out.reshape(-1, rank, *ones)), 1 - error / max(power, 1e-300)


def _products(along: list[torch.Tensor]) -> torch.Tensor:
    """(taps, r) from one (length, r) an axis."""
    product = along[0]
    for vector in along[1:]:
        product = (product[:, None] * vector[None]).flatten(0, 1)
    return product


__all__ = ["factors"]
