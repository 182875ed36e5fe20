"""The bound between two artifacts of one network, against the arrays it is about."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing import measure
from penjing.measure import between
from penjing.measure.between import Side

LIMIT = 30.0
ROUNDING = 10 ** (-LIMIT / 20)


def off(values, share, seed):
    """The values with noise of this share of their norm."""
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    return values + noise * share * np.linalg.norm(values) / np.linalg.norm(noise)


def rows(source, first, second):
    return between.rows([source], first, second, measure.split([source]), ["y"], 0.8)


def side(planned, answers):
    return Side([planned], [answers], LIMIT)


@given(
    st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.999), st.floats(0, 0.999), st.integers(0, 2**31)
)  # each side: how far its plan is from the source, and the share of the limit that its runtime uses
def test_what_passes_parity_is_within_the_bound(p_noise, q_noise, a_share, b_share, seed):
    source = np.random.default_rng(seed).standard_normal((8, 5))
    p, q = off(source, p_noise, seed + 1), off(source, q_noise, seed + 2)
    [row] = rows(source, side(p, off(p, a_share * ROUNDING, seed + 3)), side(q, off(q, b_share * ROUNDING, seed + 4)))
    assert row.holds


def test_the_bound_is_reached_where_both_use_all_of_it_in_opposite_directions():
    source = np.ones((4, 4))
    p, q = source * 1.1, source * 0.9
    [row] = rows(source, side(p, p * (1 + ROUNDING)), side(q, q * (1 - ROUNDING)))
    assert row.snr_db == pytest.approx(row.limit_db)
    assert row.limit_db == pytest.approx(-20 * math.log10(0.2 + 2 * ROUNDING))


def test_a_runtime_that_adds_more_than_parity_allows_is_beyond_it():
    source = np.random.default_rng(0).standard_normal((8, 5))
    [row] = rows(source, side(source, source), side(source, off(source, 2.1 * ROUNDING, 1)))
    assert not row.holds and row.limit_db == pytest.approx(LIMIT - 20 * math.log10(2))


def test_columns_of_small_values_are_not_hidden_by_large_ones():
    source = np.concatenate([np.full((6, 2), 100.0), np.full((6, 2), 0.1)], 1)
    wrong = source.copy()
    wrong[:, 2:] *= 1.5
    by_place = {row.place: row.holds for row in rows(source, side(source, source), side(source, wrong))}
    assert by_place == {"y": True, "y, columns 0-1 of the last axis": True, "y, columns 2-3 of the last axis": False}


def test_masked_values_do_not_make_the_bound_wide():
    source = np.random.default_rng(0).standard_normal((8, 5))
    source[:, 4] = -1e9
    wrong = source.copy()
    wrong[:, 0] += 1
    assert not all(row.holds for row in rows(source, side(source, source), side(source, wrong)))


def test_values_that_are_all_zero_may_differ_by_what_the_plans_do():
    zeros = np.zeros((4, 2))
    assert all(row.holds for row in rows(zeros, side(zeros, zeros), side(zeros + 0.1, zeros + 0.1)))
    assert not all(row.holds for row in rows(zeros, side(zeros, zeros), side(zeros, zeros + 0.1)))


def test_integers_are_equal_in_as_many_values_as_the_plans_and_parity_leave():
    source = np.arange(20)
    moved = np.where(source < 2, source + 1, source)
    far = np.where(source < 12, source + 1, source)
    [row] = rows(source, side(source, source), side(moved, moved))
    assert (row.equal, row.limit_equal, row.holds) == (0.9, pytest.approx(0.5), True)
    [row] = rows(source, side(source, source), side(moved, far))
    assert not row.holds
