import math

import numpy as np
import pytest

from penjing.numerics import vbmf


def planted(rows, columns, rank, noise, seed=0):
    random = np.random.default_rng(seed)
    product = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    return product + noise * random.normal(size=(rows, columns))


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (80, 80)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_planted_rank_comes_back(shape, rank):
    assert vbmf.rank(planted(*shape, rank, 0.5)) == rank


def test_noise_alone_has_none_and_neither_have_zeros():
    assert vbmf.rank(planted(60, 200, 1, 1.0)[:, :1] * 0) == 0
    assert vbmf.rank(np.random.default_rng(0).normal(size=(60, 200))) == 0


def test_without_noise_the_rank_is_the_matrix_own():
    assert vbmf.rank(planted(40, 90, 6, 0.0)) == 6


def free_energy_of_one(x, alpha, counts):
    """Free energy that a singular value, γ² = x·M·σ², adds: as noise, or as a component of its own."""
    if not counts:
        return x - math.log(x)
    tau = 0.5 * (x - (1 + alpha) + math.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))
    return x - tau + math.log((tau + 1) / x) + alpha * math.log(tau / alpha + 1)


@pytest.mark.parametrize("shape", [(30, 90), (50, 60)])
def test_the_noise_and_the_rank_are_those_of_a_search_over_all_variances(shape):
    matrix = planted(*shape, 4, 0.7, seed=2)
    short, long = shape
    squares, alpha = np.linalg.svd(matrix, compute_uv=False) ** 2, short / long
    # The slow way: every variance of a fine grid, and for each singular value the smaller of the two energies.
    best = (math.inf, 0.0, 0)
    for variance in np.geomspace(squares[-1] / long / 4, squares.sum() / (short * long), 4000):
        energy, rank = 0.0, 0
        for square in squares:
            x = square / (long * variance)
            alone = free_energy_of_one(x, alpha, False)
            component = free_energy_of_one(x, alpha, True) if x > (1 + math.sqrt(alpha)) ** 2 else math.inf
            energy, rank = energy + min(alone, component), rank + (component < alone)
        best = min(best, (energy, float(variance), rank))
    assert vbmf.noise_variance(squares, long) == pytest.approx(best[1], rel=5e-3)
    assert vbmf.rank(matrix) == best[2] == 4


def test_the_threshold_is_where_both_energies_are_equal():
    for short, long in ((10, 100), (50, 60), (80, 80)):
        limit, alpha = vbmf.threshold(short, long), short / long
        energies = [free_energy_of_one(limit, alpha, counts) for counts in (True, False)]
        assert energies[0] == pytest.approx(energies[1], abs=2e-3)
