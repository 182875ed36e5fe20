"""Differences per output, and per group of columns of similar magnitude, so that large values do not mask small ones.

A detector returns boxes in pixels and scores below 1 in one output. Over the whole output, noise that makes the scores
useless is negligible relative to the boxes. Therefore the columns of an output are sorted by the RMS of the reference's
values, and compared separately where these differ by more than `GAP`.
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
"""Two groups of columns are separated where the RMS drops by more than this factor."""
NEGLIGIBLE = 1e-6
"""Columns whose RMS is below this fraction of the largest are float32 rounding errors, and are not compared."""
MASK = 1e4
"""A value that occurs several times and exceeds the RMS of all others by more than this factor is a mask's fill."""


@dataclass(frozen=True)
class Columns:
    """Part of an output: a group of positions along one axis, or the whole output.

    Attributes:
        port: Index of the output.
        axis: The axis, 1 or the last; 0 for the whole output.
        positions: Indices of the group along the axis.
        words: Description of the group, as "0-3 of axis 1"; "" for the whole output.
        smaller: Whether another group of the same output has larger values.
    """

    port: int
    axis: int = 0
    positions: tuple[int, ...] = ()
    words: str = ""
    smaller: bool = False

    def of(self, outputs: Sequence[Array]) -> Array:
        """The part's values; along `axis` only the positions remain."""
        whole = outputs[self.port]
        return np.take(whole, self.positions, self.axis) if self.axis else whole


@dataclass(frozen=True)
class Difference:
    """How a candidate's values differ from the reference's, over the values that are finite on both sides.

    Attributes:
        columns: The part of the output.
        signal: Sum of the squares of the reference's values.
        noise: Sum of the squares of the differences.
        values: Number of values compared.
        largest: Largest absolute difference.
        equal: Share of equal values; None for floating-point outputs.
        fault: NaN, infinities or unmasked values of one side only, in words; "" if there are none.
        batch: Number of samples of the call.
    """

    columns: Columns
    signal: float
    noise: float
    values: int
    largest: float
    equal: float | None
    fault: str
    batch: int = 0

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in decibels; -`IDENTICAL_DB` where there is a fault."""
        return decibels(0.0, 1.0) if self.fault else decibels(self.signal, self.noise)


def split(outputs: Sequence[Array]) -> tuple[Columns, ...]:
    """The parts to compare: every output as a whole, and groups of its columns where their magnitudes differ widely.

    Args:
        outputs: Outputs of the reference network, one array per output, samples on axis 0.
    """
    columns: list[Columns] = []
    for port, array in enumerate(outputs):
        columns.append(Columns(port))
        if not is_float(array):
            continue
        axes = {1: "axis 1", array.ndim - 1: "the last axis"} if array.ndim > 1 else {}
        groups = [(gap, axis, parts) for axis in axes for gap, parts in [_groups(_column_rms(array, axis))] if parts]
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
    """The difference of every part; parts whose positions a smaller output does not have are omitted.

    Args:
        reference: Outputs of the torch network, one array per output.
        candidate: Outputs of the artifact for the same call.
        parts: Result of `split` for the outputs of any call.
        batch: Number of samples of the call, copied into the result.

    Raises:
        ArtifactError: The numbers of outputs or their shapes differ.
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
"""Ratio of noise per value up to which a call of few samples differs from one of many only by chance."""


def worst(many: Sequence[Difference], few: Sequence[Difference]) -> tuple[Difference, ...]:
    """The worse of two calls, part by part, as an artifact may fail at one batch size only.

    The signal power per value is taken from the call of many samples. Integer and boolean outputs are judged by that
    call alone.

    Args:
        many: Differences of a call with many samples.
        few: Differences of a call with few samples.
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
    """Raise ArtifactError if the numbers of outputs or their shapes differ; `where` is appended to the shape."""
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
    """NaN and infinities that differ between the two, in words; "" if without NaN and with equal infinities."""
    if not (is_float(reference) or is_float(candidate)):
        return ""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    faults = []
    for count, text in (
        (int(np.isnan(r).sum()), "NaN, as in the torch network that it is compared with"),
        (int((np.isnan(c) & ~np.isnan(r)).sum()), "NaN"),
        (int((np.isinf(c) & ~np.isnan(r) & (c != r)).sum()), "infinite, where the torch network's are finite"),
        (int((np.isinf(r) & np.isfinite(c)).sum()), "finite, where the torch network's are infinite"),
    ):
        if count:
            faults.append(f"{count} of {r.size} values {'is' if count == 1 else 'are'} {text}")
    return "; ".join(faults)


def is_float(array: Array) -> bool:
    """Whether the values are floating-point numbers."""
    # bfloat16 and the 8-bit floats of ml_dtypes have kind "V" in NumPy.
    return array.dtype.kind in "fV"


def ranges(positions: Sequence[int], most: int = 6) -> str:
    """Positions as ranges, the first `most` of them.

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
    faults = fault(reference, candidate)
    counted = np.isfinite(r) & np.isfinite(c)
    if is_float(reference) and (filled := _mask_fill(r, counted)) is not None:
        largest = math.sqrt(float(np.square(r[counted & ~filled]).mean()))
        lost = int((counted & filled & ~((np.sign(c) == np.sign(r)) & (np.abs(c) > MASK / 10 * largest))).sum())
        if lost:
            text = f"{lost} masked values are not masked: the network fills in {r[filled][0]:.3g}"
            faults = f"{faults}; {text}" if faults else text
        counted &= ~filled  # only the other values are compared
    r, c = r[counted], c[counted]
    error = np.abs(r - c)
    return Difference(
        columns=part,
        signal=float(np.square(r).sum()),
        noise=float(np.square(error).sum()),
        values=error.size,
        largest=float(error.max(initial=0.0)),
        equal=None if is_float(reference) else float((reference == candidate).mean()) if reference.size else 1.0,
        fault=faults,
    )


def _mask_fill(values: Array, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """Which values, of the same shape, are a mask's fill (see `MASK`); None without a fill value."""
    finite = values[counted]
    if not finite.size:
        return None
    filled: npt.NDArray[np.bool_] = values == finite[np.abs(finite).argmax()]
    rest = values[counted & ~filled]
    if filled.sum() < 2 or not rest.any():
        return None
    size = math.sqrt(float(np.square(rest).mean()))
    return filled if np.abs(finite).max() > MASK * size else None


def _column_rms(array: Array, axis: int) -> Array:
    """RMS of every column, (columns,), over the values that are finite and not a mask's fill."""
    x = array.astype(np.float64)
    counted = np.isfinite(x)
    if (filled := _mask_fill(x, counted)) is not None:
        counted &= ~filled
    others = tuple(a for a in range(x.ndim) if a != axis)
    power = np.where(counted, np.square(np.where(counted, x, 0.0)), 0.0).sum(axis=others)
    return np.asarray(np.sqrt(power / np.maximum(counted.sum(axis=others), 1)))


def _groups(sizes: Array) -> tuple[float, list[list[int]]]:
    """Largest ratio of neighbouring RMS values, and the groups of positions, largest values first; [] without a gap."""
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
