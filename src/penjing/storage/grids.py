"""A chunk of floats that lie on grids, one for each row: the steps, and whole numbers."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics import quarter_octaves, scaled_integers
from penjing.storage.lzma2 import compressed, decompressed

_HEAD = struct.Struct("<II")  # bytes of the steps, and of the numbers
_TRIED = 1 << 12  # values that are looked at first
_END = 127  # magnitude that stands for a larger one, which is told behind


def encode(values: npt.NDArray[np.float32], columns: int, width: int) -> bytes | None:
    """Code floats, (n,) in rows of `columns`; None where they lie on no grids."""
    few = values[: max(1, _TRIED // columns) * columns]
    if quarter_octaves.recognized(few, columns) is None:
        return None
    on_grids = quarter_octaves.recognized(values, columns)
    if on_grids is None:
        return None
    places, numbers = on_grids
    steps = _compressed(places)
    within = np.clip(numbers, -_END, _END)
    coded = scaled_integers.encode(within, columns, width)
    return _HEAD.pack(len(steps), len(coded)) + steps + coded + _compressed(numbers[np.abs(within) == _END])


def decode(coded: bytes, count: int, columns: int) -> npt.NDArray[np.float32]:
    """Return what `encode` coded.

    Raises:
        ValueError: The bytes are damaged.
    """
    steps, length = _HEAD.unpack_from(coded)
    start = _HEAD.size + steps
    places = _restored(coded[_HEAD.size : start], -(-count // columns))
    if len(places) and np.abs(places).max() > 4 * quarter_octaves.EXPONENTS + 3:
        raise ValueError("a step that no grid has")
    numbers = scaled_integers.decode(coded[start : start + length], count, columns).astype(np.int64)
    ends = np.abs(numbers) == _END
    numbers[ends] = _restored(coded[start + length :], int(ends.sum()))
    return quarter_octaves.floats(places, numbers, columns)


def _compressed(numbers: npt.NDArray[np.int64]) -> bytes:
    return compressed(numbers.astype("<i2").tobytes())


def _restored(coded: bytes, count: int) -> npt.NDArray[Any]:
    numbers = np.frombuffer(decompressed(coded, 2 * count + 1), "<i2").astype(np.int64)
    if len(numbers) != count:
        raise ValueError("more numbers or fewer than there should be")
    return numbers
