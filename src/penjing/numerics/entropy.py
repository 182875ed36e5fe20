"""Entropy coding of weights: integers, and the exponents of floats, at the probabilities that the values before show.

Every value becomes a symbol of 16 and a few plain bits. Symbols are coded by a range variant of asymmetric numeral
systems (Duda, 2014, arXiv:1311.2540), with probabilities that adapt after each symbol and depend on a context: how
large the values before it in its row, and above it in its column, have been. Nothing else is stored, so that small
tensors pay nothing for a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics.compiled import loops

Coded = tuple[int, npt.NDArray[np.uint16], npt.NDArray[np.uint8]]
"""State, words and plain bits of a coded array."""


def encode_integers(values: npt.NDArray[np.int64], columns: int) -> Coded:
    """Code integers around zero, (n,), with magnitudes below 2**31.

    Args:
        values: In rows of `columns`; the last row may be shorter.
        columns: At least 1, and at most n.

    Raises:
        MissingDependency: numba is not installed.
    """
    return _encoded(loops("entropy_loops").integers, values, columns, 0, 0)


def decode_integers(coded: Coded, count: int, columns: int) -> npt.NDArray[np.int64]:
    """Return what `encode_integers` coded.

    Raises:
        ValueError: These are not `count` coded integers.
        MissingDependency: numba is not installed.
    """
    return _decoded(loops("entropy_loops").integers_back, coded, count, columns, 0, 0)


def encode_floats(patterns: npt.NDArray[np.int64], columns: int, exponent_bits: int, mantissa_bits: int) -> Coded:
    """Code floats, given as their bit patterns, (n,). Arguments and errors as in `encode_integers`."""
    return _encoded(loops("entropy_loops").floats, patterns, columns, exponent_bits, mantissa_bits)


def decode_floats(
    coded: Coded, count: int, columns: int, exponent_bits: int, mantissa_bits: int
) -> npt.NDArray[np.int64]:
    """Return the bit patterns that `encode_floats` coded. Errors as in `decode_integers`."""
    return _decoded(loops("entropy_loops").floats_back, coded, count, columns, exponent_bits, mantissa_bits)


def _encoded(kernel: Callable[..., Any], values: npt.NDArray[np.int64], columns: int, *format_bits: int) -> Coded:
    starts, sizes = np.empty(2 * len(values), np.int32), np.empty(2 * len(values), np.int32)
    plain = np.empty(5 * len(values) + 16, np.uint8)
    symbols, used = kernel(values, columns, *format_bits, starts, sizes, plain)
    words = np.empty(symbols + 1, np.uint16)
    state, first = loops("entropy_loops").backwards(starts, sizes, symbols, words)
    return int(state), words[first:], plain[:used]


def _decoded(
    kernel: Callable[..., Any], coded: Coded, count: int, columns: int, *format_bits: int
) -> npt.NDArray[np.int64]:
    state, words, plain = coded
    values = np.empty(count, np.int64)
    if not kernel(state, words, plain, columns, *format_bits, values):
        raise ValueError("the coded values end too early or too late")
    return values
