"""Integers around zero come back, whatever they are, and take what rows, columns and neighbours leave to tell."""

import hashlib
import math
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from penjing.errors import MissingDependency
from penjing.numerics import magnitudes, scaled_integers
from tests.raises import raises_case

RANDOM = np.random.default_rng(0)


def whole(values, top=127):
    return np.clip(np.round(values), -top, top).astype(np.int64)


def assert_returns(values, columns, width=1):
    values = np.asarray(values, np.int64)
    coded = scaled_integers.encode(values, columns, width)
    assert np.array_equal(scaled_integers.decode(coded, len(values), columns), values)
    return coded


def entropy_bytes(values):
    """At the distribution of all values."""
    _, counts = np.unique(values, return_counts=True)
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


@settings(max_examples=200, deadline=None)
@given(st.integers(-255, 0), st.data(), st.integers(1, 80), st.integers(1, 5))
def test_any_integers_return(low, data, columns, width):
    values = data.draw(st.lists(st.integers(low, low + 255), min_size=1, max_size=80))
    assert_returns(values, min(columns, len(values)), width)


@pytest.mark.parametrize("values", [np.zeros(5000), np.full(5000, -7), [0], [-1], np.arange(-127, 128), [255, 0]])
def test_unusual_values_return(values):
    assert_returns(values, 7 if len(values) > 7 else 1, 3)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 64, 67])
@pytest.mark.parametrize("columns", [1, 2, 9, 300])
def test_every_form_of_a_matrix_returns(rows, columns):
    values = whole(RANDOM.laplace(0, 9, rows * columns))
    assert_returns(values, columns, 3)
    assert_returns(values[: len(values) - columns // 3], columns, 3)  # the last row is shorter


@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0, 25.0])
def test_normal_integers_take_their_entropy(scale):
    values = whole(RANDOM.normal(0, scale, 200_000))
    assert 0.999 * entropy_bytes(values) < len(assert_returns(values, 500)) < 1.003 * entropy_bytes(values)


def test_zeros_of_a_pruned_tensor_take_their_entropy():
    values = whole(RANDOM.normal(0, 30, 200_000))
    values[np.abs(values) < 35] = 0
    assert len(assert_returns(values, 500)) < 1.003 * entropy_bytes(values)


def test_scales_of_rows_and_of_columns_take_less_than_one_distribution_of_all():
    rows, columns = np.exp(RANDOM.normal(1, 0.7, 400))[:, None], np.exp(RANDOM.normal(0, 0.7, 500))
    normal = RANDOM.normal(0, 1, (400, 500))
    for scales, share in ((rows, 0.94), (columns * 3, 0.94), (rows * columns, 0.90)):
        values = whole(normal * scales).reshape(-1)
        assert len(assert_returns(values, 500)) < share * entropy_bytes(values)


def test_smooth_kernels_take_less_than_their_values_alone():
    kernels = RANDOM.normal(0, 12, (64, 300, 1, 1)) + RANDOM.normal(0, 6, (64, 300, 3, 3))
    values = whole(kernels).reshape(-1)
    assert len(assert_returns(values, 2700, 3)) < 0.95 * entropy_bytes(values)


def test_tables_hold_distributions_of_the_mean_magnitude_that_they_stand_for():
    for index in range(magnitudes.ZERO_CLASS, magnitudes.ZERO_CLASS + 16):
        for density in magnitudes.shapes()[:, index]:
            sizes = np.arange(magnitudes.LARGEST + 1)
            mean = 2 * (density * sizes).sum() / (density[0] + 2 * density[1:].sum())
            assert mean == pytest.approx(magnitudes.mean_of(index) - 0.25, rel=0.2)


@pytest.mark.parametrize("cut", [1, 4, 8, 40])
def test_what_ends_too_early_is_refused(cut):
    values = whole(RANDOM.normal(0, 20, 5000))
    with pytest.raises(ValueError, match="too early"):
        scaled_integers.decode(scaled_integers.encode(values, 50)[:-cut], 5000, 50)


def test_altered_bytes_are_refused_or_give_other_integers():
    """Nothing else happens: no other error, no value outside the range that the header gives."""
    values = whole(RANDOM.normal(0, 20, (60, 40)) * np.exp(RANDOM.normal(0, 1, (60, 1)))).reshape(-1)
    coded = scaled_integers.encode(values, 40)
    refused = 0
    for place in range(len(coded)):
        altered = bytearray(coded)
        altered[place] ^= 1 << place % 8
        try:
            other = scaled_integers.decode(bytes(altered), len(values), 40)
            low, high = struct.unpack_from("<hh", altered)
            assert low <= other.min() <= other.max() <= high
        except ValueError:
            refused += 1
    assert refused > 0.9 * len(coded)


def test_scales_of_scales_are_refused():
    values = whole(RANDOM.normal(0, 1, (50, 40)) * np.exp(RANDOM.normal(2, 1, (50, 1)))).reshape(-1)
    coded = bytearray(scaled_integers.encode(values, 40))
    assert coded[4] & 1  # rows have scales, which follow the head of 13 bytes and their length
    coded[13 + 4 + 4] |= 1
    with pytest.raises(ValueError, match="scales of scales"):
        scaled_integers.decode(bytes(coded), len(values), 40)


def test_without_numba_the_remedy_is_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "penjing.numerics.scaled_integers_loops", None)
    with raises_case(MissingDependency, "not-installed") as refusal:
        scaled_integers.encode(np.arange(5), 5)
    assert "penjing[pack]" in refusal.value.remedy


def test_the_format_stays_the_same_on_every_machine():
    """Files that were packed before are read with these tables: another one is another format."""
    tables = magnitudes.shapes().astype("<i8").tobytes() + magnitudes.thresholds().astype("<i8").tobytes()
    assert hashlib.sha256(tables).hexdigest() == ("e5a1c61ffefa7e10c7a2cad5c2640e3c28c2142bb995aa5bf2eed6529b2a50b5")
    values = np.arange(9000) * 7919 % 61 - 30
    coded = scaled_integers.encode(values * (1 + np.arange(9000) // 90 % 3), 90, 3)
    assert hashlib.sha256(coded).hexdigest() == "8c17b5e3925ef4fcf9f099f4ee617b709a23e31f5e22db8246e6dc6af26d68d7"
    assert math.isclose(magnitudes.mean_of(magnitudes.ZERO_CLASS), 1)
