"""What differs in size by too much gets no scale in common; what is alike keeps the plan that it has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.quantize import Static
from penjing.quantize.shared_scales import Columns
from penjing.quantize.statistics import collect
from penjing.quantize.toward_outputs import JOINS
from penjing.runtimes import isolated
from penjing.steps.cache import Cache
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

SHAPE = (3, 16, 16)


class Heads(nn.Module):
    """A trunk with two heads of 4 and 2 channels, and one that gives all 6; boxes are some hundred times larger."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.boxes, self.scores = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)
        self.all = nn.Conv2d(16, 6, 1)
        with torch.no_grad():
            self.all.weight[:4] *= 300

    def parts(self, x):
        h = F.relu(self.trunk(x))
        return self.boxes(h).flatten(2) * 300 + 200, self.scores(h).flatten(2).sigmoid()


class Split(Heads):
    def forward(self, x):
        both = torch.cat(self.parts(x), 1)
        return both[:, :4], both[:, 4:]


class AsOne(Heads):
    def forward(self, x):
        return torch.cat(self.parts(x), 1).transpose(1, 2)


class Anchors(Heads):
    """Levels are joined after boxes and scores were: what comes second must not share a scale either."""

    def forward(self, x):
        levels = [torch.cat(self.parts(y), 1) for y in (x, F.avg_pool2d(x, 2))]
        return torch.cat(levels, 2).transpose(1, 2)


class OneConvolution(Heads):
    def forward(self, x):
        return self.all(F.relu(self.trunk(x))).flatten(2).transpose(1, 2)


class Decoded(Heads):
    def forward(self, x):
        boxes, scores = self.all(F.relu(self.trunk(x))).flatten(2).transpose(1, 2).split([4, 2], -1)
        return boxes, scores.sigmoid()


class Added(Heads):
    def forward(self, x):
        h = F.relu(self.trunk(x))
        return (self.all(h) + torch.cat([self.boxes(h), self.scores(h)], 1)).flatten(2).transpose(1, 2)


class Pooled(Heads):
    def forward(self, x):
        return self.all(F.relu(self.trunk(x))).mean((2, 3))


NETWORKS = [Split, AsOne, Anchors, OneConvolution, Decoded, Added, Pooled]


def planned(network, runtime):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(16, *SHAPE, generator=generator) for _ in range(3)]
    task = Task(example=torch.zeros(2, *SHAPE), calibration=data)
    captured = capture_network(network.eval(), *task.call())
    spec = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
    return Static()(Draft(captured), Context(task=task, capabilities=spec)), task


def decibels(expected, given):
    """Of every column of the last axis by itself, the worst."""
    noise = (expected - given).square().flatten(0, -2).mean(0)
    return float(10 * torch.log10(expected.square().flatten(0, -2).mean(0) / noise).min())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_column_of_every_output_keeps_its_values(network, runtime):
    model = network()
    draft, _ = planned(model, runtime)
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = zip(*(flatten_outputs(n(x))[0] for n in (model, insert(draft.network, draft.plan))), strict=True)
    for expected, given in answers:
        if network is Split:  # channels first
            expected, given = expected.transpose(1, 2), given.transpose(1, 2)
        assert decibels(expected, given) > 20


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_artifact_keeps_them_too(runtime, tmp_path):
    model = Anchors()
    draft, task = planned(model, runtime)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    _, structure = flatten_outputs(model(x))
    build(draft, runtime, "int8", task, structure, tmp_path)
    (given,) = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    assert decibels(model(x).detach(), torch.from_numpy(given)) > 20


