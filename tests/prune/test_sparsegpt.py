import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import PruningError, RecipeError
from penjing.network.capture import capture_network
from penjing.prune import Magnitude, SparseGPT, Wanda
from penjing.prune.masks import Pattern
from penjing.prune.sparsegpt import prune_columns
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.prune.every_layer import TASK, bits, draft, zeros
from tests.raises import raises_case, raises_setting


def slow(weight, hessian, sparsity, pattern, width, block, damping):
    """Optimal brain surgeon of one group, column by column, with the inverse of what is left after every column."""
    weight, (rows, columns) = weight.clone(), weight.shape
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    pivots, left = [], inverse.clone()
    inverses = []
    for _ in range(columns):
        inverses.append(left.clone())
        pivots.append(float(left[0, 0]))
        left = (left - torch.outer(left[:, 0], left[0]) / left[0, 0])[1:, 1:]
    gone, removed = torch.zeros(rows, columns, dtype=torch.bool), 0
    for j in range(columns):
        if pattern.unstructured and j % block == 0:
            last = min(j + block, columns)
            count = int(sparsity * rows * last + 1e-6) - removed
            removed += count
            costs = [(float(weight[r, c] ** 2 / pivots[c]), r, c) for r in range(rows) for c in range(j, last)]
            for _, r, c in sorted(costs)[:count]:
                gone[r, c] = True
        if pattern.of and j % width % pattern.of == 0 and j % width + pattern.of <= width:
            for r in range(rows):
                costs = [(float(weight[r, c] ** 2 / pivots[c]), c) for c in range(j, j + pattern.of)]
                for _, c in sorted(costs)[: pattern.of - pattern.kept]:
                    gone[r, c] = True
        for r in range(rows):
            if gone[r, j]:
                weight[r, j:] -= weight[r, j] / inverses[j][0, 0] * inverses[j][0]
                weight[r, j] = 0
    return weight


@pytest.mark.parametrize(("pattern", "width"), [("unstructured", 14), ("2:4", 14), ("1:2", 7), ("2:4", 7)])
@pytest.mark.parametrize("block", [1, 4, 5, 128])
def test_it_is_optimal_brain_surgeon_column_by_column(pattern, width, block):
    torch.manual_seed(0)
    weight = torch.randn(2, 5, 14, dtype=torch.float64)
    x = torch.randn(2, 40, 14, dtype=torch.float64) @ torch.randn(2, 14, 14, dtype=torch.float64)
    second = x.transpose(1, 2) @ x
    pruned = prune_columns(weight, second, 0.6, Pattern.parse(pattern), width=width, block=block, damping=0.01)
    for group in range(2):
        expected = slow(weight[group], second[group], 0.6, Pattern.parse(pattern), width, block, 0.01)
        torch.testing.assert_close(pruned[group], expected, rtol=1e-7, atol=1e-9)
        if pattern == "unstructured":
            assert int((pruned[group] == 0).sum()) == int(0.6 * 5 * 14)


def correlated(count, seed):
    mix = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1.5, 48))
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed)) @ mix.T


def test_its_output_errs_less_than_that_of_others():
    torch.manual_seed(0)
    start = Draft(capture_network(nn.Linear(48, 32), (correlated(2, 0),)))
    context = Context(task=Task(example=correlated(1, 0), calibration=[correlated(128, s) for s in range(8)]))
    x, errors = correlated(512, 99), {}
    for step in (SparseGPT(samples=1024, block=16), Magnitude(scope="per_layer"), Wanda()):
        pruned = step(start, context)
        assert int((pruned.network.get_parameter(pruned.sparse[0]) == 0).sum()) == 768
        with torch.no_grad():
            errors[type(step)] = float((pruned.network(x) - start.network(x)).square().mean())
    assert errors[SparseGPT] < 0.6 * min(errors[Magnitude], errors[Wanda])


def test_a_network_of_convolutions_and_linear_layers():
    start = draft()
    before = bits(start)
    told = []
    context = Context(task=TASK, events=lambda kind, **values: told.append((kind, values)))
    pruned = SparseGPT(sparsity=0.6)(start, context)
    assert [zeros(pruned, n) for n in ("stem", "grouped", "up", "head")] == [129, 2 * int(0.6 * 216), 0, 18]
    assert ("covered", {"step": "SparseGPT", "layers": 3, "total": 4}) in told  # the transposed one stays whole
    assert pruned.sparse == ("stem.weight", "grouped.weight", "head.weight")
    for name, value in pruned.network.state_dict().items():
        assert name in pruned.sparse or torch.equal(value, before[name])


def test_n_of_m_holds_along_the_input_channels():
    pruned = SparseGPT(pattern="2:4", block=10)(draft(), Context(task=TASK))
    assert (pruned.network.grouped.weight.count_nonzero(1) == 2).all()
    assert (pruned.network.head.weight[:, :4].count_nonzero(1) == 2).all()
    assert pruned.network.head.weight[:, 4:].all() and pruned.network.stem.weight.all()


@pytest.mark.parametrize("pattern", ["unstructured", "1:2"])
def test_zeros_that_are_there_stay(pattern):
    context = Context(task=TASK)
    first = Magnitude(sparsity=0.8, criterion="random")(draft(), context)
    second = SparseGPT(pattern=pattern)(first, context)
    for name in ("stem", "grouped", "head"):
        gone = first.network.get_parameter(f"{name}.weight") == 0
        assert (second.network.get_parameter(f"{name}.weight")[gone] == 0).all()


def test_inputs_that_are_always_zero_do_no_harm():
    torch.manual_seed(0)
    x = torch.randn(16, 6) * torch.tensor([1.0, 1, 0, 1, 0, 1])
    start = Draft(capture_network(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (x,)))
    with torch.no_grad():
        start.network.get_submodule("0").bias.fill_(-99)  # the second layer sees nothing but zeros
    pruned = SparseGPT()(start, Context(task=Task(example=x[:1], calibration=[x])))
    assert all(torch.isfinite(p).all() for p in pruned.network.parameters())
    assert [zeros(pruned, n) for n in ("0", "2")] == [12, 4]
    assert (pruned.network.get_submodule("0").weight[:, [2, 4]] == 0).all()  # what costs nothing goes first


def test_layers_it_does_not_reach():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 3, 2)

        def forward(self, x):
            return F.relu(self.conv(x))

    x = torch.randn(2, 2, 4, 4, 4)
    start = Draft(capture_network(Deep(), (x,)))
    with raises_case(PruningError, "nothing-to-prune"):
        SparseGPT()(start, Context(task=Task(example=x[:1], calibration=[x])))


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 1}, {"pattern": "1x4"}, {"pattern": "5:4"}, {"block": 0}, {"damping": 0}, {"samples": 0},
        {"samples": True},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    with raises_setting(*settings):
        SparseGPT(**settings)


def test_a_sparsity_that_contradicts_the_pattern_is_refused():
    with raises_case(RecipeError, "contradiction") as caught:
        SparseGPT(sparsity=0.4, pattern="2:4")
    assert caught.value.field == "sparsity"
