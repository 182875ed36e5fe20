"""The compiled loops of `penjing.numerics.scaled_integers`, which says what they do. Importing this module needs numba.

Coder: a range variant of asymmetric numeral systems (Duda, 2014, arXiv:1311.2540) with states of 64 bits, words of 32
bits and probabilities of 16 bits. Up to four lanes, each with a state of its own, decode parts of the rows side by
side, so that the processor does not wait for one value before it begins with the next.

`model`, `histogram` and `restore` each have the choice of a value's table written out: as a common function, even an
inlined one, it makes packing and unpacking much slower.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

TOTAL_BITS = 16
TOTAL = 1 << TOTAL_BITS
LOWEST = 1 << 31  # of a state between two symbols
COARSE_BITS = 10  # of a slot, which find the first symbol that may hold it
LEVELS = 5  # of the neighbours' sum
EXACT_BITS = 46  # of a ratio; counts, the tables' unit and these have room in 63 bits
ZERO_STRENGTH = 8  # how many values the prior share of zeros counts as


@njit(nogil=True, cache=True)
def refresh(prior, strength, zero_prior, counts, zero, ends, coarse):  # type: ignore[no-untyped-def]
    """Probabilities of one table from its prior and its counts.

    Args:
        prior: Of every symbol, in any unit; that of zero is not read.
        strength: How many values the prior counts as.
        zero_prior: Share of zeros, in 1/256.
        counts: Of every symbol.
        zero: The symbol of the value 0.
        ends: Filled with cumulative probabilities.
        coarse: Filled with the first symbol that may hold a slot, by the upper bits of the slot.
    """
    size = len(counts)
    everything = unit = 0
    for i in range(size):
        everything += counts[i]
        unit += prior[i] if i != zero else 0
    free = TOTAL - size
    zeros = free * (np.int64(counts[zero]) * 256 + ZERO_STRENGTH * zero_prior)
    zeros //= (everything + ZERO_STRENGTH) * 256
    whole = (everything - counts[zero] + strength) * unit
    ratio = ((free - zeros) << EXACT_BITS) // whole if whole else np.int64(0)
    used, most = 0, zero
    for i in range(size):
        if i == zero:
            share = zeros + 1
        else:
            share = (((np.int64(counts[i]) * unit + strength * prior[i]) * ratio) >> EXACT_BITS) + 1
        ends[i + 1] = share
        used += share
        if share > ends[most + 1]:
            most = i
    ends[most + 1] += TOTAL - used
    ends[0] = 0
    bucket = 0
    for i in range(size):
        ends[i + 1] += ends[i]
        while bucket < (1 << COARSE_BITS) and (bucket << (TOTAL_BITS - COARSE_BITS)) < ends[i + 1]:
            coarse[bucket] = i
            bucket += 1


@njit(nogil=True, cache=True)
def refresh_due(prior, levels, strength, zero_priors, counts, totals, due, zero, ends, coarse):  # type: ignore[no-untyped-def]
    """Refresh the tables that have counted enough values since they were refreshed, and set when they are due again."""
    for t in range(len(counts)):
        if totals[t] >= due[t]:
            due[t] = totals[t] + max(32, totals[t] >> 1)
            at = t // levels
            refresh(prior[at], strength, zero_priors[at], counts[t], zero, ends[t], coarse[t])


@njit(nogil=True, cache=True)
def model(values, row_class, column_class, lag, lanes, low, size, prior, strength, zero_priors, bounds, parts):  # type: ignore[no-untyped-def]
    """Fill `parts`, in the order of decoding, with start, size less 1 and lane; return their number."""
    columns, count = len(column_class), len(values)
    rows = len(row_class)
    lane_rows = -(-rows // lanes)
    levels = LEVELS if lag else 1
    tables = len(prior) * levels
    counts, totals, due = np.zeros((tables, size), np.int32), np.zeros(tables, np.int64), np.zeros(tables, np.int64)
    ends, coarse = np.zeros((tables, size + 1), np.int32), np.zeros((tables, 1 << COARSE_BITS), np.uint8)
    refresh_due(prior, levels, strength, zero_priors, counts, totals, due, -low, ends, coarse)
    step, update, k = 0, 32, 0
    for r in range(lane_rows):
        for c in range(columns):
            for lane in range(lanes):
                row = lane * lane_rows + r
                i = row * columns + c
                if i >= count or row >= rows:
                    continue
                table, value = row_class[row] + column_class[c], values[i]
                if lag:
                    near = values[i - 1] if c else 0
                    if lag > 1 and c >= lag:
                        near += values[i - lag]
                    far = abs(near)
                    at = table
                    table = table * LEVELS + (far > 0) + (far > bounds[at, 0]) + (far > bounds[at, 1])
                    table += far > bounds[at, 2]
                    if near < 0:
                        value = -value
                symbol = value - low
                start = np.int64(ends[table, symbol])
                parts[k] = start | (np.int64(ends[table, symbol + 1]) - start - 1) << 16 | lane << 32
                k += 1
                counts[table, symbol] += 1
                totals[table] += 1
            step += 1
            if step == update:
                update += min(max(16, step >> 3), 4096)
                refresh_due(prior, levels, strength, zero_priors, counts, totals, due, -low, ends, coarse)
    return k


@njit(nogil=True, cache=True)
def backwards(parts, count, states, words):  # type: ignore[no-untyped-def]
    """Code the parts from the last to the first; return where the words begin."""
    place = len(words)
    for lane in range(len(states)):
        states[lane] = LOWEST
    for k in range(count - 1, -1, -1):
        part = parts[k]
        start, share, lane = np.uint64(part & 0xFFFF), np.uint64(((part >> 16) & 0xFFFF) + 1), part >> 32
        state = np.uint64(states[lane])
        if state >= share << np.uint64(47):
            place -= 1
            words[place] = state & np.uint64(0xFFFFFFFF)
            state >>= np.uint64(32)
        whole = state // share
        states[lane] = np.int64((whole << np.uint64(TOTAL_BITS)) + (state - whole * share) + start)
    return place


@njit(nogil=True, cache=True)
def restore(states, words, row_class, column_class, lag, low, size, prior, strength, zero_priors, bounds, values):  # type: ignore[no-untyped-def]
    """Fill `values`; False where the words end too early or too late. The states are used up.

    Places are unsigned, so that no code is there for places counted from the end.
    """
    lanes, columns, count = len(states), len(column_class), len(values)
    rows = len(row_class)
    lane_rows = -(-rows // lanes)
    levels = LEVELS if lag else 1
    tables = len(prior) * levels
    counts, totals, due = np.zeros((tables, size), np.int32), np.zeros(tables, np.int64), np.zeros(tables, np.int64)
    ends, coarse = np.zeros((tables, size + 1), np.int32), np.zeros((tables, 1 << COARSE_BITS), np.uint8)
    refresh_due(prior, levels, strength, zero_priors, counts, totals, due, -low, ends, coarse)
    flat_coarse, flat_ends, flat_counts = coarse.reshape(-1), ends.reshape(-1), counts.reshape(-1)
    step, update, word = 0, 32, np.uint64(0)
    word_count = np.uint64(len(words))
    for r in range(lane_rows):
        for c in range(columns):
            for lane in range(lanes):
                row = lane * lane_rows + r
                i = row * columns + c
                if i >= count or row >= rows:
                    continue
                table = row_class[np.uint64(row)] + column_class[np.uint64(c)]
                near = 0
                if lag:
                    near = values[np.uint64(i - 1)] if c else 0
                    if lag > 1 and c >= lag:
                        near += values[np.uint64(i - lag)]
                    far = abs(near)
                    scale = table
                    table = table * LEVELS + (far > 0) + (far > bounds[np.uint64(scale), 0])
                    table += (far > bounds[np.uint64(scale), 1]) + (far > bounds[np.uint64(scale), 2])
                state = states[np.uint64(lane)]
                slot = state & (TOTAL - 1)
                at_coarse = np.uint64(table << COARSE_BITS | slot >> (TOTAL_BITS - COARSE_BITS))
                at_table = np.uint64(table * (size + 1))
                at = at_table + np.uint64(flat_coarse[at_coarse])
                start = np.int64(flat_ends[at])
                after = np.int64(flat_ends[at + np.uint64(1)])
                while after <= slot:
                    at += np.uint64(1)
                    start = after
                    after = np.int64(flat_ends[at + np.uint64(1)])
                symbol = np.int64(at - at_table)
                state = (after - start) * (state >> TOTAL_BITS) + slot - start
                if state < LOWEST:
                    if word >= word_count:
                        return False
                    state = (state << 32) | np.int64(words[word])
                    word += np.uint64(1)
                states[np.uint64(lane)] = state
                flat_counts[np.uint64(table * size + symbol)] += 1
                totals[np.uint64(table)] += 1
                values[np.uint64(i)] = -(symbol + low) if near < 0 else symbol + low
            step += 1
            if step == update:
                update += min(max(16, step >> 3), 4096)
                refresh_due(prior, levels, strength, zero_priors, counts, totals, due, -low, ends, coarse)
    for lane in range(lanes):
        if states[lane] != LOWEST:
            return False
    return word == word_count


@njit(nogil=True, cache=True)
def extent(values):  # type: ignore[no-untyped-def]
    """Lowest value or 0, highest value or 0, smallest magnitude but 0, number of zeros, sum of magnitudes."""
    low = high = none = total = np.int64(0)
    hole = np.int64(1 << 16)
    for i in range(len(values)):
        value = np.int64(values[i])
        size = abs(value)
        low, high = min(low, value), max(high, value)
        none += size == 0
        hole = min(hole, size if size else np.int64(1 << 16))
        total += size
    return low, high, hole if none < len(values) else np.int64(1), none, total


@njit(nogil=True, cache=True)
def scales(values, columns, over_rows, over_columns, rows_mean, columns_mean):  # type: ignore[no-untyped-def]
    """Fill mean magnitudes by row and, relative to these, by column; where both are wanted, in turns."""
    rows = len(rows_mean)
    rows_mean[:] = 1.0
    columns_mean[:] = 1.0
    for _ in range(3 if over_rows and over_columns else 1):
        if over_rows:
            for row in range(rows):
                total, number = 0.0, 0
                for c in range(columns):
                    if row * columns + c < len(values):
                        total += (abs(values[row * columns + c]) + 0.25) / columns_mean[c]
                        number += 1
                rows_mean[row] = total / max(number, 1)
        if over_columns:
            columns_mean[:] = 0.0
            for row in range(rows):
                inverse = 1.0 / rows_mean[row]
                for c in range(columns):
                    if row * columns + c < len(values):
                        columns_mean[c] += (abs(values[row * columns + c]) + 0.25) * inverse
            for c in range(columns):
                number = rows if (rows - 1) * columns + c < len(values) else rows - 1
                columns_mean[c] /= max(number, 1)


@njit(nogil=True, cache=True)
def histogram(values, row_class, column_class, lag, low, bounds, every, counts):  # type: ignore[no-untyped-def]
    """Count the symbols of every table, in each of so many rows one, as if the others were like it."""
    columns = len(column_class)
    for row in range(0, len(row_class), every):
        start = row * columns
        of_row = row_class[row]
        for c in range(min(columns, len(values) - start)):
            i = start + c
            table, value = of_row + column_class[c], values[i]
            if lag:
                near = values[i - 1] if c else 0
                if lag > 1 and c >= lag:
                    near += values[i - lag]
                far = abs(near)
                at = table
                table = table * LEVELS + (far > 0) + (far > bounds[at, 0]) + (far > bounds[at, 1])
                table += far > bounds[at, 2]
                if near < 0:
                    value = -value
            counts[table, value - low] += every


@njit(nogil=True, cache=True)
def bits(counts, levels, prior, strength, zero_priors, zero):  # type: ignore[no-untyped-def]
    """What the counts take, coded one after another with probabilities that follow them (Dirichlet distribution)."""
    total = 0.0
    for t in range(len(counts)):
        everything = 0
        for v in counts[t]:
            everything += v
        if not everything:
            continue
        zeros = counts[t, zero]
        other = everything - zeros
        at = t // levels
        a = ZERO_STRENGTH * zero_priors[at] / 256
        b = ZERO_STRENGTH - a
        total += math.lgamma(ZERO_STRENGTH + everything) - math.lgamma(ZERO_STRENGTH)
        total -= math.lgamma(a + zeros) - math.lgamma(a) + math.lgamma(b + other) - math.lgamma(b)
        unit = 0.0
        for i in range(counts.shape[1]):
            unit += prior[at, i] if i != zero else 0
        total += math.lgamma(strength + other) - math.lgamma(strength)
        for i in range(counts.shape[1]):
            if i != zero and counts[t, i]:
                weight = max(strength * prior[at, i] / unit, 1e-6)
                total -= math.lgamma(weight + counts[t, i]) - math.lgamma(weight)
    return total / math.log(2.0)


@njit(nogil=True, cache=True)
def cross_entropies(counts, levels, logarithms, first, shifts, zero, costs):  # type: ignore[no-untyped-def]
    """Fill (shapes, shifts) with the bits of the values other than 0 at fixed probabilities.

    Args:
        counts: Of every symbol in every table.
        levels: Tables of one class.
        logarithms: Of probabilities: (shapes, classes, magnitudes).
        first: Class of the first table.
        shifts: Added to classes.
        zero: The symbol of the value 0.
        costs: (shapes, shifts).
    """
    tables, size = counts.shape
    reach = max(zero, size - 1 - zero)
    classes = -(-tables // levels)
    magnitudes = np.zeros((classes, reach + 1), np.int64)
    for t in range(tables):
        for i in range(size):
            magnitudes[t // levels, abs(i - zero)] += counts[t, i]
    for shape in range(len(logarithms)):
        for s in range(len(shifts)):
            total = 0.0
            for c in range(classes):
                at = min(max(first + c + shifts[s], 0), logarithms.shape[1] - 1)
                for m in range(1, reach + 1):
                    if magnitudes[c, m]:
                        total -= magnitudes[c, m] * logarithms[shape, at, m]
            costs[shape, s] = total
