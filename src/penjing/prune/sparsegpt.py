"""SparseGPT: weights are pruned column by column, and the columns that follow compensate for the error.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, a fast form of
the update of Hassibi et al., "Optimal Brain Surgeon", 1993. With H = X·Xᵀ of a layer's inputs, removing w_j adds
w_j² / [H⁻¹]_jj to the squared output error if the weights after j are updated by −w_j·[H⁻¹]_j: / [H⁻¹]_jj.

Layers are pruned in execution order, each on the outputs of the pruned layers before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing.analyze import gram, lockstep
from penjing.errors import PruningError
from penjing.prune.masks import Pattern, fraction, removed_count, smallest
from penjing.prune.weights import prunable, with_zeros
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.settings import NAMES, Rule, above, check, whole
from penjing.steps.step import Context
from penjing.tasks.task import Call, calibration_calls

CHUNK = 16  # samples that run through the network together
NOT_BLOCKS = Rule(
    lambda text: (read := Pattern.parse(text)).unstructured or bool(read.of),
    '"unstructured" or "N:M"; Magnitude and Wanda also prune blocks',
)


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """Set weights of linear layers and convolutions to zero, and update the remaining ones on calibration data.

    Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

    It prunes linear layers and one- and two-dimensional convolutions that are called once and share no weights. Other
    layers are not pruned, and the event "covered" reports how many are. Weights that are zero already stay zero.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of a layer's weights (of each group's in a grouped convolution) that becomes zero; None
            follows from the pattern "N:M", else one half.
        pattern: "unstructured" or "N:M" (for example "2:4").
        block: Columns whose weights are compared with one another, and whose updates reach the later columns together.
        damping: Added to the diagonal of H, as a fraction of its mean.
        layers: Layers, or parts of the network, that are pruned; empty prunes all.
        keep: Layers, or parts of the network, that are not pruned.
        samples: Calibration samples, held in memory together.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sparsity: float | None = None
    pattern: str = "unstructured"
    block: int = 128
    damping: float = 0.01
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    samples: int = 64

    def __post_init__(self) -> None:
        fraction(self.sparsity, self.pattern)
        check(self, pattern=NOT_BLOCKS, block=whole(), damping=above(0), layers=NAMES, keep=NAMES, samples=whole())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with zeros.

        Raises:
            PruningError: The network has no layer that it can prune.
        """
        network = draft.copy().network.eval()
        candidates = prunable(network, self.layers, self.keep)
        reached = [
            n for n in lockstep.countable(network) if n in candidates and not isinstance(candidates[n], nn.Conv3d)
        ]
        if not reached:
            raise PruningError(
                "SparseGPT can't prune any layer of this network",
                code="nothing-to-prune",
                got=f"{len(candidates)} layers that are three-dimensional, transposed, or called more than once",
                expected="a linear layer, or a convolution in one or two dimensions",
                remedy="prune.Wanda also uses calibration data, and prunes these layers too",
            )
        weights: dict[str, torch.Tensor] = {}

        def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
            if layer.site not in reached:
                return None
            weights[layer.site] = self._pruned(layer.module, layer.replica_inputs)
            context.events("progress", label="SparseGPT", done=len(weights), total=len(reached))
            return layer.replica_outputs(weights[layer.site])

        lockstep.run(network, Plan(), _calls(context, self.samples), watch)
        context.events("covered", step="SparseGPT", layers=len(reached), total=len(candidates))
        return with_zeros(draft, context, "SparseGPT", weights)

    def _pruned(self, module: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A layer's weight with zeros, in its own layout."""
        given = module.weight.detach()
        groups = getattr(module, "groups", 1)
        width = given.shape[1]
        columns = _by_tap(given.reshape(groups, given.shape[0] // groups, width, -1))
        done = prune_columns(
            columns.double(),
            gram.of_inputs(module, inputs, by_tap=True).own,
            fraction(self.sparsity, self.pattern),
            Pattern.parse(self.pattern),
            width=width,
            block=self.block,
            damping=self.damping,
        )
        back = done.reshape(groups, given.shape[0] // groups, -1, width).transpose(2, 3)
        return back.reshape(given.shape).to(given.dtype)


def prune_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    pattern: Pattern,
    *,
    width: int,
    block: int = 128,
    damping: float = 0.01,
) -> torch.Tensor:
    """Prune `weight` column by column; the later columns compensate for each one.

    Where a block ends with the k-th column, ⌊sparsity · rows · k⌋ of a group's weights up to there have been removed.

    Args:
        weight: (groups, rows, columns), float64; zeros stay zero.
        hessian: X·Xᵀ of each group, (groups, columns, columns), float64.
        sparsity: The fraction that is removed where the pattern is unstructured.
        pattern: Unstructured, or N of every M neighbours among `width` columns.
        width: Length of a run of neighbouring columns: the input channels at one position of a kernel.
        block: Columns whose zeros are chosen together.
        damping: Added to the diagonal, as a fraction of its mean.
    """
    weight, zero_before = weight.clone(), weight == 0
    factor = _factor(hessian, damping)
    removed = 0
    for first, last in _blocks(weight.shape[2], block, width, pattern.of):
        here, inside = weight[:, :, first:last].clone(), factor[:, first:last, first:last]
        pivots = inside.diagonal(dim1=1, dim2=2)
        zero, errors = zero_before[:, :, first:last].clone(), torch.zeros_like(here)
        if pattern.unstructured:
            count = removed_count(sparsity, weight.shape[1] * last) - removed
            removed += count
            zero |= _cheapest(here, pivots, zero, count)
        for j in range(last - first):
            position = (first + j) % width
            if pattern.of and position % pattern.of == 0 and position + pattern.of <= width:
                group = slice(j, j + pattern.of)
                zero[:, :, group] |= _of_neighbours(here[:, :, group], pivots[:, group], zero[:, :, group], pattern)
            pruned = torch.where(zero[:, :, j], 0.0, here[:, :, j])
            error = (here[:, :, j] - pruned) / pivots[:, None, j]
            here[:, :, j + 1 :] -= error[:, :, None] * inside[:, None, j, j + 1 :]
            weight[:, :, first + j], errors[:, :, j] = pruned, error
        weight[:, :, last:] -= errors @ factor[:, first:last, last:]
    return weight


def _factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with UᵀU = H⁻¹: row j has the update of the later columns when column j is pruned."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, damping * mean, 1.0)  # a group whose inputs are all zero: every weight costs the same
    damped = hessian + ridge[:, None, None] * torch.eye(hessian.shape[1], dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _blocks(columns: int, block: int, width: int, neighbours: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of columns; no N:M group of neighbours is cut in two."""
    first = 0
    while first < columns:
        last = min(first + block, columns)
        position = last % width
        if neighbours and position < width - width % neighbours:
            last = min(last + -position % neighbours, columns)
        yield first, last
        first = last


def _cheapest(weight: torch.Tensor, pivots: torch.Tensor, zero: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` weights of each group (groups, rows, columns) that cost least, existing zeros first."""
    costs = (weight / pivots[:, None]).square().masked_fill(zero, -1.0)
    return smallest(costs.reshape(len(costs), -1), count).reshape(costs.shape)


def _of_neighbours(weight: torch.Tensor, pivots: torch.Tensor, zero: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    costs = (weight / pivots[:, None]).square().masked_fill(zero, -1.0)
    return smallest(costs.reshape(-1, pattern.of), pattern.of - pattern.kept).reshape(costs.shape)


def _by_tap(x: torch.Tensor) -> torch.Tensor:
    """(groups, rows, channels, taps) as (groups, rows, taps · channels): channels of one position are neighbours."""
    return x.transpose(2, 3).reshape(x.shape[0], x.shape[1], -1)


def _calls(context: Context, samples: int) -> list[Call]:
    """The first calibration samples in chunks of `CHUNK`."""
    calls: list[Call] = []
    left = samples
    for call in calibration_calls(context.task):
        size = next(len(t) for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim())
        for first in range(0, min(size, left), CHUNK):
            last = min(first + CHUNK, size, left)
            calls.append(pytree.tree_map_only(torch.Tensor, _Cut(size, first, last), call))
        left -= size
        if left <= 0:
            break
    return calls


@dataclass(frozen=True)
class _Cut:
    """A slice of the samples of every tensor that has the batch on axis 0."""

    size: int
    first: int
    last: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first : self.last] if x.dim() and len(x) == self.size else x


__all__ = ["SparseGPT", "prune_columns"]
