"""What is coded comes back, whatever it is, and takes about as many bits as its distribution has."""

import hashlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from penjing.errors import MissingDependency
from penjing.numerics import entropy
from tests.raises import raises_case

FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}


def integers_size(values, columns):
    """Bytes of the words and plain bits."""
    _, words, plain = entropy.encode_integers(values, columns)
    return 2 * len(words) + len(plain)


def assert_integers_return(values, columns):
    values = np.asarray(values, np.int64)
    coded = entropy.encode_integers(values, columns)
    assert np.array_equal(entropy.decode_integers(coded, len(values), columns), values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=60), st.integers(1, 60))
def test_integers_return(values, columns):
    assert_integers_return(values, min(columns, len(values)))


@pytest.mark.parametrize("values", [np.arange(-300, 300), np.zeros(5000), np.full(5000, -7), [0], [-1]])
def test_integers_of_every_symbol_return(values):
    assert_integers_return(values, 7 if len(values) > 7 else 1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FLOATS)), st.data(), st.integers(1, 60))
def test_bit_patterns_of_any_floats_return(kind, data, columns):
    exponent_bits, mantissa_bits = FLOATS[kind]
    most = 2 ** (1 + exponent_bits + mantissa_bits) - 1
    special = [0, most, most >> 1, 1 << (exponent_bits + mantissa_bits)]  # 0, NaN, largest NaN, -0
    values = data.draw(st.lists(st.integers(0, most) | st.sampled_from(special), min_size=1, max_size=60))
    patterns, columns = np.array(values, np.int64), min(columns, len(values))
    coded = entropy.encode_floats(patterns, columns, exponent_bits, mantissa_bits)
    back = entropy.decode_floats(coded, len(values), columns, exponent_bits, mantissa_bits)
    assert np.array_equal(back, patterns)


@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0, 25.0])
def test_normal_integers_take_their_entropy(scale):
    values = np.clip(np.round(np.random.default_rng(0).normal(0, scale, 200_000)), -127, 127).astype(np.int64)
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    entropy_bytes = -(counts * np.log2(shares)).sum() / 8
    assert entropy_bytes < integers_size(values, 500) < 1.02 * entropy_bytes


def test_rows_of_other_scales_take_less_than_one_distribution_of_all():
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(1, 1, 400))[:, None]
    values = np.clip(np.round(random.normal(0, 1, (400, 500)) * scales), -127, 127).astype(np.int64).reshape(-1)
    _, counts = np.unique(values, return_counts=True)
    together = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert integers_size(values, 500) < 0.93 * together


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("length", [-1, 1])
def test_what_ends_too_early_or_too_late_is_refused(part, length):
    values = np.random.default_rng(0).integers(-60, 60, 500)
    state, words, plain = entropy.encode_integers(values, 20)
    altered = [state, words, plain]
    if part == 0:
        altered[0] += length
    else:
        altered[part] = altered[part][:-1] if length < 0 else np.append(altered[part], altered[part][:1])
    with pytest.raises(ValueError, match="too early or too late"):
        entropy.decode_integers(tuple(altered), len(values), 20)


def test_without_numba_the_remedy_is_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "penjing.numerics.entropy_loops", None)
    with raises_case(MissingDependency, "not-installed") as refusal:
        entropy.encode_integers(np.arange(5), 5)
    assert "penjing[pack]" in refusal.value.remedy


def test_the_format_stays_the_same_on_every_machine():
    """Files that were packed before are read with these tables: another one is another format."""
    from penjing.numerics import entropy_loops as loops

    tables = (loops.SIZES, loops.BITS, loops.SYMBOLS, loops.SCALES, loops.EXPECTED)
    contents = b"".join(table.astype("<i8").tobytes() for table in tables)
    assert hashlib.sha256(contents).hexdigest() == ("27480146a42e55afab2e8855a6f196e2ba574e0c59285ea2d9944dbf904d3566")
    state, words, plain = entropy.encode_integers(np.arange(400) * 7919 % 61 - 30, 20)
    coded = state.to_bytes(4, "little") + words.astype("<u2").tobytes() + plain.tobytes()
    assert hashlib.sha256(coded).hexdigest() == "96d5422446275a7b49ebbac8d06ed7aa77e4cc7af69d47b56990e3f1f937c872"
