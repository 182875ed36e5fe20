"""Weights become zeros one column after another, and the columns that follow make up for the error.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, which makes
the update of Hassibi et al., "Optimal Brain Surgeon", 1993, fast. With H = X·Xᵀ of a layer's inputs, removing w_j costs
w_j² / [H⁻¹]_jj of the output's error, if the weights after j move by −w_j·[H⁻¹]_j: / [H⁻¹]_jj.

Layers are pruned in the order of execution, each on the inputs that its pruned predecessors leave.
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
    '"unstructured" or "N:M"; Magnitude and Wanda know blocks',
)


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """Set weights of linear layers and convolutions to zero, and let those that stay compensate on calibration data.

    Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

    It reaches convolutions in one and two dimensions and linear layers that are called once and share no weights;
    others stay whole, and the event "covered" tells how many. Zeros that are there already stay.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of a layer's weights (of a grouped convolution: of every group's) that becomes zero;
            None is what the pattern "N:M" says, else one half.
        pattern: "unstructured" or "N:M" (for example "2:4").
        block: Columns among which weights are compared, and whose updates the later ones get together.
        damping: Added to the diagonal of H, as a fraction of its mean.
        layers: Layers, or parts of the network, that take part; empty takes all.
        keep: Layers, or parts of the network, that stay as they are.
        samples: Calibration samples to look at, held in memory together.
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
            PruningError: It reaches no layer.
        """
        network = draft.copy().network.eval()
        wanted = prunable(network, self.layers, self.keep)
        reached = [n for n in lockstep.countable(network) if n in wanted and not isinstance(wanted[n], nn.Conv3d)]
        if not reached:
            raise PruningError(
                "SparseGPT reaches no layer of this network",
                got=f"{len(wanted)} layers that are three-dimensional, transposed, or called more than once",
                expected="a linear layer, or a convolution in one or two dimensions",
                remedy="prune.Wanda also uses calibration data, and reaches them",
            )
        found: dict[str, torch.Tensor] = {}

        def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
            if layer.site not in reached:
                return None
            found[layer.site] = self._pruned(layer.module, layer.replica_inputs)
            context.events("progress", label="SparseGPT", done=len(found), total=len(reached))
            return layer.twin_outputs(found[layer.site])

        lockstep.run(network, Plan(), _calls(context, self.samples), watch)
        context.events("covered", step="SparseGPT", layers=len(reached), total=len(wanted))
        return with_zeros(draft, context, "SparseGPT", found)

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
    """Zeros in `weight`, column after column; the columns after it make up for what goes.

    Of the first k columns of a group, where a block ends with the k-th, ⌊sparsity · rows · k⌋ weights go.

    Args:
        weight: (groups, rows, columns), float64; what is zero stays zero.
        hessian: X·Xᵀ of each group, (groups, columns, columns), float64.
        sparsity: The fraction that goes where the pattern is unstructured.
        pattern: Free, or N of every M neighbours among `width` columns.
        width: Columns come in runs of so many neighbours: the input channels at one position of a kernel.
        block: Columns whose zeros are chosen together.
        damping: Added to the diagonal, as a fraction of its mean.
    """
    weight, given = weight.clone(), weight == 0
    factor = _factor(hessian, damping)
    removed = 0
    for first, last in _blocks(weight.shape[2], block, width, pattern.of):
        here, inside = weight[:, :, first:last].clone(), factor[:, first:last, first:last]
        pivots = inside.diagonal(dim1=1, dim2=2)
        zero, errors = given[:, :, first:last].clone(), torch.zeros_like(here)
        if pattern.unstructured:
            count = removed_count(sparsity, weight.shape[1] * last) - removed
            removed += count
            zero |= _cheapest(here, pivots, zero, count)
        for j in range(last - first):
            position = (first + j) % width
            if pattern.of and position % pattern.of == 0 and position + pattern.of <= width:
                group = slice(j, j + pattern.of)
                zero[:, :, group] |= _of_neighbours(here[:, :, group], pivots[:, group], zero[:, :, group], pattern)
            wanted = torch.where(zero[:, :, j], 0.0, here[:, :, j])
            error = (here[:, :, j] - wanted) / pivots[:, None, j]
            here[:, :, j + 1 :] -= error[:, :, None] * inside[:, None, j, j + 1 :]
            weight[:, :, first + j], errors[:, :, j] = wanted, error
        weight[:, :, last:] -= errors @ factor[:, first:last, last:]
    return weight


def _factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U with UᵀU = H⁻¹, upper triangular: row j holds what removing column j does to those after it."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, damping * mean, 1.0)  # a group whose inputs are all zero prefers nothing
    damped = hessian + ridge[:, None, None] * torch.eye(hessian.shape[1], dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _blocks(columns: int, block: int, width: int, neighbours: int) -> Iterator[tuple[int, int]]:
    """First and last of columns that are handled together; no group of neighbours is cut in two."""
    first = 0
    while first < columns:
        last = min(first + block, columns)
        position = last % width
        if neighbours and position < width - width % neighbours:
            last = min(last + -position % neighbours, columns)
        yield first, last
        first = last


def _cheapest(weight: torch.Tensor, pivots: torch.Tensor, zero: torch.Tensor, count: int) -> torch.Tensor:
    """True at `count` of each group's weights (groups, rows, columns) that cost least, zeros before all others."""
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
    found: list[Call] = []
    left = samples
    for call in calibration_calls(context.task):
        size = next(len(t) for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim())
        for first in range(0, min(size, left), CHUNK):
            last = min(first + CHUNK, size, left)
            found.append(pytree.tree_map_only(torch.Tensor, _Cut(size, first, last), call))
        left -= size
        if left <= 0:
            break
    return found


@dataclass(frozen=True)
class _Cut:
    """Samples first..last of every tensor that has the batch on axis 0."""

    size: int
    first: int
    last: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first : self.last] if x.dim() and len(x) == self.size else x


__all__ = ["SparseGPT", "prune_columns"]
