"""The compiled loops of `penjing.numerics.entropy`, which says what they do. Importing this module needs numba.

Reading words and plain bits is written out in every loop: as functions that the loops share, inlined, the compiler made
decoding much slower.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

TOTAL_BITS = 15  # of a probability
TOTAL = 1 << TOTAL_BITS
FINE_BITS = 8  # by which a probability is held more exactly than it is used
LOWEST = 1 << 16  # of the coder's state between two symbols
CONTEXTS = 32
SIZES = np.array([0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129], np.int64)
"""Symbol → the smallest magnitude of an integer that it stands for."""
BITS = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 31], np.int64)
"""Symbol → how many bits tell which of its magnitudes it is."""
SYMBOLS = np.searchsorted(SIZES, np.arange(130), side="right") - 1
SCALES = np.clip(np.round(np.log2(np.arange(4096) / 16 + 0.06) * 2.5 + 10), 0, CONTEXTS - 1).astype(np.int64)
"""Sixteen times an expected magnitude → its context."""


def _expected() -> npt.NDArray[np.int32]:
    """The probabilities that a context begins with: a Laplace distribution of the magnitude that it expects."""
    mean = 2 ** ((np.arange(CONTEXTS)[:, None] - 10) / 2.5)
    decay = (np.sqrt(1 + mean**2) - 1) / mean  # of the two-sided geometric distribution
    beyond = np.where(SIZES[1:] > 0, 2 / (1 + decay) * decay ** SIZES[None, 1:], 0)  # at least such a magnitude
    least = 32 / TOTAL * np.arange(1, 16) / 16
    table = np.zeros((CONTEXTS, 17))
    table[:, 1:16] = (1 - beyond) * (1 - 32 / TOTAL) + least
    table[:, 16] = 1
    return np.round(table * (TOTAL << FINE_BITS)).astype(np.int32)


EXPECTED = _expected()
ZERO, FAR = 15, 14  # symbols of floats: positive zero, and an exponent far below the largest


@njit(inline="always")
def fresh(contexts):  # type: ignore[no-untyped-def]
    """Cumulative probabilities of 16 equally probable symbols, and how many symbols there have been."""
    table = np.empty((contexts, 17), np.int32)
    for i in range(17):
        table[:, i] = i * (TOTAL // 16) << FINE_BITS
    return table, np.zeros(contexts, np.int32)


@njit(inline="always")
def adapt(table, seen, context, symbol):  # type: ignore[no-untyped-def]
    """Move probabilities towards the symbol, faster in the beginning; none falls to 0."""
    n = seen[context]
    rate = 3 + (n > 6) + (n > 20) + (n > 60) + (n > 200) + (n > 600)
    for i in range(1, 16):
        aim = (2 * i if i <= symbol else TOTAL - 32 + 2 * i) << FINE_BITS
        table[context, i] += (aim - table[context, i]) >> rate
    if n < 1000:
        seen[context] = n + 1


@njit(inline="always")
def part_of(table, context, symbol):  # type: ignore[no-untyped-def]
    """Where a symbol's part of the probabilities begins, and how large it is."""
    start = table[context, symbol] >> FINE_BITS
    return start, (table[context, symbol + 1] >> FINE_BITS) - start


@njit(inline="always")
def symbol_at(table, context, slot):  # type: ignore[no-untyped-def]
    """The symbol whose part of the probabilities holds `slot`."""
    symbol = 0
    for i in range(1, 16):
        symbol += table[context, i] < (slot + 1) << FINE_BITS
    return symbol


@njit(inline="always")
def scale_of(row, column, last, first):  # type: ignore[no-untyped-def]
    """The context, from sixteen times the mean magnitudes of the row, the column and the latest values."""
    expected = (3 * row + last) >> 2 if first else (3 * row + 3 * column + 2 * last) >> 3
    return SCALES[min(expected, 4095)]


