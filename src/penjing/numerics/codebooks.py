"""Codebooks: k-means on values, and grids that are placed by a scale; pure maths on tensors.

Weighted k-means in one dimension: MacQueen, 1967; started linearly as in Han et al., "Deep Compression", ICLR 2016, and
from the exact solution on bins by dynamic programming (Wang & Song, "Ckmeans.1d.dp", The R Journal 2011); the better of
the two is taken.

Grids: powers of two: Zhou et al., "Incremental Network Quantization", ICLR 2017; sums of powers of two: Li et al.,
"Additive Powers-of-Two Quantization", ICLR 2020; piecewise, with smaller steps in the middle than in the tails: Fang et
al., "Post-Training Piecewise Linear Quantization for Deep Neural Networks", ECCV 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penjing.steps.plan import magnitudes

BINS = 1024  # of the exact solution: its cost is entries · bins²
ITERATIONS = 200  # of Lloyd's algorithm, which usually stands still much earlier
GRIDS = ("uniform", "powers_of_two", "additive_powers_of_two", "piecewise")
SCALES = 80  # that are tried up to the largest magnitude
_NOTHING = 1e-30  # weight of a bin without values


def kmeans(values: torch.Tensor, weights: torch.Tensor | None, entries: int) -> torch.Tensor:
    """The entries that minimize Σ w·(v − nearest entry)².

    Args:
        values: (n,), finite.
        weights: (n,), at least 0; None weights all values alike. Where all are 0, all count alike.
        entries: At least 1; fewer are returned where there are fewer distinct values.

    Returns:
        (entries,), ascending, in the dtype of the values.

    >>> kmeans(torch.tensor([0.0, 0.1, 5.0, 5.1]), None, 2)
    tensor([0.0500, 5.0500])
    """
    line = _Line.of(values.detach().double(), None if weights is None else weights.detach().double())
    if len(line.places) <= entries:
        return line.places.to(values.dtype)
    low, high = float(line.places[0]), float(line.places[-1])
    linear = torch.linspace(low, high, entries, dtype=torch.float64)
    starts = [lloyd(line, start) for start in (linear, _optimal(line, entries))]
    best = min(starts, key=line.error)
    merged: torch.Tensor = torch.unique(best.to(values.dtype))
    return merged


class _Line:
    """Distinct values in ascending order, with prefix sums of their weights."""

    def __init__(self, places: torch.Tensor, weights: torch.Tensor) -> None:
        self.places = places
        moments = torch.stack([weights, weights * places, weights * places.square()])
        self.sums = torch.nn.functional.pad(moments.cumsum(1), (1, 0))  # (3, n + 1)

    @classmethod
    def of(cls, values: torch.Tensor, weights: torch.Tensor | None) -> _Line:
        if weights is None or not weights.any():
            places, counts = torch.unique(values, return_counts=True)
            return cls(places, counts.double())
        places, inverse = torch.unique(values, return_inverse=True)
        # A value of weight 0 would have no place: a little of the mean weight gives it one.
        sums = torch.zeros_like(places).index_add_(0, inverse, weights + 1e-6 * weights.mean())
        return cls(places, sums)

    def parts(self, entries: torch.Tensor) -> torch.Tensor:
        """The sums over the values that are nearest to each entry, (3, entries)."""
        edges = torch.searchsorted(self.places, (entries[1:] + entries[:-1]) / 2)
        ends = torch.nn.functional.pad(edges, (1, 1))
        ends[-1] = len(self.places)
        return self.sums[:, ends].diff(dim=1)

    def error(self, entries: torch.Tensor) -> float:
        """Σ w·(v − nearest entry)²."""
        weight, first, second = self.parts(entries)
        return float((second - 2 * entries * first + entries.square() * weight).sum())


def lloyd(line: _Line, entries: torch.Tensor) -> torch.Tensor:
    """Lloyd's algorithm; on sorted values each step is a search of the edges and a difference of prefix sums.

    An entry without values moves into the part with the largest error.
    """
    for _ in range(ITERATIONS):
        weight, first, second = line.parts(entries)
        means = torch.where(weight > 0, first / weight.clamp(min=_NOTHING), entries)
        empty = (weight <= 0).nonzero().reshape(-1)
        if len(empty):
            spread = second - means * first
            largest = spread.topk(min(len(empty), int((weight > 0).sum()))).indices
            widths = (spread[largest].clamp(min=0) / weight[largest].clamp(min=_NOTHING)).sqrt()
            means[empty[: len(largest)]] = means[largest] + widths
        means = means.sort().values
        if torch.equal(means, entries):
            break
        entries = means
    return entries


def _optimal(line: _Line, entries: int) -> torch.Tensor:
    """The exact solution for values that are first put into `BINS` bins of about the same number of distinct values."""
    count = min(BINS, len(line.places))
    edges = torch.linspace(0, len(line.places), count + 1, dtype=torch.float64).round().long()
    weight, first, second = line.sums[:, edges]
    # cost[i, j]: the error of one entry for the bins i to j.
    part = weight[None, 1:] - weight[:-1, None]
    mean = first[None, 1:] - first[:-1, None]
    cost = second[None, 1:] - second[:-1, None] - mean.square() / part.clamp(min=_NOTHING)
    cost = cost.clamp(min=0).masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    best, chosen = cost[0], []
    for _ in range(entries - 1):
        # best[j]: of the bins 0 to j; the last part starts at i, and what is before ends at i − 1.
        before = torch.nn.functional.pad(best[:-1], (1, 0), value=torch.inf)
        best, start = (before[:, None] + cost).min(0)
        chosen.append(start)
    bounds, j = [count], count - 1
    for start in reversed(chosen):
        bounds.append(int(start[j]))
        j = bounds[-1] - 1
    bounds.append(0)
    ends = torch.tensor(sorted(set(bounds)))
    means: torch.Tensor = first[ends].diff() / weight[ends].diff().clamp(min=_NOTHING)
    return means


def placed(values: torch.Tensor, weights: torch.Tensor | None, grid: str, bits: int) -> torch.Tensor:
    """The entries of a grid whose scale (and whose breakpoint) minimize Σ w·(v − nearest entry)²; they are symmetric.

    Args:
        values: (n,), finite.
        weights: (n,), at least 0; None weights all values alike.
        grid: One of `GRIDS`.
        bits: 2 to 6, with the sign. One of the entries is 0.

    Returns:
        (entries,), ascending, in the dtype of the values; at most 2 to the power of `bits`.

    >>> placed(torch.tensor([-4.0, -1.0, 0.5, 2.0]), None, "powers_of_two", 4).tolist()
    [-4.0, -2.0, -1.0, -0.5, -0.25, -0.125, -0.0625, 0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0]
    """
    line = _Line.of(values.detach().double(), None if weights is None else weights.detach().double())
    largest = float(line.places.abs().max())
    shapes = _shapes(grid, bits)
    candidates = (shape * (largest * step / SCALES) for shape in shapes for step in range(SCALES // 4, SCALES + 1))
    return min(candidates, key=line.error).to(values.dtype)


def _shapes(grid: str, bits: int) -> list[torch.Tensor]:
    """The entries of a grid for a largest magnitude of 1; of a piecewise grid for several breakpoints."""
    half = 1 << (bits - 1)
    if grid == "piecewise":
        positive = []
        for part in range(2, 12):
            inner = torch.linspace(0, part / 16, half - half // 2 + 1, dtype=torch.float64)
            outer = torch.linspace(part / 16, 1, half // 2, dtype=torch.float64)
            positive.append(torch.unique(torch.cat([inner[:-1], outer])))
    elif grid == "uniform":
        positive = [torch.linspace(0, 1, half, dtype=torch.float64)]
    else:
        whole = torch.tensor(magnitudes(grid, bits - 1), dtype=torch.float64)
        positive = [whole / whole[-1]]
    return [torch.unique(torch.cat([-p, p])) + 0.0 for p in positive]  # the sum of -0 and 0 is 0


def nearest(values: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The index of the nearest entry for every value, int64; ties go to the smaller entry.

    Args:
        values: Any shape.
        entries: (entries,), ascending.
    """
    return torch.bucketize(values.contiguous(), ((entries[1:].double() + entries[:-1].double()) / 2).to(values.dtype))


@dataclass(frozen=True)
class Table:
    """A codebook and its indices.

    Attributes:
        entries: (entries, dimension), float32.
        indices: (rows, vectors of a row), the index of every vector among all entries.
        starts: (rows,), the first entry of each row's codebook; None with one codebook.
    """

    entries: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class LookedUp:
    """A tensor as values of a codebook, or as the sum of such values.

    Attributes:
        tables: One, or several that are added up.
        shape: Of the tensor.
        transposed: Where it is stored, it is so transposed.
    """

    tables: tuple[Table, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The tensor."""
        first, *others = (table.entries[table.indices].reshape(self.shape) for table in self.tables)
        for other in others:
            first = first + other
        return first


__all__ = ["GRIDS", "LookedUp", "Table", "kmeans", "nearest", "placed"]
