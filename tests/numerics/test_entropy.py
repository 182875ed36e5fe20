"""Floats come back, whatever they are, and their exponents take about as many bits as their distribution has."""

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


def gaussian(kind, count):
    """Bit patterns of normal numbers."""
    exponent_bits, mantissa_bits = FLOATS[kind]
    patterns = np.random.default_rng(0).normal(0, 0.03, count).astype(np.float32).view(np.uint32).astype(np.int64)
    return patterns >> 32 - 1 - exponent_bits - mantissa_bits


def test_normal_numbers_take_less_than_seven_tenths_of_bfloat16():
    patterns = gaussian("bf16", 100_000)
    _, words, plain = entropy.encode_floats(patterns, 500, *FLOATS["bf16"])
    assert 2 * len(words) + len(plain) < 0.676 * 2 * len(patterns)  # the share that DFloat11 publishes


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("length", [-1, 1])
def test_what_ends_too_early_or_too_late_is_refused(part, length):
    patterns = gaussian("bf16", 500)
    altered = list(entropy.encode_floats(patterns, 20, *FLOATS["bf16"]))
    if part == 0:
        altered[0] += length
    else:
        altered[part] = altered[part][:-1] if length < 0 else np.append(altered[part], altered[part][:1])
    with pytest.raises(ValueError, match="too early or too late"):
        entropy.decode_floats(tuple(altered), len(patterns), 20, *FLOATS["bf16"])


def test_without_numba_the_remedy_is_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "penjing.numerics.entropy_loops", None)
    with raises_case(MissingDependency, "not-installed") as refusal:
        entropy.encode_floats(gaussian("bf16", 5), 5, *FLOATS["bf16"])
    assert "penjing[pack]" in refusal.value.remedy


def test_the_format_stays_the_same_on_every_machine():
    """Files that were packed before are read with these tables: another one is another format."""
    from penjing.numerics import entropy_loops

    assert (
        hashlib.sha256(entropy_loops.SCALES.astype("<i8").tobytes()).hexdigest()
        == "67b8b5c0485d962da9ab55c2474e34be5cebdc17dcba052cc15b8a3d486063c2"
    )
    state, words, plain = entropy.encode_floats(np.arange(4000) * 7919 % 65521, 20, *FLOATS["bf16"])
    coded = state.to_bytes(4, "little") + words.astype("<u2").tobytes() + plain.tobytes()
    assert hashlib.sha256(coded).hexdigest() == "fadcab74ea715a00f8d61c4097d7d523855cbb877cb9723f16b490d053c23d75"