@njit(nogil=True, cache=True)
def integers(values, columns, exponent_bits, mantissa_bits, starts, sizes, plain):  # type: ignore[no-untyped-def]
    """Symbols of integers as parts of the probabilities, and their plain bits; the number of each."""
    table, seen = EXPECTED.copy(), np.full(CONTEXTS, 6, np.int32)
    fine, fine_seen = fresh(16)
    above = np.zeros(columns, np.int64)
    held, length, used, k = np.uint64(0), np.uint64(0), 0, 0
    row = last = np.int64(128)
    for i in range(len(values)):
        column, first = i % columns, i < columns
        value = values[i]
        size = abs(value)
        context = scale_of(row, above[column], last, first)
        symbol = SYMBOLS[min(size, 129)]
        starts[k], sizes[k] = part_of(table, context, symbol)
        k += 1
        adapt(table, seen, context, symbol)
        if symbol > 4:
            more, bits = size - SIZES[symbol], BITS[symbol]
            if bits < 31:
                over = max(bits - 4, 0)
                part = more >> over
                starts[k], sizes[k] = part_of(fine, symbol, part)
                k += 1
                adapt(fine, fine_seen, symbol, part)
                bits, more = over, more & ((1 << over) - 1)
            held |= np.uint64(more) << length
            length += np.uint64(bits)
            while length >= np.uint64(8):
                plain[used] = held & np.uint64(255)
                held >>= np.uint64(8)
                length -= np.uint64(8)
                used += 1
        if size:
            held |= np.uint64(value < 0) << length
            length += np.uint64(1)
            if length == np.uint64(8):
                plain[used] = held
                held, length = np.uint64(0), np.uint64(0)
                used += 1
        size <<= 4
        row += (size - row) >> 5
        last += (size - last) >> 1
        above[column] += size if first else (size - above[column]) >> 4
    if length:
        plain[used] = held
        used += 1
    return k, used


