"""Floats that are multiples of a step in every row, as quantized weights of a trainable checkpoint are.

The steps are found, whatever they are, and the multiples are coded as the integers that they are
(`penjing.numerics.scaled_integers`). Where steps are powers of 2^(1/4), `penjing.storage.grids` stores them shorter.
"""

from __future__ import annotations

import itertools
import lzma
import struct

import numpy as np
import numpy.typing as npt

from penjing.numerics import scaled_integers
from penjing.storage.lzma2 import compressed, decompressed

Patterns = npt.NDArray[np.int64]

MANTISSA = {"f32": 23, "f16": 10, "bf16": 7}
"""Number types that are looked at → bits of the mantissa."""
_LARGEST = 255  # multiple
_TRIED = 4  # rows in which it is looked whether there are steps
_GROUPS = (128, 64, 32)  # values that may have a step of their own, where rows have none
_FEWEST = 8  # values of a row: fewer are no evidence
_OFF = {"f32": 2, "f16": 0, "bf16": 0}  # how far a value may lie from the multiple, in units of its last bit
_LOWEST = {"f32": -126, "f16": -14, "bf16": -126}  # exponent of normal values
_HEAD = struct.Struct("<IIII")  # values of one step; bytes of the steps, the signs of zeros, and how far values lie off
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 2, "pb": 2}]


def encode(patterns: Patterns, dtype: str, columns: int, width: int) -> bytes | None:
    """Return coded bytes; None where rows have no steps.

    Args:
        patterns: Bits of the values, (n,) in rows of `columns`.
        dtype: A key of `MANTISSA`.
        columns: From 1 to n.
        width: Of a convolution's kernel, otherwise 1.
    """
    for group in (columns, *(g for g in _GROUPS if columns % g == 0 and g < columns)):
        if group >= _FEWEST and len(patterns) % group == 0 and (fitted := _fitted(patterns, dtype, group)):
            break
    else:
        return None
    steps, multiples = fitted
    if multiples.max() - multiples.min() > scaled_integers.SPAN:
        return None
    zeros = multiples == 0
    off = np.where(zeros, 0, patterns - _rounded(multiples.reshape(-1, group), steps[:, None], dtype).reshape(-1))
    negative = patterns[zeros] != 0
    parts = (
        compressed(steps.astype("<f4").tobytes(), _FILTERS),
        compressed(np.packbits(negative).tobytes(), _FILTERS) if negative.any() else b"",
        scaled_integers.encode(off, columns) if off.any() else b"",
    )
    return _HEAD.pack(group, *map(len, parts)) + b"".join(parts) + scaled_integers.encode(multiples, columns, width)


