import itertools

import pytest
import torch

from penjing.numerics.codebooks import GRIDS, kmeans, nearest, placed


def error(values, weights, entries):
    return float((weights * (values - entries[nearest(values, entries)]).square()).sum())


def slowest(values, weights, count):
    """The least error over every way to cut the sorted values into parts."""
    order = values.argsort()
    values, weights = values[order], weights[order]
    errors = []
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        parts = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, len(values)))]
        means = [(weights[p] * values[p]).sum() / weights[p].sum() for p in parts]
        errors.append(sum(float((weights[p] * (values[p] - m) ** 2).sum()) for p, m in zip(parts, means, strict=True)))
    return min(errors)


@pytest.mark.parametrize("seed", range(4))
def test_few_values_get_the_best_entries_that_there_are(seed):
    torch.manual_seed(seed)
    values, weights = torch.randn(14).double(), torch.rand(14).double() ** 4
    for count in (2, 3, 5):
        entries = kmeans(values, weights, count)
        assert len(entries) == count and error(values, weights, entries) <= slowest(values, weights, count) * 1.0001


def test_every_entry_is_the_mean_of_its_values_and_beats_a_uniform_grid():
    torch.manual_seed(0)
    values, weights = torch.randn(20000) ** 3, torch.rand(20000)
    entries = kmeans(values, weights, 16)
    index = nearest(values, entries)
    for k, entry in enumerate(entries):
        mine = index == k
        assert float((weights[mine] * values[mine]).sum() / weights[mine].sum()) == pytest.approx(
            float(entry), abs=2e-4
        )
    uniform = torch.linspace(float(values.min()), float(values.max()), 16)
    assert error(values, weights, entries) < 0.2 * error(values, weights, uniform)


def test_weights_draw_the_entries():
    values = torch.cat([torch.linspace(0, 1, 100), torch.linspace(9, 10, 100)])
    weights = torch.cat([torch.ones(100), torch.full((100,), 1e-9)])
    assert (kmeans(values, weights, 4) < 2).sum() == 4 and (kmeans(values, None, 4) < 2).sum() == 2
    assert torch.equal(kmeans(values, torch.zeros(200), 4), kmeans(values, None, 4))


def test_few_distinct_values_are_the_entries():
    values = torch.tensor([3.0, -1.0, 3.0, 0.5])
    assert kmeans(values, None, 8).tolist() == [-1.0, 0.5, 3.0]
    assert nearest(torch.tensor([-9.0, 0.6, 2.9]), torch.tensor([-1.0, 0.5, 3.0])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_is_symmetric_holds_zero_and_takes_its_bits(grid, bits):
    torch.manual_seed(0)
    entries = placed(torch.randn(5000).double(), None, grid, bits)
    assert 2 < len(entries) <= 2**bits and 0.0 in entries.tolist()
    torch.testing.assert_close(entries, -entries.flip(0))


def test_the_steps_are_those_of_the_grid():
    torch.manual_seed(0)
    values = torch.randn(5000).double() ** 3
    positive = {grid: (e := placed(values, None, grid, 4))[e > 0] for grid in GRIDS}
    assert positive["uniform"].diff().unique().numel() <= 2 or positive["uniform"].diff().std() < 1e-12
    torch.testing.assert_close(positive["powers_of_two"][1:], 2 * positive["powers_of_two"][:-1])
    steps = positive["piecewise"].diff()
    assert steps[0] < 0.5 * steps[-1] and torch.allclose(steps[0], steps[1]) and torch.allclose(steps[-1], steps[-2])
    errors = {grid: error(values, torch.ones(5000).double(), placed(values, None, grid, 4)) for grid in GRIDS}
    assert errors["piecewise"] < 0.8 * errors["uniform"]
    assert error(values, torch.ones(5000).double(), kmeans(values, None, 15)) < min(errors.values())


def test_the_scale_follows_the_weights():
    values = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([20.0])])
    weights = torch.ones(201)
    assert placed(values, weights, "uniform", 4).max() > 15
    weights[-1] = 1e-6
    assert placed(values, weights, "uniform", 4).max() < 6
