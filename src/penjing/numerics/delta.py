"""Entropy coding of weights whose values before are known: what changed from one version of a network to the next.

An integer is predicted by the one in its place before, times the ratio that the row has shown so far (its scale has
changed where the row's largest weight has), and the difference is coded; how far the prediction is from a whole number
is part of the context. Of a float it is the difference of the bit patterns without sign, which is the difference in
units of the last place: a symbol for its length, at the length that the changes before let expect at this exponent;
where the sign or much of the exponent changed, the float itself. Symbols, probabilities and coder are those of
`penjing.numerics.entropy`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penjing.numerics.compiled import loops
from penjing.numerics.entropy import Coded

Integers = npt.NDArray[np.int64]


def encode_integers(old: Integers, new: Integers, ends: Integers, widths: Integers) -> Coded:
    """Code integers of magnitudes below 512, (n,), given those before, (n,).

    Args:
        old: The values before.
        new: The values.
        ends: Of the tensors that lie one behind the other, (m,); the last is n, and none is empty.
        widths: Values of a row of each, (m,), at least 1.

    Raises:
        MissingDependency: numba is not installed.
    """
    return _encoded("integers", old, new, ends, widths, 0, 0)


def decode_integers(coded: Coded, old: Integers, ends: Integers, widths: Integers) -> Integers:
    """Return what `encode_integers` coded.

    Raises:
        ValueError: These are not as many coded integers.
        MissingDependency: numba is not installed.
    """
    return _decoded("integers_back", coded, old, ends, widths, 0, 0)


def encode_floats(
    old: Integers, new: Integers, ends: Integers, widths: Integers, exponent_bits: int, mantissa_bits: int
) -> Coded:
    """Code floats, given as their bit patterns, (n,). Arguments and errors as in `encode_integers`."""
    return _encoded("floats", old, new, ends, widths, exponent_bits, mantissa_bits)


def decode_floats(
    coded: Coded, old: Integers, ends: Integers, widths: Integers, exponent_bits: int, mantissa_bits: int
) -> Integers:
    """Return the bit patterns that `encode_floats` coded. Errors as in `decode_integers`."""
    return _decoded("floats_back", coded, old, ends, widths, exponent_bits, mantissa_bits)


def _encoded(kernel: str, old: Integers, new: Integers, ends: Integers, widths: Integers, *format_bits: int) -> Coded:
    starts, sizes = np.empty(2 * len(new), np.int32), np.empty(2 * len(new), np.int32)
    plain = np.empty(5 * len(new) + 16, np.uint8)
    symbols, used = getattr(loops("delta_loops"), kernel)(old, new, ends, widths, *format_bits, starts, sizes, plain)
    words = np.empty(symbols + 1, np.uint16)
    state, first = loops("entropy_loops").backwards(starts, sizes, symbols, words)
    return int(state), words[first:], plain[:used]


def _decoded(kernel: str, coded: Coded, old: Integers, ends: Integers, widths: Integers, *format_bits: int) -> Integers:
    state, words, plain = coded
    new = np.empty(len(old), np.int64)
    if not getattr(loops("delta_loops"), kernel)(state, words, plain, old, ends, widths, *format_bits, new):
        raise ValueError("the coded changes end too early or too late")
    return new
