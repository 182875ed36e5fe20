"""Adaptive rounding by coordinate descent: weights are rounded up or down to preserve the layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020. The paper's local objective
(equation 13), ‖W·x − Ŵ·x̂‖² over the calibration data with the inputs x̂ from the quantized layers before, is a quadratic
form in Ŵ. It is minimized here on the integers themselves, by coordinate descent, instead of by gradient descent on a
relaxation: no learning rate, no penalty, and one pass over the data for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from penjing.analyze import lockstep
from penjing.analyze.gram import Gram, columns_of, patches
from penjing.numerics.grid import broadcast, integers, levels
from penjing.quantize.every_output import without_losses
from penjing.quantize.repair import repaired
from penjing.steps.draft import Draft
from penjing.steps.plan import Entry, QuantSpec
from penjing.steps.settings import at_least, check, whole
from penjing.steps.step import Context

POSITIONS = 256  # output positions of a sample that are used at most
GROUPED_POSITIONS = (64, 4)  # the same in groups of few columns: so many, and so many for every column, if that is more
BLOCK = 32  # columns whose updates are applied to the others together
PIECES = 8  # minimal number of chunks of samples, so that a quarter of them can be held out
SETTLED = 1e-3  # stop after a sweep that changes a smaller fraction of the weights


@dataclass(frozen=True, kw_only=True)
class CoordinateRounding:
    """Choose the rounding of every quantized weight, layer by layer, each on the outputs of the rounded layers before.

    Biases are corrected on the way (see `BiasCorrection`). Where an output of several loses by it, some layers
    keep their weights (see `penjing.quantize.every_output`).

    Attributes:
        samples: Calibration samples, held in memory together.
        damping: Regularization towards the original weight, as a fraction of the mean power of the inputs.
        sweeps: At most this many sweeps over all weights of a layer.
    """

    stage: ClassVar[str] = "repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    samples: int = 64
    damping: float = 0.01
    sweeps: int = 8

    def __post_init__(self) -> None:
        check(self, samples=whole(), damping=at_least(0), sweeps=whole())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with weights on their grids, biases corrected."""
        if not draft.plan:
            return draft
        rounded = repaired(draft, context, self.samples, "CoordinateRounding", self._weight, PIECES)
        return without_losses(draft, rounded, context, lockstep.countable(draft.network))

    def _weight(self, layer: lockstep.Layer) -> torch.Tensor | None:
        return layer.weight if layer.entry is None else self._chosen(layer, layer.entry)

    def _chosen(self, layer: lockstep.Layer, entry: Entry) -> torch.Tensor | None:
        """The adaptive rounding, or the nearest where that is better on held-out samples.

        A layer with many inputs and few samples can overfit; the last quarter of the samples is held out to detect it.
        """
        count = len(layer.inputs)
        fitted = layer.part(0, count - count // 4) if count > 3 else layer
        moments = covariances(fitted)
        if moments is None:
            return None
        adaptive = self._rounded(layer, entry, *moments)
        if fitted is layer:
            return adaptive
        unseen = layer.part(count - count // 4, count)
        return adaptive if unseen.noise(adaptive) < unseen.noise(layer.weight) else layer.weight

    def _rounded(self, layer: lockstep.Layer, entry: Entry, own: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        """The weight on its grid; shapes of `own` and `cross` as `covariances` returns them."""
        given = layer.module.weight.detach()
        scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
        steps, origin = broadcast(scale, given, entry.spec), broadcast(zero, given, entry.spec)
        start = integers(given, scale, zero, entry.spec) - origin
        exact = given / steps
        lowest, highest = _beside(exact, start, origin, entry.spec)
        groups = own.shape[0]

        def matrix(x: torch.Tensor) -> torch.Tensor:
            return x.expand_as(given).reshape(groups, given.shape[0] // groups, -1)

        q = descend(
            matrix(start), matrix(exact), matrix(steps), matrix(lowest), matrix(highest), own, cross,
            damping=self.damping, sweeps=self.sweeps,
        )  # fmt: skip
        return q.reshape(given.shape) * steps


def _beside(
    exact: torch.Tensor, start: torch.Tensor, origin: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of the grid below and above, in the shape of `exact`; `start` is one of them.

    Up or down only: with more freedom a layer overfits the calibration samples.
    """
    if spec.grid == "uniform":
        low, high = spec.limits
        below, above = torch.maximum(torch.floor(exact), low - origin), torch.minimum(torch.ceil(exact), high - origin)
    else:
        allowed = levels(spec)
        place = (exact + origin).contiguous()
        below = allowed[(torch.searchsorted(allowed, place, right=True) - 1).clamp(min=0)] - origin
        above = allowed[torch.searchsorted(allowed, place).clamp(max=len(allowed) - 1)] - origin
    return torch.minimum(below, start).expand_as(exact), torch.maximum(above, start).expand_as(exact)


def covariances(layer: lockstep.Layer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Covariances of a layer's input patches: the replica's own, and the source's with the replica's.

    Returns:
        own = E[x̂ x̂ᵀ] and cross = E[x x̂ᵀ], both centred, each (groups, columns, columns), where a column is one
        weight of an output channel; None for layers without such a form (three-dimensional convolutions) and for those
        that no sample reaches.
    """
    module = layer.module
    if isinstance(module, nn.Conv3d) or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    groups, columns = columns_of(module)
    gram = Gram(columns, groups=groups, others=columns, means=True, dtype=torch.float32)
    fewest, a_column = GROUPED_POSITIONS
    positions = POSITIONS if groups == 1 else min(POSITIONS, max(fewest, a_column * columns))
    weights = layer.row_weights()
    for i, (source, replica) in enumerate(zip(layer.inputs, layer.replica_inputs, strict=True)):
        # Rows selected by values may be none, or others in the quantized replica.
        if source.shape == replica.shape and source.numel():
            x, y = (patches(module, each, positions=positions) for each in (replica, source))
            gram.add(x, y, None if weights is None else patches(module, weights[i][..., None], positions=positions))
    return gram.covariances() if gram.count else None


def descend(
    q: torch.Tensor, exact: torch.Tensor, steps: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor,
    own: torch.Tensor, cross: torch.Tensor, *, damping: float, sweeps: int,
) -> torch.Tensor:  # fmt: skip
    """Integers that minimize tr(Ŵ·A·Ŵᵀ) − 2·tr(W·C·Ŵᵀ) + λ·‖Ŵ − W‖², one coordinate at a time, to a local minimum.

    Args:
        q: (groups, out, columns) integers to start from, as floats; Ŵ = q · steps.
        exact: Same shape, W / steps.
        steps: Same shape.
        lowest: Same shape, the smallest integer allowed.
        highest: Same shape, the largest; where they are more than 1 apart, none between them is.
        own: A, (groups, columns, columns).
        cross: C, same shape.
        damping: λ as a fraction of the mean of A's diagonal.
        sweeps: At most this many sweeps over all columns.

    Returns:
        (groups, out, columns) integers as floats.
    """
    columns = q.shape[2]
    diagonal = own.diagonal(dim1=1, dim2=2)
    ridge = damping * diagonal.mean(1) + 1e-12
    own = own + ridge[:, None, None] * torch.eye(columns)
    given = exact * steps
    linear = given @ cross + ridge[:, None, None] * given
    gradient = ((q * steps) @ own - linear).permute(2, 0, 1).contiguous()  # a column's numbers lie together
    product = own.permute(1, 2, 0).contiguous()  # (columns, columns, groups)

    def by_column(x: torch.Tensor) -> np.ndarray:
        return x.permute(2, 0, 1).contiguous().numpy()

    # The inner loop is thousands of operations on a few hundred numbers each, where NumPy's calls cost least.
    place, step, least, most = (by_column(x) for x in (q, steps, lowest, highest))
    apart = bool((most - least > 1).any())  # a grid that leaves integers out
    rate = 1 / (product.diagonal().T.numpy()[:, :, None] * step)
    for _ in range(sweeps):
        moved = 0
        for first in range(0, columns, BLOCK):
            last = min(first + BLOCK, columns)
            here = gradient[first:last].numpy().copy()
            inside = product[first:last, first:last].numpy()[..., None]
            change = np.empty_like(here)
            for j in range(last - first):
                column = first + j
                best = place[column] - here[j] * rate[column]
                if apart:
                    best = np.where(2 * best < least[column] + most[column], least[column], most[column])
                else:
                    np.rint(best, out=best)
                    np.clip(best, least[column], most[column], out=best)
                np.multiply(best - place[column], step[column], out=change[j])
                place[column] = best
                here[j + 1 :] += inside[j, j + 1 :] * change[j]
            moved += int(np.count_nonzero(change))
            gradient += (own[:, :, first:last] @ torch.from_numpy(change).transpose(0, 1)).transpose(0, 1)
        if moved <= SETTLED * q.numel():
            break
    return torch.from_numpy(place).permute(1, 2, 0).contiguous()