@njit(nogil=True, cache=True)
def integers_back(state, words, plain, columns, exponent_bits, mantissa_bits, values):  # type: ignore[no-untyped-def]
    """Fill `values`; False where the coded values end too early or too late."""
    table, seen = EXPECTED.copy(), np.full(CONTEXTS, 6, np.int32)
    fine, fine_seen = fresh(16)
    above = np.zeros(columns, np.int64)
    held, length, used, word = np.uint64(0), np.uint64(0), 0, 0
    row = last = np.int64(128)
    for i in range(len(values)):
        column, first = i % columns, i < columns
        context = scale_of(row, above[column], last, first)
        slot = state & (TOTAL - 1)
        symbol = symbol_at(table, context, slot)
        start, share = part_of(table, context, symbol)
        state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
        if state < LOWEST:
            if word >= len(words):
                return False
            state = (state << 16) | np.int64(words[word])
            word += 1
        adapt(table, seen, context, symbol)
        size = SIZES[symbol]
        if symbol > 4:
            bits, part = BITS[symbol], np.int64(0)
            if bits < 31:
                slot = state & (TOTAL - 1)
                part = np.int64(symbol_at(fine, symbol, slot))
                start, share = part_of(fine, symbol, part)
                state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
                if state < LOWEST:
                    if word >= len(words):
                        return False
                    state = (state << 16) | np.int64(words[word])
                    word += 1
                adapt(fine, fine_seen, symbol, part)
                bits = max(bits - 4, 0)
            while length < np.uint64(bits):
                if used >= len(plain):
                    return False
                held |= np.uint64(plain[used]) << length
                length += np.uint64(8)
                used += 1
            size += (part << bits) + np.int64(held & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
            held >>= np.uint64(bits)
            length -= np.uint64(bits)
        values[i] = size
        if size:
            if length == np.uint64(0):
                if used >= len(plain):
                    return False
                held, length = np.uint64(plain[used]), np.uint64(8)
                used += 1
            if held & np.uint64(1):
                values[i] = -size
            held >>= np.uint64(1)
            length -= np.uint64(1)
        size <<= 4
        row += (size - row) >> 5
        last += (size - last) >> 1
        above[column] += size if first else (size - above[column]) >> 4
    return word == len(words) and used == len(plain) and state == LOWEST


@njit(nogil=True, cache=True)
def floats(values, columns, exponent_bits, mantissa_bits, starts, sizes, plain):  # type: ignore[no-untyped-def]
    """Symbols of the exponents of floats, and the other bits; the number of each. The first byte is the largest one."""
    table, seen = fresh(2 * CONTEXTS)
    above = np.zeros(columns, np.int64)
    largest = np.int64(0)
    for i in range(len(values)):
        largest = max(largest, (values[i] >> mantissa_bits) & ((1 << exponent_bits) - 1))
    plain[0] = largest
    held, length, used = np.uint64(0), np.uint64(0), 1
    row = last = np.int64(48)
    zero = np.int64(0)
    for i in range(len(values)):
        column, first = i % columns, i < columns
        value = values[i]
        exponent = (value >> mantissa_bits) & ((1 << exponent_bits) - 1)
        context = 2 * scale_of(row, above[column], last, first) + zero
        zero = np.int64(value == 0)
        below = min(largest - exponent, FAR)
        symbol = ZERO if zero else below
        starts[i], sizes[i] = part_of(table, context, symbol)
        adapt(table, seen, context, symbol)
        if not zero:
            bits = mantissa_bits + 1
            more = (value & ((1 << mantissa_bits) - 1)) | ((value >> (mantissa_bits + exponent_bits)) << mantissa_bits)
            if below == FAR:
                more |= exponent << bits
                bits += exponent_bits
            held |= np.uint64(more) << length
            length += np.uint64(bits)
            while length >= np.uint64(8):
                plain[used] = held & np.uint64(255)
                held >>= np.uint64(8)
                length -= np.uint64(8)
                used += 1
            below <<= 4
            row += (below - row) >> 4
            last += (below - last) >> 1
            above[column] += below if first else (below - above[column]) >> 2
    if length:
        plain[used] = held
        used += 1
    return len(values), used


@njit(nogil=True, cache=True)
def floats_back(state, words, plain, columns, exponent_bits, mantissa_bits, values):  # type: ignore[no-untyped-def]
    """Fill `values` with bit patterns; False where the coded values end too early or too late."""
    table, seen = fresh(2 * CONTEXTS)
    above = np.zeros(columns, np.int64)
    if len(plain) == 0:
        return False
    largest = np.int64(plain[0])
    held, length, used, word = np.uint64(0), np.uint64(0), 1, 0
    row = last = np.int64(48)
    zero = np.int64(0)
    for i in range(len(values)):
        column, first = i % columns, i < columns
        context = 2 * scale_of(row, above[column], last, first) + zero
        slot = state & (TOTAL - 1)
        symbol = np.int64(symbol_at(table, context, slot))
        start, share = part_of(table, context, symbol)
        state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
        if state < LOWEST:
            if word >= len(words):
                return False
            state = (state << 16) | np.int64(words[word])
            word += 1
        adapt(table, seen, context, symbol)
        zero = np.int64(symbol == ZERO)
        values[i] = 0
        if not zero:
            bits = mantissa_bits + 1 + (exponent_bits if symbol == FAR else 0)
            while length < np.uint64(bits):
                if used >= len(plain):
                    return False
                held |= np.uint64(plain[used]) << length
                length += np.uint64(8)
                used += 1
            more = np.int64(held & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
            held >>= np.uint64(bits)
            length -= np.uint64(bits)
            exponent = more >> (mantissa_bits + 1) if symbol == FAR else largest - symbol
            sign = (more >> mantissa_bits) & 1
            mantissa = more & ((1 << mantissa_bits) - 1)
            values[i] = mantissa | (exponent << mantissa_bits) | (sign << (mantissa_bits + exponent_bits))
            below = symbol << 4
            row += (below - row) >> 4
            last += (below - last) >> 1
            above[column] += below if first else (below - above[column]) >> 2
    return word == len(words) and used == len(plain) and state == LOWEST


@njit(nogil=True, cache=True)
def backwards(starts, sizes, count, words):  # type: ignore[no-untyped-def]
    """Code symbols from the last to the first; the state that the decoder begins with, and where its words begin."""
    state, at = np.int64(LOWEST), len(words)
    for k in range(count - 1, -1, -1):
        size = np.int64(sizes[k])
        if state >= size << (32 - TOTAL_BITS):
            at -= 1
            words[at] = state & 65535
            state >>= 16
        state = ((state // size) << TOTAL_BITS) + state % size + starts[k]
    return state, at
