"""The compiled loops of `penjing.numerics.copies`, which says what they do. Importing this module needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit

WINDOW = 16  # bytes that are looked up
NEAR = 6  # bytes that are worth a copy that goes on where the last one ended
STRIDE = 4  # of the places that can be looked up


@njit(inline="always")
def hash_of(content, place, bits):  # type: ignore[no-untyped-def]
    """A number below 2**bits from the bytes of a window."""
    value = np.uint64(0)
    for i in range(WINDOW):
        value = (value ^ np.uint64(content[place + i])) * np.uint64(0x100000001B3)
    return np.int64((value ^ (value >> np.uint64(29))) >> np.uint64(64 - 35)) & ((1 << bits) - 1)


@njit(nogil=True, cache=True)
def index(old, bits):  # type: ignore[no-untyped-def]
    """Hash → a place with it, or -1; of two places the first."""
    table = np.full(1 << bits, -1, np.int64)
    for place in range(0, len(old) - WINDOW + 1, STRIDE):
        slot = hash_of(old, place, bits)
        if table[slot] < 0:
            table[slot] = place
    return table


@njit(nogil=True, cache=True)
def copies(old, new, table, bits, rows):  # type: ignore[no-untyped-def]
    """Fill (literal bytes, place, bytes to copy); the number of rows."""
    count, literal, place, goes_on = 0, 0, 0, np.int64(0)
    while place < len(new):
        length = same(old, new, goes_on + place - literal, place) if goes_on + place - literal < len(old) else 0
        source = goes_on + place - literal
        if length < NEAR:
            length = 0
            if place + WINDOW <= len(new):
                source = table[hash_of(new, place, bits)]
                if source >= 0:
                    length = same(old, new, source, place)
            if length < WINDOW:
                place += 1
                continue
        while place > literal and source > 0 and old[source - 1] == new[place - 1]:
            place, source, length = place - 1, source - 1, length + 1
        rows[count] = place - literal, source, length
        count += 1
        place += length
        literal, goes_on = place, source + length
    return count


@njit(inline="always")
def same(old, new, source, place):  # type: ignore[no-untyped-def]
    """How many bytes from two places on are equal."""
    length = 0
    while source + length < len(old) and place + length < len(new) and old[source + length] == new[place + length]:
        length += 1
    return length
