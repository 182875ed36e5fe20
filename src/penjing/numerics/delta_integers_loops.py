"""The compiled loops of `penjing.numerics.delta` for integers. Importing this module needs numba.

As in `entropy_loops`, reading words and plain bits is written out in every loop.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from penjing.numerics.entropy_loops import (
    FINE_BITS,
    LOWEST,
    TOTAL,
    TOTAL_BITS,
    fresh,
    part_of,
    symbol_at,
)

PRIOR = 1 << 14  # weight of the ratio 1 at the beginning of a row of integers
SCALES = np.round(2.5 * np.log2(np.arange(1 << 16) / 256 + 1 / 256) + 20).astype(np.int8)
"""256 times an expected magnitude → its context."""
SCALE_CONTEXTS, WIDE = 41, 22  # contexts, and the one from which on differences have plain bits
RATES = np.array([(2 << 16) // (2 * n + 3) for n in range(2, 512)], np.int64)
"""How far probabilities move after so many symbols, in 65,536ths."""


@njit(inline="always")
def learn(table, seen, context, symbol):  # type: ignore[no-untyped-def]
    """Move probabilities towards the symbol: to its share among those before, or among the latest few hundred."""
    rate = np.int64(RATES[seen[context]])
    for i in range(1, 16):
        aim = np.int64(2 * i if i <= symbol else TOTAL - 32 + 2 * i) << FINE_BITS
        table[context, i] += ((aim - table[context, i]) * rate) >> 16
    if seen[context] < len(RATES) - 1:
        seen[context] += 1


@njit(inline="always")
def neighbours(rest, i, place, width, size, total):  # type: ignore[no-untyped-def]
    """What is left of the values beside this one in its kernel: left, above and both, and the mean of the row.

    The first of the result says which of them there are; the value before in the row is always told.
    """
    x, y = place % width, place % size // width
    return (
        min(x, 1) + 2 * min(y, 1),
        rest[i - 1] if place else np.int64(0),
        rest[i - width] if y else np.int64(0),
        rest[i - width - 1] if x and y else np.int64(0),
        total // (place + 8),
    )


@njit(inline="always")
def ratio_of(before, product, square):  # type: ignore[no-untyped-def]
    """Sixteen times the integer that the row's ratio makes of the one in its place."""
    return (16 * before * product + (square >> 1)) // square


@njit(inline="always")
def split_of(fine, before):  # type: ignore[no-untyped-def]
    """The nearest integer, whether it is above what is expected, and the class of the distance."""
    nearest = (fine + 8) >> 4
    rest = fine - (nearest << 4)
    size = abs(rest)
    return nearest, rest < 0, 3 if before == 0 else (0 if size < 2 else 1 if size < 5 else 2)


@njit(inline="always")
def plain_bits(context):  # type: ignore[no-untyped-def]
    """How many bits of a difference are left out of its symbol."""
    return (context - WIDE) * 2 // 5 + 1 if context >= WIDE else 0


@njit(nogil=True, cache=True)
def moments(old, new, ends, widths, kernels, squares, products):  # type: ignore[no-untyped-def]
    """Add up products of what the neighbours left, (4, 4, 4), and with what the value leaves, (4, 4)."""
    rest = np.empty(len(old), np.int64)
    x = np.empty(4, np.int64)
    i = 0
    for part in range(len(ends)):
        width, place, total = widths[part], 0, np.int64(0)
        product = square = np.int64(PRIOR)
        while i < ends[part]:
            before, value = old[i], new[i]
            rest[i] = 16 * value - ratio_of(before, product, square)
            kind, x[0], x[1], x[2], x[3] = neighbours(rest, i, place, kernels[part, 0], kernels[part, 1], total)
            for j in range(4):
                products[kind, j] += x[j] * rest[i]
                for k in range(4):
                    squares[kind, j, k] += x[j] * x[k]
            total += rest[i]
            product += before * value
            square += before * before
            i += 1
            place += 1
            if place == width:
                place, total = 0, np.int64(0)
                product = square = np.int64(PRIOR)