class Also(Heads):
    """The joined tensor is an output, and a convolution's input too."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv1d(6, 2, 1)

    def forward(self, x):
        both = torch.cat(self.parts(x), 1)
        return both, self.last(both)


def test_the_plan_says_why():
    draft, _ = planned(AsOne(), "onnxruntime")
    assert draft.plan.floats["/cat#0"] == JOINS
    draft, _ = planned(Also(), "onnxruntime")
    reason = draft.plan.floats["/cat#0"]
    assert reason.startswith("its inputs differ by ") and reason.endswith("×: they can't share a scale")
    assert 100 < float(reason.split()[4].rstrip("×:")) < 1000
    draft, _ = planned(OneConvolution(), "onnxruntime")
    assert draft.plan.floats["all"].startswith("its columns differ by ")
    assert "all:weight" in draft.plan.entries  # the weight is stored in 8 bits all the same


class Alike(Heads):
    """Branches of one size on the way to the outputs, and branches of different size that a convolution mixes."""

    def forward(self, x):
        h = F.relu(self.trunk(x))
        return torch.cat([self.boxes(h), self.scores(h)], 1)


class Mixed(Heads):
    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        h = F.relu(self.trunk(x))
        return self.last(torch.cat([self.boxes(h) * 300, self.scores(h)], 1))


@pytest.mark.parametrize("network", [Alike, Mixed])
def test_what_is_alike_or_multiplied_with_weights_stays_in_integers(network):
    draft, _ = planned(network(), "onnxruntime")
    assert not any("share a scale" in reason for reason in draft.plan.floats.values())


def test_powers_of_columns():
    columns, x = Columns(), torch.randn(6, 5, 7)
    columns.update(x[:2])
    columns.update(x[2:])
    assert torch.allclose(columns.powers()[0], x.double().square().mean((0, 2)))
    assert torch.allclose(columns.powers()[1], x.double().square().mean((0, 1)))
    columns.update(torch.randn(2, 5, 9))  # this axis varies
    assert len(columns.powers()) == 1


def test_other_data_are_observed_anew():
    """The ranges of a part of the data are not those of all, though network and number of samples are the same."""
    small, large = [torch.randn(8, *SHAPE) for _ in range(2)], [50 * torch.randn(8, *SHAPE) for _ in range(2)]
    captured = capture_network(Alike().eval(), (torch.zeros(2, *SHAPE),))
    cache = Cache()
    highs = []
    for data in (small, large, small):
        context = Context(task=Task(example=torch.zeros(2, *SHAPE), calibration=data), cache=cache)
        highs.append(collect(captured, {"x"}, context, 300)[0]["x"].high)
    assert highs[1] > 10 * highs[0] and highs[2] == highs[0]


def chain(channels, layers, kernel):
    convolutions = (nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(layers))
    return nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU()))).eval()


@pytest.mark.parametrize(("channels", "layers", "kernel"), [(32, 4, 1), (8, 3, 3), (64, 5, 1)])
def test_what_a_relu_leaves_of_like_channels_shares_a_scale(tmp_path, channels, layers, kernel):
    """Of a channel that a ReLU cuts off but for a few values, the mean square is tiny: that is no other magnitude."""
    torch.manual_seed(0)
    network, x = chain(channels, layers, kernel), torch.randn(4, channels, 12, 12)
    task = Task(example=x, calibration=[x])
    captured = capture_network(network, *task.call())
    capabilities = runtimes.get("onnxruntime").capabilities(machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities))
    assert not draft.plan.floats
    manifest = build(draft, "onnxruntime", "int8", task, flatten_outputs(network(x))[1], tmp_path)
    executed = {site: row.precision for row in isolated.executed(tmp_path, manifest) for site in row.sites}
    assert {executed[str(2 * i)] for i in range(layers)} == {"int8"}


def test_columns_of_few_values_count_by_those_and_hardly_any_by_none():
    columns, x = Columns(), torch.zeros(2, 3, 50)
    x[:, 0], x[:, 1, :10], x[0, 2, 0] = 1.0, 3.0, 1e-3
    for half in x[:, None]:
        columns.update(half.flatten(0, 1)[None])
    active = columns.active()[0]
    torch.testing.assert_close(active, torch.tensor([1.0, 9.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(columns.powers()[0][1], torch.tensor(1.8, dtype=torch.float64))
