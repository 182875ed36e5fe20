import itertools

import pytest
import torch

from penjing.numerics.codebooks import kmeans, nearest


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
