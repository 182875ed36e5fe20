"""Binary and ternary layers: which are taken, what their weights become, and that training through them learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import prune, quantize
from penjing.errors import QuantizationError, RecipeError
from penjing.network.capture import capture_network
from penjing.numerics.signs import Signs, binary, in_bytes, ternary
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import Sign
from penjing.train.finetune import Finetune
from tests import pairs
from tests.raises import raises_case, raises_setting

SHORT = Finetune(steps=2, autocast="off", learning_rate=0.01)


@pytest.fixture(scope="module")
def task():
    return pairs.task()


@pytest.fixture(scope="module")
def source(task):
    return pairs.trained(task)


def run(step, source, task):
    return step(Draft(source), Context(task=task, source=source, seed=0))


def test_binary_is_the_sign_times_the_mean_magnitude():
    assert binary(torch.tensor([[1.0, -3.0, 0.0, -2.0]])).tolist() == [[1.5, -1.5, 1.5, -1.5]]


def test_ternary_is_zero_within_the_threshold():
    # mean magnitude 1, so 0.6 and 0.4 are within 0.7; the others have the mean 1.5
    assert ternary(torch.tensor([[0.6, -2.0, 0.4, 1.0]])).tolist() == [[0.0, -1.5, 0.0, 1.5]]


def test_bytes_are_whole_multiples_up_to_127():
    weights = in_bytes(torch.tensor([[1.27, -0.333, 0.004], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.27, -0.33, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(in_bytes(weights), weights)


def test_signs_have_no_gradient_beyond_their_reach():
    x = torch.tensor([-1.5, -0.5, 0.0, 0.25, 2.0], requires_grad=True)
    y = Signs.apply(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, 1, 1, 1]
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 1.5, 0.0]


def test_layers_between_the_first_and_the_last_are_binary(source, task):
    draft = run(quantize.Binary(finetune=SHORT), source, task)
    layers = [f"blocks.{i}.conv{j}" for i in range(3) for j in (1, 2)] + ["hidden"]
    for name in layers:
        rows = draft.network.get_parameter(f"{name}.weight").flatten(1).abs()
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert isinstance(draft.network.get_submodule(f"{name}_sign"), Sign)
        assert type(draft.network.get_submodule(name)) in (nn.Conv2d, nn.Linear)
    for name in ("stem", "head"):
        assert len(draft.network.get_parameter(f"{name}.weight").abs().unique()) > 20
    assert draft.edits[0] == {"edit": "sign_inputs", "layers": layers}


def test_the_rest_may_become_bytes_after_the_training(source, task):
    floats, whole = (run(quantize.Binary(finetune=SHORT, rest=rest), source, task) for rest in ("floats", "bytes"))
    for name in ("stem", "head"):
        weight = floats.network.get_parameter(f"{name}.weight")
        assert torch.equal(whole.network.get_parameter(f"{name}.weight"), in_bytes(weight))
        assert not torch.equal(weight, in_bytes(weight))
    assert torch.equal(whole.network.get_parameter("hidden.weight"), floats.network.get_parameter("hidden.weight"))
    with raises_setting("rest"):
        quantize.Binary(rest="nibbles")


def test_ternary_weights_read_floats(source, task):
    draft = run(quantize.Ternary(finetune=SHORT, keep=("hidden",)), source, task)
    assert [edit["edit"] for edit in draft.edits] == ["codebook"] * 6
    weight = draft.network.get_parameter("blocks.0.conv1.weight")
    assert all(len(row.unique()) == 3 and row.unique()[1] == 0 for row in weight.flatten(1))
    assert len(draft.network.hidden.weight.abs().unique()) > 20


def test_training_learns_through_signs(source, task):
    def loss(network):
        with torch.no_grad():
            return float(sum(F.cross_entropy(network(x), y) for x, y in task.train))

    settings = Finetune(epochs=6, autocast="off", learning_rate=0.01, optimizer="adamw", weight_decay=0.0)
    short, long = (run(quantize.Binary(finetune=f), source, task).network for f in (SHORT, settings))
    assert loss(long) < 0.6 * loss(short)


def test_the_input_of_a_layer_is_signs_around_thresholds(source, task):
    draft = run(quantize.Binary(finetune=SHORT), source, task)
    sign = copy.deepcopy(draft.network.get_submodule("blocks.1.conv1_sign"))
    assert sign.threshold.min() >= 0 and sign.threshold.max() > 0  # it reads a ReLU
    x = torch.rand(2, 8, 3, 3)
    expected = torch.where(x >= sign.threshold[:, None, None], 1.0, -1.0)
    assert torch.equal(sign(x), expected)
    with torch.no_grad():
        assert torch.equal(sign(x), expected)


def test_a_projection_is_taken_where_it_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.mid(F.relu(self.stem(x))).mean((2, 3)))

    x = torch.rand(2, 1, 6, 6)
    task = pairs.Task(example=x, calibration=[x], train=[(x, torch.tensor([0, 1]))], loss=F.cross_entropy)
    network = capture_network(Net(), *task.call(), task.dynamic)
    with raises_case(QuantizationError, "no-layer"):
        run(quantize.Binary(finetune=SHORT), network, task)
    draft = run(quantize.Binary(finetune=SHORT, layers=("mid",)), network, task)
    assert isinstance(draft.network.get_submodule("mid_sign"), Sign)


def test_removed_weights_stay_removed_where_they_can(source, task):
    context = Context(task=task, source=source, seed=0)
    pruned = prune.Magnitude(sparsity=0.5)(Draft(source), context)
    with raises_case(QuantizationError, "sparse"):
        quantize.Binary(finetune=SHORT)(pruned, context)
    ternary = quantize.Ternary(finetune=SHORT)(pruned, context)
    name = "blocks.0.conv1.weight"
    zeros = pruned.network.get_parameter(name) == 0
    assert zeros.any() and (ternary.network.get_parameter(name)[zeros] == 0).all()


@pytest.mark.parametrize("step, wrong", [("Binary", {"edges": 1}), ("Ternary", {"threshold": 0.0})])
def test_settings_that_make_no_sense(step, wrong):
    with pytest.raises(RecipeError):
        getattr(quantize, step)(**wrong)
