"""Entropy coding of quantized weights: integers whose magnitudes follow the scales of their rows and columns.

Rows and columns of a weight differ in scale, and so do the values beside a large one in a convolution's kernel. Every
value is coded with the table of its class: the product of its row's and its column's mean magnitude, and how large the
sum of two neighbours before it is; a negative sum turns the sign. A table begins with a distribution of that magnitude
(`penjing.numerics.magnitudes`) and follows the values that it has coded. Scales, neighbours and the shape are chosen by
what they take, so a tensor in which they tell nothing pays nothing for them.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics import magnitudes
from penjing.numerics.compiled import loops

Integers = npt.NDArray[np.int64]

STRENGTHS = (4, 16, 64, 256, 1024, 4096)
"""How many values a table's beginning counts as."""
SPAN = 255
"""The largest difference between two values that are coded together."""
_SHIFTS = (-3, 0, 3, 6)  # of the classes, where no small magnitude occurs
_HEAD = struct.Struct("<hhBBBbBBH")
_LENGTH = struct.Struct("<I")
_LANES = 4
_LANE_VALUES = 1024  # values from which on a lane is worth its state
_COUNTED, _COUNTED_ROWS = 1 << 18, 32  # values and rows that are enough to compare models
_ROWS, _COLUMNS, _MANY_LANES = 1, 2, 4


@dataclass(frozen=True)
class _Model:
    """What tells the probabilities of values.

    Attributes:
        low: The smallest value.
        high: The largest value.
        shape: Row of `magnitudes.shapes`.
        strength: Index of `STRENGTHS`.
        shift: Added to classes where the beginning of a table is looked up.
        zeros: Share of zeros that tables begin with, in 1/256; 0: as the distribution has it.
        hole: The smallest magnitude but 0.
        lag: How far before a value its second neighbour is; 1: there is one neighbour; 0: none is looked at.
        rows: Class of every row, (rows,).
        columns: Added to the class for every column, (columns,).
        scaled_rows: Whether rows differ.
        scaled_columns: Whether columns differ.
    """

    low: int
    high: int
    shape: int
    strength: int
    shift: int
    zeros: int
    hole: int
    lag: int
    rows: Integers
    columns: Integers
    scaled_rows: bool
    scaled_columns: bool

    @property
    def size(self) -> int:
        return self.high - self.low + 1

    @functools.cached_property
    def classes(self) -> tuple[int, int]:
        """The lowest one that occurs, and the one behind the highest."""
        return int(self.rows.min() + self.columns.min()), int(self.rows.max() + self.columns.max()) + 1

    def places(self) -> dict[str, Any]:
        """What tells the table of a value, with classes counted from the lowest one that occurs."""
        return {
            "row_class": self.rows - self.rows.min(),
            "column_class": self.columns - self.columns.min(),
            "bounds": magnitudes.thresholds()[slice(*self.classes)],
        }

    def arguments(self) -> dict[str, Any]:
        """What the loops read."""
        same = {"lag": self.lag, "low": self.low, "size": self.size, "strength": STRENGTHS[self.strength]}
        return same | self.places() | self.beginnings()

    def beginnings(self) -> dict[str, Any]:
        """What tables begin with: weights of symbols, (classes, size), and shares of zeros, (classes,)."""
        first, end = self.classes
        looked_up = np.minimum(np.maximum(np.arange(first, end) + self.shift, 0), magnitudes.CLASSES - 1)
        table = magnitudes.shapes()[self.shape][looked_up]
        sizes = np.abs(np.arange(self.low, self.high + 1))
        prior = np.take(table, sizes, axis=1)
        if self.hole > 1:
            prior[:, sizes < self.hole] = 0
        zeros = np.minimum(np.maximum(table[:, 0] >> (magnitudes.UNIT_BITS - 8), 5), 250)
        return {"prior": prior, "zero_priors": np.full(len(table), self.zeros) if self.zeros else zeros}


