"""Entropy coding of floats: their exponents, at the probabilities that the values before show.

Exponents, and zeros, become symbols of 16; sign and mantissa are kept as plain bits. Symbols are coded by a range
variant of asymmetric numeral systems (Duda, 2014, arXiv:1311.2540), with probabilities that adapt after each symbol and
depend on a context: how large the values before it in its row, and above it in its column, have been. Nothing else is
stored, so that small tensors pay nothing for a table. Integers: `penjing.numerics.scaled_integers`.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from penjing.numerics.compiled import loops

Coded = tuple[int, npt.NDArray[np.uint16], npt.NDArray[np.uint8]]
"""State, words and plain bits of a coded array."""
_HEAD = struct.Struct("<III")


def encode_floats(patterns: npt.NDArray[np.int64], columns: int, exponent_bits: int, mantissa_bits: int) -> Coded:
    """Code floats, given as their bit patterns, (n,).

    Args:
        patterns: In rows of `columns`; the last row may be shorter. n is at least 1.
        columns: At least 1, and at most n.
        exponent_bits: Of the number type.
        mantissa_bits: Of the number type.

    Raises:
        MissingDependency: numba is not installed.
    """
    compiled = loops("entropy_loops")
    starts, sizes = np.empty(len(patterns), np.int32), np.empty(len(patterns), np.int32)
    plain = np.empty(5 * len(patterns) + 16, np.uint8)
    symbols, used = compiled.floats(patterns, columns, exponent_bits, mantissa_bits, starts, sizes, plain)
    words = np.empty(symbols + 1, np.uint16)
    state, first = compiled.backwards(starts, sizes, symbols, words)
    return int(state), words[first:], plain[:used]


def decode_floats(
    coded: Coded, count: int, columns: int, exponent_bits: int, mantissa_bits: int
) -> npt.NDArray[np.int64]:
    """Return the bit patterns that `encode_floats` coded.

    Raises:
        ValueError: These are not `count` coded floats.
        MissingDependency: numba is not installed.
    """
    state, words, plain = coded
    patterns = np.empty(count, np.int64)
    if not loops("entropy_loops").floats_back(state, words, plain, columns, exponent_bits, mantissa_bits, patterns):
        raise ValueError("the coded values end too early or too late")
    return patterns


def to_bytes(coded: Coded) -> bytes:
    """State, number of words and of plain bytes, words, plain bytes."""
    state, words, plain = coded
    return _HEAD.pack(state, len(words), len(plain)) + words.astype("<u2").tobytes() + plain.tobytes()


def from_bytes(coded: bytes, start: int = 0) -> Coded:
    """What `to_bytes` wrote, from the byte `start` on.

    Raises:
        ValueError: There are more bytes or fewer.
        struct.error: There are not even the lengths.
    """
    state, words, plain = _HEAD.unpack_from(coded, start)
    start += _HEAD.size
    if len(coded) != start + 2 * words + plain:
        raise ValueError("a chunk that ends too early or too late")
    listed = np.frombuffer(coded, "<u2", words, start).astype(np.uint16)
    return state, listed, np.frombuffer(coded, np.uint8, plain, start + 2 * words)


__all__ = ["Coded", "decode_floats", "encode_floats", "from_bytes", "to_bytes"]
