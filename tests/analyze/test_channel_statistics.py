"""Statistics of input channels are those of the channels, whatever layer reads them and however data come in calls."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze.channel_statistics import LARGEST, MEAN_SIZES, SQUARES, collect, shared
from penjing.network.capture import capture_network
from penjing.steps.step import Context
from penjing.tasks.task import Task

CASES = {
    "linear": (nn.Linear(5, 3), (4, 5), -1),
    "tokens": (nn.Linear(5, 3), (4, 7, 5), -1),
    "conv1d": (nn.Conv1d(5, 3, 2), (4, 5, 9), 1),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (4, 6, 9, 8), 1),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), (4, 6, 5, 5), 1),
}


@pytest.mark.parametrize(("layer", "shape", "axis"), CASES.values(), ids=CASES)
def test_statistics_are_those_of_all_values_of_a_channel(layer, shape, axis):
    network = capture_network(nn.Sequential(nn.Tanh(), layer).eval(), (torch.zeros(shape),))
    data = [3 * torch.randn(shape) for _ in range(3)]
    layers = {"1": network.get_submodule("1")}
    values = torch.cat([x.tanh().movedim(axis, 0).flatten(1) for x in data], dim=1).double()
    calls = [((x,), {}) for x in data]
    assert torch.allclose(collect(network, layers, calls, SQUARES)["1"], values.square().sum(1))
    assert torch.allclose(collect(network, layers, calls, MEAN_SIZES)["1"] / 3, values.abs().mean(1))
    assert torch.equal(collect(network, layers, calls, LARGEST)["1"].double(), values.abs().amax(1))


def test_a_layer_that_is_called_twice_sees_both_and_hooks_are_gone_afterwards():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(10 * x) + self.fc(x)

    network = capture_network(Twice().eval(), (torch.zeros(2, 3),))
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.25]])
    layers = {"fc": network.get_submodule("fc")}
    assert collect(network, layers, [((x,), {})], LARGEST)["fc"].tolist() == [10, 20, 5]

    def broken():
        yield (x,), {}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(network, layers, broken(), SQUARES)
    assert not layers["fc"]._forward_pre_hooks


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.batches, self.passes = [torch.randn(size, 6, generator=generator) for size in (4, 3)], 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


READS = {"batches": {"batches": 2}, "samples": {"samples": 5}}


@pytest.mark.parametrize("amount", READS.values(), ids=READS)
def test_a_run_reads_the_data_once_for_the_same(amount):
    network, data = capture_network(model(), (torch.zeros(2, 6),)), Counted()
    told = []
    context = Context(task=Task(example=torch.zeros(2, 6), calibration=data), events=lambda _, **v: told.append(v))
    layers = {name: network.get_submodule(name) for name in "024"}
    first = shared(network, layers, context, LARGEST, **amount, label="x")
    assert told[-1] == {"label": "x", "done": 2, "total": 2}
    second = shared(network, {"2": layers["2"]}, context, LARGEST, **amount, label="x")
    assert data.passes == 1 and second["2"] is first["2"] and second.keys() == {"2"}
    x = torch.cat(data.batches)[:5] if "samples" in amount else torch.cat(data.batches)
    assert torch.equal(first["0"], x.abs().amax(0))
    shared(network, layers, context, SQUARES, **amount, label="x")  # another statistic
    assert data.passes == 2
    shared(network, layers, context, LARGEST, **{name: value - 1 for name, value in amount.items()}, label="x")
    assert data.passes == 3


def test_other_data_and_other_weights_are_read_anew():
    network, data, others = capture_network(model(), (torch.zeros(2, 6),)), Counted(), Counted(1)
    context = Context(task=Task(example=torch.zeros(2, 6), calibration=data))
    other = Context(task=Task(example=torch.zeros(2, 6), calibration=others), cache=context.cache)

    def ask(context):
        return shared(network, {"2": network.get_submodule("2")}, context, SQUARES, batches=2, label="x")["2"]

    first, second = ask(context), ask(other)
    assert (data.passes, others.passes) == (1, 1) and not torch.equal(first, second)
    nn.init.ones_(network.get_submodule("0").weight)
    assert not torch.equal(ask(context), first) and data.passes == 2


RECIPES = {
    "Wanda": [pj.prune.Wanda(sparsity=0.0), pj.prune.Wanda(sparsity=0.5)],  # the first one changes nothing
    "Channels": [
        pj.prune.Channels(macs=1.0, criterion="activation"),
        pj.prune.Channels(macs=1.0, criterion="activation"),
    ],
    "SplitOutliers": [pj.quantize.SplitOutliers(), pj.quantize.SplitOutliers(), pj.quantize.Static()],
}


@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
def test_two_steps_of_a_recipe_that_ask_for_the_same_read_the_data_once(steps):
    passes = []
    for recipe in (steps[1:], steps):
        data = Counted()
        pj.apply(pj.Recipe(*recipe), model(), Task(example=torch.zeros(2, 6), calibration=data))
        passes.append(data.passes)
    assert passes[0] == passes[1] >= 1