@njit(nogil=True, cache=True)
def integers(old, new, ends, widths, kernels, weights, starts, sizes, plain):  # type: ignore[no-untyped-def]
    """Symbols of integers given those before, and their plain bits; the number of each."""
    table, seen = fresh(4 * SCALE_CONTEXTS)
    above, rest = np.empty(widths.max(), np.int64), np.empty(len(old), np.int64)
    rows_table, rows_seen = fresh(2)
    held, length, used, i, k = np.uint64(0), np.uint64(0), 0, 0, 0
    stays = np.int64(0)
    row = last = np.int64(256)
    for part in range(len(ends)):
        width, place, rows, total = widths[part], 0, 0, np.int64(0)
        above[:width] = -1
        product = square = np.int64(PRIOR)
        while i < ends[part]:
            if place == 0:
                count = min(width, ends[part] - i)
                known, stays = stays, np.int64((old[i : i + count] == new[i : i + count]).all())
                starts[k], sizes[k] = part_of(rows_table, known, stays)
                k += 1
                learn(rows_table, rows_seen, known, stays)
                if stays:
                    i += count
                    continue
            before, value, column = old[i], new[i], above[place]
            scale = np.int64(SCALES[min((5 * row + 2 * (row if column < 0 else column) + last) >> 3, 65535)])
            fine = ratio_of(before, product, square)
            rest[i] = 16 * value - fine
            kind, left, up, both, mean = neighbours(rest, i, place, kernels[part, 0], kernels[part, 1], total)
            if before != 0:
                w = weights[kind]
                fine += (w[0] * left + w[1] * up + w[2] * both + w[3] * mean) >> 6
            nearest, turned, distance = split_of(fine, before)
            context, bits = 4 * scale + distance, plain_bits(scale)
            difference = nearest - value if turned else value - nearest
            symbol = min(max((difference >> bits) + 8, 0), 15)
            starts[k], sizes[k] = part_of(table, context, symbol)
            k += 1
            learn(table, seen, context, symbol)
            if symbol == 0 or symbol == 15:
                held |= np.uint64(value + 512) << length
                length += np.uint64(10)
            else:
                held |= np.uint64(difference & ((1 << bits) - 1)) << length
                length += np.uint64(bits)
            while length >= np.uint64(8):
                plain[used] = held & np.uint64(255)
                held >>= np.uint64(8)
                length -= np.uint64(8)
                used += 1
            total += rest[i]
            product += before * value
            square += before * before
            if before != 0:
                size = abs(difference) << 8
                row += (size - row) >> 5
                last += (size - last) >> 2
                above[place] = size if column < 0 else column + ((size - column) >> min(rows, 3))
            i += 1
            place += 1
            if place == width:
                place, total, rows = 0, np.int64(0), rows + 1
                product = square = np.int64(PRIOR)
    if length:
        plain[used] = held
        used += 1
    return k, used


@njit(nogil=True, cache=True)
def integers_back(state, words, plain, old, ends, widths, kernels, weights, new):  # type: ignore[no-untyped-def]
    """Fill `new`; False where the coded values end too early or too late."""
    table, seen = fresh(4 * SCALE_CONTEXTS)
    above, rest = np.empty(widths.max(), np.int64), np.empty(len(old), np.int64)
    held, length, used, word, i = np.uint64(0), np.uint64(0), 0, 0, 0
    rows_table, rows_seen = fresh(2)
    stays = np.int64(0)
    row = last = np.int64(256)
    for part in range(len(ends)):
        width, place, rows, total = widths[part], 0, 0, np.int64(0)
        above[:width] = -1
        product = square = np.int64(PRIOR)
        while i < ends[part]:
            if place == 0:
                slot = state & (TOTAL - 1)
                known, stays = stays, np.int64(symbol_at(rows_table, stays, slot))
                start, share = part_of(rows_table, known, stays)
                state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
                if state < LOWEST:
                    if word >= len(words):
                        return False
                    state = (state << 16) | np.int64(words[word])
                    word += 1
                learn(rows_table, rows_seen, known, stays)
                if stays > 1:
                    return False
                if stays:
                    end = min(i + width, ends[part])
                    new[i:end] = old[i:end]
                    i = end
                    continue
            before, column = old[i], above[place]
            scale = np.int64(SCALES[min((5 * row + 2 * (row if column < 0 else column) + last) >> 3, 65535)])
            ratio = fine = ratio_of(before, product, square)
            kind, left, up, both, mean = neighbours(rest, i, place, kernels[part, 0], kernels[part, 1], total)
            if before != 0:
                w = weights[kind]
                fine += (w[0] * left + w[1] * up + w[2] * both + w[3] * mean) >> 6
            nearest, turned, distance = split_of(fine, before)
            context, bits = 4 * scale + distance, plain_bits(scale)
            slot = state & (TOTAL - 1)
            symbol = symbol_at(table, context, slot)
            start, share = part_of(table, context, symbol)
            state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
            if state < LOWEST:
                if word >= len(words):
                    return False
                state = (state << 16) | np.int64(words[word])
                word += 1
            learn(table, seen, context, symbol)
            beyond = symbol == 0 or symbol == 15
            count = np.uint64(10 if beyond else bits)
            while length < count:
                if used >= len(plain):
                    return False
                held |= np.uint64(plain[used]) << length
                length += np.uint64(8)
                used += 1
            more = np.int64(held & ((np.uint64(1) << count) - np.uint64(1)))
            held >>= count
            length -= count
            if beyond:
                value = more - 512
                difference = nearest - value if turned else value - nearest
            else:
                difference = ((np.int64(symbol) - 8) << bits) + more
                value = nearest - difference if turned else nearest + difference
            if abs(value) > 512:
                return False
            new[i] = value
            rest[i] = 16 * value - ratio
            total += rest[i]
            product += before * value
            square += before * before
            if before != 0:
                size = abs(difference) << 8
                row += (size - row) >> 5
                last += (size - last) >> 2
                above[place] = size if column < 0 else column + ((size - column) >> min(rows, 3))
            i += 1
            place += 1
            if place == width:
                place, total, rows = 0, np.int64(0), rows + 1
                product = square = np.int64(PRIOR)
    return word == len(words) and used == len(plain) and state == LOWEST
