"""The compiled loops of `penjing.numerics.delta` for floats. Importing this module needs numba.

As in `entropy_loops`, reading words and plain bits is written out in every loop.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from penjing.numerics.delta_integers_loops import learn
from penjing.numerics.entropy_loops import LOWEST, TOTAL, TOTAL_BITS, fresh, part_of, symbol_at

LEVELS = 64  # contexts of an expected length, in steps of half a bit from -4 on
BECAME_ZERO, ELSE = 14, 15  # symbols besides the length of the difference
FAR = 15  # symbol of an exponent far below the largest


@njit(inline="always")
def length_of(value):  # type: ignore[no-untyped-def]
    """Number of bits of a magnitude."""
    bits = np.int64(0)
    while value:
        value >>= 1
        bits += 1
    return bits


@njit(inline="always")
def mean_of(row, column, last):  # type: ignore[no-untyped-def]
    """What the row, the column (-1: nothing is above) and the latest values let expect."""
    return (3 * row + last) >> 2 if column < 0 else (3 * row + 3 * column + 2 * last) >> 3


@njit(inline="always")
def level_of(expected):  # type: ignore[no-untyped-def]
    """The context of sixteen times an expected length, and the length that the symbol 0 stands for in it."""
    return min(max((expected + 64) >> 3, 0), LEVELS - 1), max((expected >> 4) - 8, 0)


@njit(nogil=True, cache=True)
def floats(old, new, ends, widths, exponent_bits, mantissa_bits, starts, sizes, plain):  # type: ignore[no-untyped-def]
    """Symbols of floats given those before, and their plain bits; the number of each. The first byte is `largest`."""
    table, seen = fresh(LEVELS + 2)
    fine, fine_seen = fresh(BECAME_ZERO)
    far, far_seen = fresh(16)
    above = np.empty(widths.max(), np.int64)
    ones, low = (1 << exponent_bits) - 1, (1 << mantissa_bits) - 1
    magnitudes = (1 << (mantissa_bits + exponent_bits)) - 1
    largest = np.int64(0)
    for i in range(len(new)):
        largest = max(largest, (new[i] >> mantissa_bits) & ones)
    plain[0] = largest
    held, length, used, k, i = np.uint64(0), np.uint64(0), 1, 0, 0
    row = last = np.int64((largest - 3 + mantissa_bits // 2) << 4)
    zero = np.int64(0)
    for part in range(len(ends)):
        width, place = widths[part], 0
        above[:width] = -1
        while i < ends[part]:
            before, value, column = old[i], new[i], above[place]
            exponent = max((before >> mantissa_bits) & ones, 1)
            context, least = level_of(mean_of(row, column, last) - (exponent << 4))
            if before == 0:
                context = LEVELS + zero
            flipped = np.int64((before ^ value) > magnitudes)
            difference = (value & magnitudes) - (before & magnitudes)
            size = abs(difference)
            bits = length_of(size)
            if value == 0:
                symbol = np.int64(BECAME_ZERO)
            elif before == 0 or flipped or bits > mantissa_bits or bits > least + 13 or 0 < bits <= least:
                symbol = np.int64(ELSE)
            else:
                symbol = bits - least if bits else np.int64(0)
            starts[k], sizes[k] = part_of(table, context, symbol)
            k += 1
            learn(table, seen, context, symbol)
            zero = np.int64(value == 0)
            more, count = np.int64(0), np.int64(0)
            level = (exponent << 4) - 32
            if symbol == ELSE:
                after = (value >> mantissa_bits) & ones
                below = min(largest - after, FAR)
                other = min(max(largest - exponent, 0), 15)
                starts[k], sizes[k] = part_of(far, other, below)
                k += 1
                learn(far, far_seen, other, below)
                sign = value >> (mantissa_bits + exponent_bits)
                more = (value & low) | (sign << mantissa_bits)
                count = mantissa_bits + 1
                if below == FAR:
                    more |= after << count
                    count += exponent_bits
                level = (max(exponent, after) + mantissa_bits + 1) << 4
            elif 0 < symbol < BECAME_ZERO:
                count = max(bits - 4, np.int64(0))
                top = (size ^ (1 << (bits - 1))) >> count
                first = top | (np.int64(difference < 0) << 3)
                starts[k], sizes[k] = part_of(fine, symbol, first)
                k += 1
                learn(fine, fine_seen, symbol, first)
                more = size & ((1 << count) - 1)
                level = ((exponent + bits) << 4) + ((top << (5 - bits)) if bits < 5 else 2 * top)
            held |= np.uint64(more) << length
            length += np.uint64(count)
            while length >= np.uint64(8):
                plain[used] = held & np.uint64(255)
                held >>= np.uint64(8)
                length -= np.uint64(8)
                used += 1
            if symbol != BECAME_ZERO:
                row += (level - row) >> 5
                last += (level - last) >> 2
                above[place] = level if column < 0 else column + ((level - column) >> 2)
            i += 1
            place += 1
            if place == width:
                place = 0
    if length:
        plain[used] = held
        used += 1
    return k, used


@njit(nogil=True, cache=True)
def floats_back(state, words, plain, old, ends, widths, exponent_bits, mantissa_bits, new):  # type: ignore[no-untyped-def]
    """Fill `new` with bit patterns; False where the coded values end too early or too late, or are none."""
    table, seen = fresh(LEVELS + 2)
    fine, fine_seen = fresh(BECAME_ZERO)
    far, far_seen = fresh(16)
    above = np.empty(widths.max(), np.int64)
    ones, low = (1 << exponent_bits) - 1, (1 << mantissa_bits) - 1
    magnitudes = (1 << (mantissa_bits + exponent_bits)) - 1
    if len(plain) == 0:
        return False
    largest = np.int64(plain[0])
    held, length, used, word, i = np.uint64(0), np.uint64(0), 1, 0, 0
    row = last = np.int64((largest - 3 + mantissa_bits // 2) << 4)
    zero = np.int64(0)
    for part in range(len(ends)):
        width, place = widths[part], 0
        above[:width] = -1
        while i < ends[part]:
            before, column = old[i], above[place]
            exponent = max((before >> mantissa_bits) & ones, 1)
            context, least = level_of(mean_of(row, column, last) - (exponent << 4))
            if before == 0:
                context = LEVELS + zero
            slot = state & (TOTAL - 1)
            symbol = np.int64(symbol_at(table, context, slot))
            start, share = part_of(table, context, symbol)
            state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
            if state < LOWEST:
                if word >= len(words):
                    return False
                state = (state << 16) | np.int64(words[word])
                word += 1
            learn(table, seen, context, symbol)
            count, bits, second = np.int64(0), np.int64(0), np.int64(0)
            if symbol == ELSE:
                other = min(max(largest - exponent, 0), 15)
                slot = state & (TOTAL - 1)
                second = np.int64(symbol_at(far, other, slot))
                start, share = part_of(far, other, second)
                learn(far, far_seen, other, second)
                count = mantissa_bits + 1 + (exponent_bits if second == FAR else 0)
            elif 0 < symbol < BECAME_ZERO:
                bits = symbol + least
                if bits > mantissa_bits:
                    return False
                slot = state & (TOTAL - 1)
                second = np.int64(symbol_at(fine, symbol, slot))
                start, share = part_of(fine, symbol, second)
                learn(fine, fine_seen, symbol, second)
                count = max(bits - 4, np.int64(0))
            if symbol == ELSE or bits:
                state = np.int64(share) * (state >> TOTAL_BITS) + slot - start
                if state < LOWEST:
                    if word >= len(words):
                        return False
                    state = (state << 16) | np.int64(words[word])
                    word += 1
            while length < np.uint64(count):
                if used >= len(plain):
                    return False
                held |= np.uint64(plain[used]) << length
                length += np.uint64(8)
                used += 1
            more = np.int64(held & ((np.uint64(1) << np.uint64(count)) - np.uint64(1)))
            held >>= np.uint64(count)
            length -= np.uint64(count)
            level = (exponent << 4) - 32
            value = before
            if symbol == BECAME_ZERO:
                value = np.int64(0)
            elif symbol == ELSE:
                after = more >> (mantissa_bits + 1) if second == FAR else max(largest - second, 0)
                sign = (more >> mantissa_bits) & 1
                value = (more & low) | (after << mantissa_bits) | (sign << (mantissa_bits + exponent_bits))
                level = (max(exponent, after) + mantissa_bits + 1) << 4
            elif bits:
                top = second & 7
                size = ((1 << (bits - 1)) | (top << count)) + more
                magnitude = (before & magnitudes) + (-size if second & 8 else size)
                if magnitude < 0 or magnitude > magnitudes:
                    return False
                value = magnitude | (before & (magnitudes + 1))
                level = ((exponent + bits) << 4) + ((top << (5 - bits)) if bits < 5 else 2 * top)
            zero = np.int64(value == 0)
            new[i] = value
            if symbol != BECAME_ZERO:
                row += (level - row) >> 5
                last += (level - last) >> 2
                above[place] = level if column < 0 else column + ((level - column) >> 2)
            i += 1
            place += 1
            if place == width:
                place = 0
    return word == len(words) and used == len(plain) and state == LOWEST
