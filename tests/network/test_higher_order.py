"""Conditions on values, and regions with other settings, become one graph; sizes that depend on values are taken."""

import pickle

import pytest
import torch
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.network.graph import shapes
from penjing.network.portable import Portable
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.route = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)


class Chooses(Layers):
    def forward(self, x):
        return torch.cond(x.sum() > 0, self.a, self.b, (x,))


class ChoosesWithin(Layers):
    def forward(self, x):
        def outer(y):
            return torch.cond(y.mean() > 0.1, lambda z: z * 2, lambda z: z - 1, (y,)).relu()

        return self.b(torch.cond(x.sum() > 0, outer, lambda y: y - 1, (self.a(x),)))


class Regions(Layers):
    def forward(self, x):
        with torch.enable_grad():
            y = self.a(x)
        return self.b(y).relu()


class Routes(Layers):
    def forward(self, x):
        chosen, y = self.route(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate((self.a, self.b)):
            rows = torch.where(chosen == i)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return x + y


class Selects(Layers):
    def forward(self, x):
        return x[self.route(x)[..., 0] > 0]


@pytest.mark.parametrize("make", [Chooses, ChoosesWithin, Regions, Routes, Selects])
def test_the_same_in_torch_and_in_the_runtimes(make, tmp_path):
    net = make().eval()
    network = capture_network(net, (torch.zeros(1, 8),))
    task = Task(example=torch.zeros(1, 8))
    batches = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 5, 33)]
    batches[2] = -batches[1]
    with torch.no_grad():
        answers = [net(x) for x in batches]
        assert all(torch.allclose(network(x), y, atol=1e-6) for x, y in zip(batches, answers, strict=True))
        _, structure = flatten_outputs(answers[0])
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(Draft(network), runtime, "fp32", task, structure, folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        for x, y in zip(batches, answers, strict=True):
            assert torch.allclose(torch.from_numpy(predict(x.numpy())), y, atol=1e-5)


def test_layers_of_a_branch_are_layers_under_their_names():
    network = capture_network(Chooses(), (torch.zeros(1, 8),))
    assert type(network.get_submodule("a")) is nn.Linear
    assert type(network.get_submodule("b")) is nn.Linear
    assert not any("graph" in name for name, _ in network.named_modules())


def test_a_size_that_depends_on_values_is_that_of_the_example():
    network = capture_network(Selects(), (torch.zeros(1, 8),))
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    last = next(node for node in reversed(network.graph.nodes) if node.op == "call_function")
    assert shapes(network, ((x,), {}))[last.name].shape == network(x).shape


def test_a_condition_on_a_size_is_refused():
    class OnSize(Layers):
        def forward(self, x):
            return torch.cond(x.shape[0] > 3, self.a, self.b, (x,))

    with raises_case(ExportError, "condition-on-size"):
        capture_network(OnSize(), (torch.zeros(1, 8),))


def test_layers_that_choose_rows_or_are_given_chosen_ones_stay_in_floating_point():
    network = capture_network(Routes(), (torch.zeros(1, 8),))
    marked = {str(node.target) for node in network.graph.nodes if "float" in node.meta}
    assert marked == {"route", "a", "b"}


def test_another_process_knows_too_what_stays_in_floating_point():
    network = capture_network(Routes(), (torch.zeros(1, 8),))
    again = pickle.loads(pickle.dumps(Portable.of(network))).network()
    assert [node.meta for node in again.graph.nodes] == [node.meta for node in network.graph.nodes]