def encode(values: Integers, columns: int, width: int = 1) -> bytes:
    """Code integers that lie at most `SPAN` apart, with 0 among or between them.

    Args:
        values: (n,) in rows of `columns`; the last row may be shorter. n is at least 1.
        columns: From 1 to n.
        width: Of a convolution's kernel: the second neighbour of a value lies so many before it.

    Raises:
        MissingDependency: numba is not installed.
    """
    compiled = loops("scaled_integers_loops")
    small = values.astype(np.int16)
    model = _fitted(small, columns, width if width < columns else 1)
    lanes = _LANES if len(values) >= _LANES * _LANE_VALUES and len(model.rows) >= _LANES else 1
    coded = [_HEAD.pack(
        model.low, model.high,
        model.scaled_rows * _ROWS | model.scaled_columns * _COLUMNS | (lanes > 1) * _MANY_LANES,
        model.shape, model.strength, model.shift, model.zeros, model.hole, model.lag,
    )]  # fmt: skip
    coded.append(bytes([int(model.rows[0])]))
    for scaled, classes in ((model.scaled_rows, model.rows - model.rows[0]), (model.scaled_columns, model.columns)):
        if scaled:
            nested = encode(classes, len(classes))
            coded += [_LENGTH.pack(len(nested)), nested]
    if model.size > 1:
        parts = np.empty(len(values), np.int64)
        states, words = np.empty(lanes, np.int64), np.empty(len(values) + 1, np.uint32)
        count = compiled.model(values=small, lanes=lanes, parts=parts, **model.arguments())
        place = compiled.backwards(parts, count, states, words)
        coded += [states.astype("<i8").tobytes(), words[place:].astype("<u4").tobytes()]
    return b"".join(coded)


def decode(coded: bytes, count: int, columns: int) -> npt.NDArray[np.int16]:
    """Return what `encode` coded.

    Raises:
        ValueError: These are not `count` coded integers.
        MissingDependency: numba is not installed.
    """
    values, end = _decoded(coded, 0, len(coded), count, columns, nested=False)
    if end != len(coded):
        raise ValueError("the coded values end too late")
    return values


