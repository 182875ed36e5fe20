"""Floats on grids: recognized from the floats alone, and packed as whole numbers."""

import lzma

import numpy as np
import pytest

pytest.importorskip("numba")

from penjing.numerics import quarter_octaves
from penjing.storage import chunks, grids

RANDOM = np.random.default_rng(0)


def on_grids(rows=64, columns=200, scale=6):
    steps = quarter_octaves.nearest_step(np.exp(RANDOM.normal(-5, 2, rows)))
    numbers = np.round(RANDOM.laplace(0, scale, (rows, columns))) + 0.0
    return steps, numbers, (numbers * steps[:, None]).astype(np.float32).reshape(-1)


def test_steps_and_numbers_follow_from_the_floats():
    steps, numbers, values = on_grids()
    places, again = quarter_octaves.recognized(values, 200)
    assert np.array_equal(quarter_octaves.step_of(places), steps)
    assert np.array_equal(again.reshape(numbers.shape), numbers)
    assert np.array_equal(quarter_octaves.floats(places, again, 200), values)


def test_a_step_is_within_an_eighth_of_an_octave():
    wished = np.exp(RANDOM.uniform(-20, 20, 1000))
    assert np.abs(np.log2(quarter_octaves.nearest_step(wished) / wished)).max() < 0.135


@pytest.mark.parametrize(
    "values",
    [
        RANDOM.normal(size=40), [-0.0, 1], [np.inf, 1], [np.nan, 1], [1e-40, 1], [3e38, 1e-38], [1 / 3, 2 / 3],
    ],
)  # fmt: skip
def test_other_floats_lie_on_no_grid(values):
    assert quarter_octaves.recognized(np.array(values, np.float32), 2) is None


@pytest.mark.parametrize(
    "numbers", [[0, 0, 0], [5, 0, 0], [30_000, 1, -30_000], [127, -127, 128, -128, 126], [4, 2, 6, 8], [1]]
)
def test_unusual_numbers_return(numbers):
    values = np.array(numbers, np.float32) * np.float32(0.181)
    values = np.round(values / 0.181).astype(np.float32) * np.float32(181 / 1024)
    coded = grids.encode(values, len(values), 1)
    assert np.array_equal(grids.decode(coded, len(values), len(values)), values)


def test_a_chunk_takes_the_whole_numbers_and_not_the_floats():
    _, numbers, values = on_grids(64, 900)
    coding, coded = chunks.encode(values.view(np.uint8), "f32", 900, 1)
    small = len(lzma.compress(numbers.astype(np.int8).tobytes(), preset=9))
    assert coding == "grids" and len(coded) < small
    assert chunks.decode(coding, coded, "f32", 900, values.nbytes) == values.tobytes()


def test_damaged_chunks_are_refused():
    _, _, values = on_grids(8, 40, 80)
    coded = grids.encode(values, 40, 1)
    for case in range(300):
        data = bytearray(coded)
        data[RANDOM.integers(len(data))] ^= 1 << RANDOM.integers(8)
        data = data[: RANDOM.integers(len(data))] if case % 4 == 0 else data
        try:
            again = grids.decode(bytes(data), 320, 40)
        except (ValueError, lzma.LZMAError, LookupError, ArithmeticError, TypeError, RuntimeError):
            continue  # what `penjing.records.reading.UNREADABLE` names
        except Exception as error:
            assert type(error).__name__ == "error"  # of struct
            continue
        assert again.shape == values.shape
