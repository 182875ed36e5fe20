"""Differences by output, and by columns of similar magnitude: no column's noise hides behind another's signal.

A detector gives boxes in pixels beside scores below 1. Taken together, the noise that drowns the scores is nothing
beside the boxes; so the columns of an output are sorted by the size of the reference's values, and compared apart
where a gap parts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.errors import ArtifactError
from penjing.measure.decibels import decibels

Array = npt.NDArray[Any]
GAP = 10.0
"""Columns are parted where the next smaller one is smaller by more than this."""
NEGLIGIBLE = 1e-6
"""Columns below this part of the largest one are not an answer, but rounding errors of float32 beside the others."""
MASK = 1e4
"""A value that stands several times and is larger than all others by more than this fills what is masked."""


@dataclass(frozen=True)
class Columns:
    """Part of an output: positions of one axis, or all of it.

    Attributes:
        port: Number of the output.
        axis: The axis, 1 or the last; 0 for the whole output.
        positions: Those that belong together.
        words: What they are called; "" for the whole output.
        smaller: Whether other columns of the same output are larger.
    """

    port: int
    axis: int = 0
    positions: tuple[int, ...] = ()
    words: str = ""
    smaller: bool = False

    def of(self, outputs: Sequence[Array]) -> Array:
        """The values, of any shape."""
        whole = outputs[self.port]
        return np.take(whole, self.positions, self.axis) if self.axis else whole


@dataclass(frozen=True)
class Difference:
    """How a candidate's values differ from the reference's; sums over all finite values."""

    columns: Columns
    signal: float
    noise: float
    values: int
    largest: float
    equal: float | None  # share of equal values where they are not floating-point numbers
    fault: str
    batch: int = 0

    @property
    def snr_db(self) -> float:
        """Signal power over noise power in decibels; as low as can be where there is a fault."""
        return decibels(0.0, 1.0) if self.fault else decibels(self.signal, self.noise)


def split(outputs: Sequence[Array]) -> tuple[Columns, ...]:
    """The parts to compare: every output, split into groups of columns where their magnitudes differ widely.

    Args:
        outputs: Of the network that others are compared with, samples first.
    """
    columns: list[Columns] = []
    for port, array in enumerate(outputs):
        columns.append(Columns(port))
        if not is_float(array):
            continue
        axes = {1: "axis 1", array.ndim - 1: "the last axis"} if array.ndim > 1 else {}
        groups = [(gap, axis, parts) for axis in axes for gap, parts in [_groups(_sizes(array, axis))] if parts]
        if groups:
            _, axis, parts = max(groups, key=lambda group: group[0])
            columns += [
                Columns(port, axis, tuple(part), f"{ranges(part)} of {axes[axis]}", bool(i))
                for i, part in enumerate(parts)
            ]
    return tuple(columns)


def differences(
    reference: Sequence[Array], candidate: Sequence[Array], parts: Sequence[Columns], batch: int = 0
) -> tuple[Difference, ...]:
    """The difference of every part; columns that an output of another size does not have are left out.

    Args:
        reference: Outputs of the torch network, one array per output.
        candidate: Outputs of the artifact for the same call.
        parts: As `split` made them of any call's outputs.
        batch: Samples of the call, to be told.

    Raises:
        ArtifactError: Another number of outputs, or another shape.
    """
    check_shapes(reference, candidate)
    compared = []
    for part in parts:
        whole = reference[part.port]
        if part.axis and (whole.ndim <= part.axis or whole.shape[part.axis] <= max(part.positions)):
            continue
        compared.append(replace(_difference(part.of(reference), part.of(candidate), part), batch=batch))
    return tuple(compared)


SCATTER = 4.0
"""A call of few samples may have so many times the noise of many: that is chance, beyond it is the batch size."""


def worst(many: Sequence[Difference], few: Sequence[Difference]) -> tuple[Difference, ...]:
    """Part by part the worse of two calls, the signal taken as strong in the call of few samples as in the other.

    Where values are equal or not, few of them tell nothing.

    Args:
        many: Of a call of many samples, or of several.
        few: Of a call of few.
    """
    by_part = {d.columns: d for d in few}
    return tuple(_worse(d, by_part[d.columns]) if d.columns in by_part else d for d in many)


def _worse(many: Difference, few: Difference) -> Difference:
    if few.fault or many.fault or few.equal is not None or not few.values or not many.values:
        return few if few.fault and not many.fault else many
    if few.noise / few.values <= SCATTER * many.noise / many.values:
        return many
    return replace(few, signal=many.signal * few.values / many.values)


def check_shapes(reference: Sequence[Array], candidate: Sequence[Array], where: str = "") -> None:
    """Raise ArtifactError where the candidate has another number of outputs, or another shape."""
    if len(reference) != len(candidate):
        raise ArtifactError(
            "the artifact has a different number of outputs from the network",
            code="outputs",
            got=f"{len(candidate)} outputs",
            expected=f"{len(reference)}",
        )
    for port, (r, c) in enumerate(zip(reference, candidate, strict=True)):
        if r.shape != c.shape:
            raise ArtifactError(
                f"output {port} of the artifact has a different shape from the network's",
                code="shape",
                got=f"{c.shape}{where}",
                expected=f"{r.shape}",
            )


def fault(reference: Array, candidate: Array) -> str:
    """What is NaN or infinite on one side alone, in words; "" where both hold the same infinities, and no NaN."""
    if not (is_float(reference) or is_float(candidate)):
        return ""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    told = []
    for count, text in (
        (int(np.isnan(r).sum()), "NaN, as in the torch network that it is compared with"),
        (int((np.isnan(c) & ~np.isnan(r)).sum()), "NaN"),
        (int((np.isinf(c) & ~np.isnan(r) & (c != r)).sum()), "infinite, where the torch network's are finite"),
        (int((np.isinf(r) & np.isfinite(c)).sum()), "finite, where the torch network's are infinite"),
    ):
        if count:
            told.append(f"{count} of {r.size} values {'is' if count == 1 else 'are'} {text}")
    return "; ".join(told)


def is_float(array: Array) -> bool:
    """Whether the values are floating-point numbers."""
    # bfloat16 and the 8-bit floats of ml_dtypes have kind "V" in NumPy.
    return array.dtype.kind in "fV"


def ranges(positions: Sequence[int], most: int = 6) -> str:
    """Positions in words.

    >>> ranges([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    runs: list[list[int]] = []
    for position in sorted(positions):
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def _difference(reference: Array, candidate: Array, part: Columns) -> Difference:
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    told = fault(reference, candidate)
    counted = np.isfinite(r) & np.isfinite(c)
    if is_float(reference) and (filled := _filled(r, counted)) is not None:
        largest = math.sqrt(float(np.square(r[counted & ~filled]).mean()))
        lost = int((counted & filled & ~((np.sign(c) == np.sign(r)) & (np.abs(c) > MASK / 10 * largest))).sum())
        if lost:
            text = f"{lost} masked values are not masked: the network fills in {r[filled][0]:.3g}"
            told = f"{told}; {text}" if told else text
        counted &= ~filled  # what stands beside them is what counts
    r, c = r[counted], c[counted]
    apart = np.abs(r - c)
    return Difference(
        columns=part,
        signal=float(np.square(r).sum()),
        noise=float(np.square(apart).sum()),
        values=apart.size,
        largest=float(apart.max(initial=0.0)),
        equal=None if is_float(reference) else float((reference == candidate).mean()) if reference.size else 1.0,
        fault=told,
    )


def _filled(values: Array, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """Where a number stands that fills what is masked; None where there is none."""
    finite = values[counted]
    if not finite.size:
        return None
    filled: npt.NDArray[np.bool_] = values == finite[np.abs(finite).argmax()]
    rest = values[counted & ~filled]
    if filled.sum() < 2 or not rest.any():
        return None
    size = math.sqrt(float(np.square(rest).mean()))
    return filled if np.abs(finite).max() > MASK * size else None


def _sizes(array: Array, axis: int) -> Array:
    """Root mean square of every column, (columns,): of its values that are finite and fill no mask."""
    x = array.astype(np.float64)
    counted = np.isfinite(x)
    if (filled := _filled(x, counted)) is not None:
        counted &= ~filled
    others = tuple(a for a in range(x.ndim) if a != axis)
    power = np.where(counted, np.square(np.where(counted, x, 0.0)), 0.0).sum(axis=others)
    return np.asarray(np.sqrt(power / np.maximum(counted.sum(axis=others), 1)))


def _groups(sizes: Array) -> tuple[float, list[list[int]]]:
    """The largest gap and the positions between the gaps, the largest first; no groups where there is no gap."""
    if not sizes.size or not sizes.max() > 0:
        return 0.0, []
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] > NEGLIGIBLE * sizes.max()]
    ratios = [float(sizes[a] / sizes[b]) for a, b in zip(order, order[1:], strict=False)]
    groups: list[list[int]] = [[order[0]]]
    for ratio, position in zip(ratios, order[1:], strict=True):
        if ratio > GAP:
            groups.append([])
        groups[-1].append(position)
    return max(ratios, default=0.0), groups if len(groups) > 1 else []