def _decoded(
    coded: bytes, start: int, end: int, count: int, columns: int, *, nested: bool
) -> tuple[npt.NDArray[np.int16], int]:
    try:
        low, high, flags, shape, strength, shift, zeros, hole, lag = _HEAD.unpack_from(coded, start)
        base = coded[start + _HEAD.size]
        start += _HEAD.size + 1
        rows, row_columns = -(-count // columns), columns
        row_class, column_class = np.full(rows, base, np.int64), np.zeros(row_columns, np.int64)
        if nested and flags & (_ROWS | _COLUMNS):
            raise ValueError("scales of scales")
        for flag, classes in ((_ROWS, row_class), (_COLUMNS, column_class)):
            if flags & flag:
                (length,) = _LENGTH.unpack_from(coded, start)
                start += _LENGTH.size
                if length > end - start:
                    raise ValueError("scales that end too late")
                scales, _ = _decoded(coded, start, start + length, len(classes), len(classes), nested=True)
                classes += scales
                start += length
    except (struct.error, IndexError):
        raise ValueError("the coded values end too early") from None
    model = _Model(
        low, high, shape, strength, shift, zeros, hole, lag, row_class, column_class, bool(flags & _ROWS),
        bool(flags & _COLUMNS),
    )  # fmt: skip
    _check(model, flags, columns)
    values = np.zeros(count, np.int16)
    if model.size == 1:
        values += low
        return values, start
    lanes = _LANES if flags & _MANY_LANES else 1
    if end - start < 8 * lanes or (end - start) % 4:
        raise ValueError("the coded values end too early")
    states = np.frombuffer(coded, "<i8", lanes, start).astype(np.int64)
    words = np.frombuffer(coded, "<u4", (end - start) // 4 - 2 * lanes, start + 8 * lanes).astype(np.uint32)
    if states.min() < 0:
        raise ValueError("a state of the coder that can't be")
    restore = loops("scaled_integers_loops").restore
    if not restore(states=states, words=words, values=values, **model.arguments()):
        raise ValueError("the coded values end too early or too late")
    return values, end


def _check(model: _Model, flags: int, columns: int) -> None:
    """Whatever the loops rely on.

    Raises:
        ValueError: Something is outside its bounds.
    """
    lowest, highest = int(model.rows.min() + model.columns.min()), int(model.rows.max() + model.columns.max())
    fine = (
        -magnitudes.LARGEST <= model.low <= 0 <= model.high <= magnitudes.LARGEST
        and model.size <= SPAN + 1
        and flags < 8
        and model.shape < len(magnitudes.shapes())
        and model.strength < len(STRENGTHS)
        and (model.lag == 0 or (model.low == -model.high and model.lag < max(columns, 2)))
        and 0 <= lowest <= highest < magnitudes.CLASSES
    )
    if not fine:
        raise ValueError("a model of the values that can't be")


def _fitted(values: npt.NDArray[np.int16], columns: int, width: int) -> _Model:
    """The model in which the values take the fewest bytes."""
    low, high, hole, none, total = loops("scaled_integers_loops").extent(values)
    rows = -(-len(values) // columns)
    zeros = min(max(256 * none // len(values), 1), 255) if hole > 1 else 0
    base = magnitudes.class_of(np.array([total / len(values) + 0.25]))
    simple = _Model(
        low, high, 1, 3, 0, zeros, hole, 0, np.repeat(base, rows), np.zeros(columns, np.int64), False, False
    )
    if low == high or len(values) < 64:
        return simple
    every = max(1, min(len(values) // _COUNTED, rows // _COUNTED_ROWS))
    best = _shaped(values, simple, every)
    for over_rows, over_columns in ((True, False), (False, True), (True, True)):
        if (over_rows and rows < 2) or (over_columns and columns < 2) or (over_columns and rows < 2):
            continue
        best = min(best, _shaped(values, _scaled(values, simple, over_rows, over_columns), every), key=lambda c: c[0])
    reach = max(-low, high)
    if reach <= SPAN // 2 and columns > 1:
        near = replace(best[1], low=-reach, high=reach, lag=width)
        best = min(best, _shaped(values, near, every), key=lambda c: c[0])
    _, model, counts = _shaped(values, best[1], 1) if every > 1 else best
    beginnings = model.beginnings()
    return replace(model, strength=min(range(len(STRENGTHS)), key=lambda i: _bits(counts, model, beginnings, i)))


def _scaled(values: npt.NDArray[np.int16], simple: _Model, over_rows: bool, over_columns: bool) -> _Model:
    """The model with the scales of rows or columns, or both."""
    rows_mean, columns_mean = np.empty(len(simple.rows)), np.empty(len(simple.columns))
    loops("scaled_integers_loops").scales(values, len(simple.columns), over_rows, over_columns, rows_mean, columns_mean)
    rows = magnitudes.class_of(rows_mean) if over_rows else simple.rows
    if over_columns and not over_rows:
        columns_mean /= max(columns_mean.mean(), 1e-9)
    offsets = np.round(3 * np.log2(np.maximum(columns_mean, 1e-6))).astype(np.int64)
    columns = np.clip(offsets, -rows.min(), magnitudes.CLASSES - 1 - rows.max())
    return replace(simple, rows=rows, columns=columns, scaled_rows=over_rows, scaled_columns=over_columns)


def _shaped(values: npt.NDArray[np.int16], model: _Model, every: int) -> tuple[float, _Model, npt.NDArray[np.int32]]:
    """Bits, the model with the best of the shapes and shifts, and the counts of tables, from one of so many rows."""
    compiled = loops("scaled_integers_loops")
    first, end = model.classes
    levels = compiled.LEVELS if model.lag else 1
    counts = np.zeros(((end - first) * levels, model.size), np.int32)
    compiled.histogram(values=values, lag=model.lag, low=model.low, every=every, counts=counts, **model.places())
    shifts = np.array(_SHIFTS if model.hole > 1 else (0,))
    logarithms = _logarithms(model.hole)
    costs = np.empty((len(logarithms), len(shifts)))
    compiled.cross_entropies(counts, levels, logarithms, first, shifts, -model.low, costs)
    shape, shift = divmod(int(costs.argmin()), len(shifts))
    model = replace(model, shape=shape, shift=int(shifts[shift]))
    side = sum(
        _side_bits(c) for c, used in ((model.rows, model.scaled_rows), (model.columns, model.scaled_columns)) if used
    )
    return _bits(counts, model, model.beginnings(), model.strength) + side, model, counts


@functools.cache
def _logarithms(hole: int) -> npt.NDArray[np.float64]:
    """Of the probabilities of magnitudes from `hole` on, in bits: (shapes, classes, magnitudes)."""
    table = magnitudes.shapes().astype(np.float64)
    table[:, :, 0] = 0
    table[:, :, :hole] = 0
    logarithms: npt.NDArray[np.float64] = np.log2(np.maximum(table / (2 * table.sum(2, keepdims=True)), 1e-9))
    return logarithms


def _bits(counts: npt.NDArray[np.int32], model: _Model, beginnings: dict[str, Any], strength: int) -> float:
    """What the values take with these beginnings of its tables, at a strength."""
    compiled = loops("scaled_integers_loops")
    levels = compiled.LEVELS if model.lag else 1
    return float(
        compiled.bits(counts=counts, levels=levels, strength=STRENGTHS[strength], zero=-model.low, **beginnings)
    )


def _side_bits(classes: Integers) -> float:
    """About what the scales take."""
    _, counts = np.unique(classes, return_counts=True)
    return float(-(counts * np.log2(counts / len(classes))).sum()) + 8 * (len(counts) + 20)


__all__ = ["SPAN", "STRENGTHS", "decode", "encode"]