def decode(coded: bytes, dtype: str, count: int, columns: int) -> Patterns:
    """Return the patterns that `encode` coded.

    Raises:
        ValueError: These are not `count` coded values.
    """
    group, *lengths = _HEAD.unpack_from(coded)
    if dtype not in MANTISSA or group < 1 or count % group:
        raise ValueError("steps that do not fit the values")
    ends = np.cumsum([_HEAD.size, *lengths]).tolist()
    steps, signs, off = (coded[a:b] for a, b in itertools.pairwise(ends))
    multiples = scaled_integers.decode(coded[ends[-1] :], count, columns).astype(np.int64)
    listed = np.frombuffer(_plain(steps, 4 * (count // group)), "<f4").astype(np.float32)
    patterns = _rounded(multiples.reshape(-1, group), listed[:, None], dtype).reshape(-1)
    if off:
        patterns += scaled_integers.decode(off, count, columns)
    if signs:
        zeros = np.flatnonzero(multiples == 0)
        bits = np.unpackbits(np.frombuffer(_plain(signs, -(-len(zeros) // 8)), np.uint8))
        patterns[zeros] = bits[: len(zeros)].astype(np.int64) << _sign(dtype)
    return patterns


def _plain(coded: bytes, size: int) -> bytes:
    plain = decompressed(coded, size, _FILTERS)
    if len(plain) != size:
        raise ValueError("steps or signs that end too early")
    return plain


def _fitted(patterns: Patterns, dtype: str, group: int) -> tuple[npt.NDArray[np.float32], Patterns] | None:
    """Step of every row of `group` values and the multiples; None where a row has none."""
    rows = patterns.reshape(-1, group)
    tried = rows[np.unique(np.linspace(0, len(rows) - 1, _TRIED).astype(int))]
    if not all(_top(row, values, dtype) for row, values in zip(tried, _floats(tried, dtype), strict=True)):
        return None
    values = _floats(rows, dtype)
    if not np.isfinite(values).all() or not values.any():
        return None
    steps, multiples = np.zeros(len(rows), np.float32), np.zeros(rows.shape, np.int64)
    pending = np.flatnonzero(values.any(1))
    while len(pending):  # most rows have the same largest multiple
        top = _top(rows[pending[0]], values[pending[0]], dtype)
        if not top:
            return None
        steps[pending], multiples[pending], fits = _at(rows[pending], values[pending], dtype, top)
        if not fits[0]:
            return None
        pending = pending[~fits]
    return steps, multiples.reshape(-1)


def _top(row: Patterns, values: npt.NDArray[np.float64], dtype: str) -> int:
    """The largest multiple in a row; the smallest number that it can be; 0 where there is none."""
    sizes = np.unique(np.abs(values))
    if len(sizes) > _LARGEST + 1 or not np.isfinite(sizes[-1]):
        return 0
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 1
    tops = np.arange(1, _LARGEST + 1)
    low, high, whole = _bounds(np.broadcast_to(sizes, (len(tops), len(sizes))), dtype, tops)
    for top in tops[(low <= high) & (whole >= 1).all(1)].tolist():
        if _at(row[None], values[None], dtype, top)[2][0]:
            return int(top)
    return 0


def _bounds(
    values: npt.NDArray[np.float64], dtype: str, tops: int | npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The smallest and the largest step that rounds to the values of each row, (n,), and the multiples, (n, values)."""
    sizes = np.abs(values)
    parts, exponents = np.frexp(sizes)
    half = np.ldexp(0.5 + _OFF[dtype], np.maximum(exponents - 1, _LOWEST[dtype]) - MANTISSA[dtype])
    # Below a power of two, the next value is half as far away.
    lowest, highest = sizes - np.where(parts == 0.5, half / 2, half), sizes + half
    tops = np.reshape(tops, (-1, 1))
    whole = np.round(values * (tops / sizes.max(1, keepdims=True)))
    for part in (16, 4, 2, 1):
        counted = (whole != 0) & (np.abs(whole) * part <= tops)
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(counted, lowest / np.abs(whole), 0).max(1)
            high = np.where(counted, highest / np.abs(whole), np.inf).min(1)
            if part > 1:  # small values first: the largest one is rounded too, and by it others might be off by one
                step = np.where(np.isfinite(high), (low + high) / 2, sizes.max(1) / tops[:, 0])
                whole = np.round(values / step[:, None])
    return low, high, whole


def _at(
    rows: Patterns, values: npt.NDArray[np.float64], dtype: str, top: int
) -> tuple[npt.NDArray[np.float32], Patterns, npt.NDArray[np.bool_]]:
    """Steps and multiples of rows, (n,) and (n, values), of which the largest is `top`, and whether they fit, (n,)."""
    low, high, whole = _bounds(values, dtype, top)
    multiples = whole.astype(np.int64)
    plain = np.where(values == 0, 0, rows)
    exact = (np.abs(values).max(1) / top).astype(np.float32)
    steps, best = exact, np.full(len(rows), _OFF[dtype] + 1)
    for middle in (exact, ((low + high) / 2).astype(np.float32)):
        for step in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))):
            off = np.abs(_rounded(multiples, step[:, None], dtype) - plain).max(1)
            steps, best = np.where(off < best, step, steps), np.minimum(off, best)
            if not best.any():
                return steps, multiples, best == 0
    return steps, multiples, (best <= _OFF[dtype]) & ((multiples == 0) == (values == 0)).all(1)


def _rounded(multiples: Patterns, steps: npt.NDArray[np.float32] | np.float32, dtype: str) -> Patterns:
    """Bits of the products, rounded to the number type."""
    with np.errstate(all="ignore"):
        products = multiples.astype(np.float32) * steps
        if dtype == "f16":
            return products.astype(np.float16).view(np.uint16).astype(np.int64)
    bits = products.view(np.uint32).astype(np.int64)
    if dtype == "bf16":  # to the nearest, ties to even
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF
    return bits


def _floats(patterns: Patterns, dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "f16":
        return patterns.astype(np.uint16).view(np.float16).astype(np.float64)
    return (patterns << (16 if dtype == "bf16" else 0)).astype(np.uint32).view(np.float32).astype(np.float64)


def _sign(dtype: str) -> int:
    """Place of the sign's bit."""
    return 31 if dtype == "f32" else 15


__all__ = ["MANTISSA", "decode", "encode"]
