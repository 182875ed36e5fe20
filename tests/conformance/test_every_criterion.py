"""What every importance score promises, of whole units and of single weights. `CRITERIA` is its own list of rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from penjing.analyze.coupling import couple
from penjing.network.capture import capture_network
from penjing.prune import Channels, Magnitude, criteria
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.analyze.topologies import Residual, scattered

of_units = pytest.mark.parametrize("criterion", criteria.OF_UNITS)
of_weights = pytest.mark.parametrize("criterion", criteria.OF_WEIGHTS)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return capture_network(scattered(Residual()), (torch.randn(2, 3, 6, 6),))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(1)
    batches = [(torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,))) for _ in range(3)]
    return Task(
        example=torch.zeros(1, 3, 6, 6), calibration=[x for x, _ in batches], train=batches, loss=F.cross_entropy
    )


def units(criterion, network, task, seed=0):
    coupling = couple(network, task.call())
    return criteria.score_units(criterion, network, coupling, Context(task=task, seed=seed), 3)


def weights(criterion, network, task, seed=0):
    modules = {name: network.get_submodule(name) for name in ("stem", "a")}
    scores = criteria.score_weights(criterion, network, modules, Context(task=task, seed=seed), 3)
    return {name: np.asarray(score.detach() if isinstance(score, torch.Tensor) else score)
            for name, score in scores.items()}  # fmt: skip


def state(network):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return tensors, [part.training for part in network.modules()], [len(m._forward_hooks) + len(m._forward_pre_hooks)
                                                                   for m in network.modules()]  # fmt: skip


def unchanged(before, network):
    after = state(network)
    return all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items()) and before[1:] == after[1:]


def check(scores, network, task, before):
    torch.manual_seed(1)
    first = scores(network, task)
    torch.manual_seed(2)  # whoever draws in between must not be heard of in the result
    again = scores(network, task)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all((value >= 0).all() and np.isfinite(value).all() for value in first.values())
    assert all(len(np.unique(value)) > 1 for value in first.values())
    assert unchanged(before, network)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    return {name: value.shape for name, value in first.items()}


@of_units
def test_every_unit_has_a_score_and_the_network_stays(criterion, network, task):
    shapes = check(lambda *given: units(criterion, *given), network, task, state(network))
    assert shapes == {"stem": (8,), "a": (12,)}


@of_weights
def test_every_weight_has_a_score_and_the_network_stays(criterion, network, task):
    shapes = check(lambda *given: weights(criterion, *given), network, task, state(network))
    assert shapes == {name: tuple(network.get_submodule(name).weight.shape) for name in ("stem", "a")}


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_a_criterion_scores_something_and_recipes_hold_it(name):
    assert criteria.CRITERIA[name].name == name
    steps = [Channels(macs=0.5, criterion=name)] if name in criteria.OF_UNITS else []
    steps += [Magnitude(sparsity=0.5, criterion=name)] if name in criteria.OF_WEIGHTS else []
    assert steps
    for step in steps:
        assert Recipe.from_yaml(Recipe(step).to_yaml()).steps == (step,)
