"""Entropy coding of weights whose values before are known: what changed from one version of a network to the next.

An integer is predicted by the one in its place before, times the ratio that the row has shown so far (its scale has
changed where the row's largest weight has), and by what this left of the row and of the values to the left and above in
the same kernel of a convolution, because a step of the training changes these alike. The difference is coded; how far
the prediction is from a whole number is part of the context. A row that did not change takes one symbol. Of a float it
is the difference of the bit patterns without sign, in units of the last place: a symbol for its length, at the length
that the changes before let expect at this exponent; where the sign or much of the exponent changed, the float itself.
Coder and form of the probabilities are those of floats in `penjing.numerics.entropy`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics.compiled import loops
from penjing.numerics.entropy import Coded, from_bytes, to_bytes

Integers = npt.NDArray[np.int64]
_NEIGHBOURS = ([0, 3], [0, 3], [0, 1, 3], [0, 1, 2, 3])
"""Of left, above, both and the row's mean, which have a weight: without any, with one to the left, above, and both."""
_WEIGHTS = sum(map(len, _NEIGHBOURS))


def encode_integers(old: Integers, new: Integers, ends: Integers, widths: Integers, kernels: Integers) -> bytes:
    """Code integers of magnitudes below 512, (n,), given those before, (n,).

    Args:
        old: The values before.
        new: The values.
        ends: Of the tensors that lie one behind the other, (m,); the last is n, and none is empty.
        widths: Values of a row of each, (m,), at least 1.
        kernels: Width and values of one kernel of each, (m, 2); 1 and 1 where it is not of a convolution.

    Raises:
        MissingDependency: numba is not installed.
    """
    squares, products = np.zeros((4, 4, 4), np.int64), np.zeros((4, 4), np.int64)
    loops("delta_integers_loops").moments(old, new, ends, widths, kernels, squares, products)
    weights = np.zeros((4, 4), np.int64)
    for kind, some in enumerate(_NEIGHBOURS):
        best, *_ = np.linalg.lstsq(squares[kind][np.ix_(some, some)] + np.eye(len(some)), products[kind][some])
        weights[kind, some] = np.clip(np.round(64 * best), -128, 127)
    listed = np.concatenate([weights[kind, some] for kind, some in enumerate(_NEIGHBOURS)]).astype(np.int8)
    return listed.tobytes() + to_bytes(_encoded("integers", old, new, ends, widths, kernels, weights))


def decode_integers(coded: bytes, old: Integers, ends: Integers, widths: Integers, kernels: Integers) -> Integers:
    """Return what `encode_integers` coded.

    Raises:
        ValueError: These are not as many coded integers.
        MissingDependency: numba is not installed.
    """
    listed, weights = np.frombuffer(coded, np.int8, _WEIGHTS), np.zeros((4, 4), np.int64)
    for kind, some in enumerate(_NEIGHBOURS):
        weights[kind, some] = listed[: len(some)]
        listed = listed[len(some) :]
    return _decoded("integers", from_bytes(coded, _WEIGHTS), old, ends, widths, kernels, weights)


def encode_floats(
    old: Integers, new: Integers, ends: Integers, widths: Integers, exponent_bits: int, mantissa_bits: int
) -> bytes:
    """Code floats, given as their bit patterns, (n,). Arguments and errors as in `encode_integers`."""
    return to_bytes(_encoded("floats", old, new, ends, widths, exponent_bits, mantissa_bits))


def decode_floats(
    coded: bytes, old: Integers, ends: Integers, widths: Integers, exponent_bits: int, mantissa_bits: int
) -> Integers:
    """Return the bit patterns that `encode_floats` coded. Errors as in `decode_integers`."""
    return _decoded("floats", from_bytes(coded), old, ends, widths, exponent_bits, mantissa_bits)


def _encoded(kernel: str, old: Integers, new: Integers, ends: Integers, widths: Integers, *more: Any) -> Coded:
    module = f"delta_{kernel}_loops"
    starts, sizes = np.empty(3 * len(new), np.int32), np.empty(3 * len(new), np.int32)
    plain = np.empty(5 * len(new) + 16, np.uint8)
    symbols, used = getattr(loops(module), kernel)(old, new, ends, widths, *more, starts, sizes, plain)
    words = np.empty(symbols + 1, np.uint16)
    state, first = loops("entropy_loops").backwards(starts, sizes, symbols, words)
    return int(state), words[first:], plain[:used]


def _decoded(kernel: str, coded: Coded, old: Integers, ends: Integers, widths: Integers, *more: Any) -> Integers:
    state, words, plain = coded
    new = np.empty(len(old), np.int64)
    module = f"delta_{kernel}_loops"
    if not getattr(loops(module), f"{kernel}_back")(state, words, plain, old, ends, widths, *more, new):
        raise ValueError("the coded changes end too early or too late")
    return new
