from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.coupling import couple
from penjing.analyze.masked import masked
from penjing.errors import TaskError
from penjing.network.capture import capture_network
from penjing.prune import criteria
from penjing.steps.step import Context
from penjing.tasks.task import Task
from tests.analyze.topologies import Residual, scattered
from tests.raises import raises_case


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return capture_network(scattered(Residual()), (torch.randn(2, 3, 6, 6),))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(1)
    batches = [(torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,))) for _ in range(3)]
    return Task(
        example=torch.zeros(1, 3, 6, 6),
        calibration=[x for x, _ in batches],
        train=batches,
        loss=F.cross_entropy,
    )


@pytest.fixture(scope="module")
def coupling(network, task):
    return couple(network, task.call())


def scores(criterion, network, coupling, task, batches=3):
    return criteria.score_units(criterion, network, coupling, Context(task=task), batches)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_taken_over_all_weights_of_a_unit(criterion, power, network, coupling, task):
    norms = scores(criterion, network, coupling, task)["a"]
    weights = dict(network.named_parameters())
    for unit in range(12):
        mine = torch.cat([weights["a.weight"][unit].flatten(), weights["b.weight"][:, unit].flatten()])
        assert norms[unit] == pytest.approx(float(mine.abs().pow(power).sum() ** (1 / power)), rel=1e-5)


def test_scales_are_those_of_the_batch_norm(network, coupling, task):
    scales = scores("bn_scale", network, coupling, task)
    assert scales["a"] == pytest.approx(network.norm.weight.detach().abs().numpy())
    assert scales["stem"] == pytest.approx(scores("l2", network, coupling, task)["stem"])  # it has no norm


def test_distances_are_those_between_filters(network, coupling, task):
    distances = scores("geometric_median", network, coupling, task)["a"]
    filters = network.a.weight.detach().double().flatten(1)
    slow = [sum(float((filters[i] - filters[j]).norm()) for j in range(12)) for i in range(12)]
    assert distances == pytest.approx(slow, rel=1e-5)


def test_activation_is_what_the_readers_see(network, coupling, task):
    activations = scores("activation", network, coupling, task)["a"]
    with torch.no_grad():
        seen = [torch.sigmoid(network.norm(network.a(F.relu(network.stem(x))))) for x in task.calibration]
    slow = sum(x.double().mean((0, 2, 3)) for x in seen)
    assert activations == pytest.approx(slow.numpy(), rel=1e-5)


def test_taylor_is_the_derivative_by_a_factor_on_the_unit(network, coupling, task):
    importance = scores("taylor", network, coupling, task, batches=1)["a"]
    x, labels = task.train[0]
    gate = torch.ones(12, requires_grad=True)
    hook = network.b.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate[:, None, None],))
    F.cross_entropy(network(x), labels).backward()
    hook.remove()
    network.zero_grad(set_to_none=True)
    assert importance == pytest.approx(gate.grad.double().pow(2).numpy(), rel=1e-3)


def test_jacobian_is_the_mean_square_of_all_derivatives(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(1, 3)
    network = capture_network(model, (torch.randn(2, 3),))
    told = Task(example=x, calibration=[x] * 400)
    coupling = couple(network, told.call())
    importance = criteria.score_units("jacobian", network, coupling, Context(task=told), 400)["0"] / 400
    hidden = torch.tanh(model[0](x))[0]
    slow = [(hidden[u] * model[2].weight[:, u]).pow(2).sum().item() / 2 for u in range(4)]
    assert importance == pytest.approx(slow, rel=0.25)  # 400 random directions


def test_first_order_scores_rank_units_as_removing_them_does(network, coupling, task):
    importance = scores("taylor", network, coupling, task)["a"]
    (x, labels), *_ = task.train
    base = float(F.cross_entropy(network(x), labels))
    true = [abs(float(F.cross_entropy(masked(network, coupling, {"a": [u]})(x), labels)) - base) for u in range(12)]
    assert np.corrcoef(np.argsort(np.argsort(importance)), np.argsort(np.argsort(true)))[0, 1] > 0.3


def test_labels_that_are_missing_are_asked_for(network, coupling):
    told = Task(example=torch.zeros(1, 3, 6, 6), calibration=[torch.zeros(2, 3, 6, 6)])
    with raises_case(TaskError, "no-training-data") as caught:
        scores("taylor", network, coupling, told)
    assert "jacobian" in caught.value.remedy
    with raises_case(TaskError, "no-loss"):
        scores("taylor", network, coupling, replace(told, train=[(told.calibration[0], torch.zeros(2))]))


def test_relative_scores_have_a_mean_of_one():
    normalized = criteria.relative({"a": np.array([1.0, 3.0]), "b": np.zeros(3)})
    assert normalized["a"].tolist() == [0.5, 1.5]
    assert normalized["b"].tolist() == [0, 0, 0]
