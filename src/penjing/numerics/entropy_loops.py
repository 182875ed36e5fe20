"""The compiled loops of `penjing.numerics.entropy`, which says what they do. Importing this module needs numba.

Reading words and plain bits is written out in every loop: as functions that the loops share, inlined, the compiler made
decoding much slower.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TOTAL_BITS = 15  # of a probability
TOTAL = 1 << TOTAL_BITS
FINE_BITS = 8  # by which a probability is held more exactly than it is used
LOWEST = 1 << 16  # of the coder's state between two symbols
CONTEXTS = 32
SCALES = np.clip(np.round(np.log2(np.arange(4096) / 16 + 0.06) * 2.5 + 10), 0, CONTEXTS - 1).astype(np.int64)
"""Sixteen times an expected magnitude → its context."""
ZERO, FAR = 15, 14  # symbols of floats: positive zero, and an exponent that has no symbol


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
def usual_largest(values, exponent_bits, mantissa_bits):  # type: ignore[no-untyped-def]
    """The exponent from which downwards symbols tell the most values: one infinity does not move all of them."""
    counts = np.zeros((1 << exponent_bits) + FAR, np.int64)
    for i in range(len(values)):
        if values[i] != 0:
            counts[FAR + ((values[i] >> mantissa_bits) & ((1 << exponent_bits) - 1))] += 1
    within = most = best = np.int64(0)
    for k in range(FAR, len(counts)):
        within += counts[k] - counts[k - FAR]
        if within > 0 and within >= most and (within > most or counts[k]):
            most, best = within, np.int64(k - FAR)
    return best


@njit(nogil=True, cache=True)
def floats(values, columns, exponent_bits, mantissa_bits, starts, sizes, plain):  # type: ignore[no-untyped-def]
    """Symbols of the exponents of floats, and the other bits; the number of each.

    The first bytes, two where an exponent has more than 8 bits, are the largest exponent that is told by a symbol.
    """
    table, seen = fresh(2 * CONTEXTS)
    above = np.zeros(columns, np.int64)
    largest = usual_largest(values, exponent_bits, mantissa_bits)
    plain[0] = largest & 255
    plain[1] = largest >> 8
    held, length, used = np.uint64(0), np.uint64(0), 1 + (exponent_bits > 8)
    row = last = np.int64(48)
    zero = np.int64(0)
    for i in range(len(values)):
        column, first = i % columns, i < columns
        value = values[i]
        exponent = (value >> mantissa_bits) & ((1 << exponent_bits) - 1)
        context = 2 * scale_of(row, above[column], last, first) + zero
        zero = np.int64(value == 0)
        below = largest - exponent
        if below < 0 or below > FAR:
            below = FAR
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
    used = 1 + (exponent_bits > 8)
    if len(plain) < used:
        return False
    largest = np.int64(plain[0]) | (np.int64(plain[1]) << 8 if used > 1 else 0)
    held, length, word = np.uint64(0), np.uint64(0), 0
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
