"""Layers, inputs and outputs may be called anything."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import SourceError
from penjing.network.capture import capture_network
from penjing.network.exporting import export_module
from penjing.network.graph import sites
from penjing.network.naming import free_name, safe_names
from penjing.tasks.outputs import flatten_outputs
from tests.raises import raises_case

RUNTIMES = ("onnxruntime", "openvino")
HELD = ("output", "quantizers", "integers", "self", "x", "input", "weight", "lin-ear", "ünï", "1", "relu")
RENAMED = {
    "graph": "graph_", "meta": "meta_", "code": "code_", "recompile": "recompile_", "_out_spec": "_out_spec_",
    "class": "class_", "None": "None_", 'a"b': "a_b", "a'b": "a_b", "a\\b": "a_b", "a b": "a_b", "a@1": "a_1",
    "a/b": "a_b", "a:b": "a_b", "a#0": "a_0", "\n": "_", "{x}": "_x_",
}  # fmt: skip


class Chain(nn.Module):
    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.names = names

    def forward(self, x):
        for name in self.names:
            x = torch.relu(self._modules[name](x)) + 0.1
        return x


def test_names_that_can_be_held_are_kept():
    network = capture_network(Chain(HELD), (torch.zeros(1, 6),))
    assert network.meta["renamed"] == {}
    assert [name for name in sites(network) if "/" not in name] == list(HELD)


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_that_can_not_is_changed_and_noted(name):
    model = Chain(("first", name, "last")).eval()
    network = capture_network(model, (torch.zeros(1, 6),))
    x = torch.randn(3, 6)
    assert torch.equal(network(x), model(x))
    new = RENAMED[name]
    assert [name for name in sites(network) if "/" not in name] == ["first", new, "last"]
    assert network.meta["renamed"] == {f"{new}.weight": f"{name}.weight", f"{new}.bias": f"{name}.bias"}
    assert {network.meta["renamed"].get(key, key) for key in network.state_dict()} == set(model.state_dict())


def test_two_names_never_become_one():
    names = ("a b", "a_b", "a/b", "graph", "graph_")
    model = Chain(names).eval()
    network = capture_network(model, (torch.zeros(1, 6),))
    x = torch.randn(3, 6)
    assert torch.equal(network(x), model(x))
    assert [name for name in sites(network) if "/" not in name] == ["a_b_", "a_b", "a_b__", "graph__", "graph_"]


def test_a_layer_within_a_layer_and_a_second_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a b", Chain(("class", "last")))

        def forward(self, x):
            inner = self._modules["a b"]
            return inner(inner(x))

    network = capture_network(Twice(), (torch.zeros(1, 6),))
    assert [s for s in sites(network) if "/" not in s] == ["a_b.class_", "a_b.last", "a_b.class_@1", "a_b.last@1"]


def test_parameters_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter('g"', nn.Parameter(torch.rand(6)))
            self.register_buffer("meta_data", torch.rand(6))
            self.register_buffer("b c", torch.rand(6))

        def forward(self, x):
            return x * self._parameters['g"'] + self._buffers["b c"] + self.meta_data

    model = Scaled()
    network = capture_network(model, (torch.zeros(1, 6),))
    assert set(network.state_dict()) == {"g_", "meta_data", "b_c"}
    assert network.meta["renamed"] == {"g_": 'g"', "b_c": "b c"}


def test_a_program_whose_names_are_safe_is_left_alone():
    program = export_module(Chain(HELD), (torch.zeros(1, 6),))
    assert safe_names(program) == (program, {})


def test_a_free_name():
    assert free_name(nn.Linear(2, 2), "word") == "word"
    assert free_name(nn.Linear(2, 2), "weight") == "weight_"


class Clashing(nn.Module):
    """Every name is one that a file or a plan would like to have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.names = ("output", "quantizers", "integers", "graph", "class", 'a"b')
        for name in self.names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, output, relu):
        for name in self.names:
            output = torch.relu(self._modules[name](output))
        return {"output": output + relu, "linear": output, "": output * 2, "output.weight": output - 1}


@pytest.fixture(scope="module")
def clashing(tmp_path_factory):
    """The folder of a run over both runtimes, inputs, and the network's outputs of them with their structure."""

    def data(batch):
        return {"output": torch.randn(batch, 6), "relu": torch.randn(batch, 6)}

    net, out = Clashing().eval(), tmp_path_factory.mktemp("clashing") / "run"
    task = pj.Task(example=data(2), calibration=[data(16) for _ in range(3)])
    pj.compress(net, task, "minimize size_bytes", runtime=RUNTIMES, out=out, seconds=0.01, threads=1)
    inputs = data(5)
    return out, inputs, flatten_outputs(net(**inputs))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_artifact_is_called_by_the_users_names(runtime, clashing):
    out, inputs, (expected, structure) = clashing
    for precision, least in (("fp32", 80), ("int8", 20)):
        path = out / "candidates" / f"{runtime}-{precision}" / "load.py"
        spec = importlib.util.spec_from_file_location("load", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        answer = module.predict(**{name: value.numpy() for name, value in inputs.items()})
        assert list(answer) == list(structure["items"]) == ["output", "linear", "", "output.weight"]
        for mine, theirs in zip(expected, answer.values(), strict=True):
            mine = mine.detach().numpy()
            assert 10 * np.log10((mine**2).mean() / max(((mine - theirs) ** 2).mean(), 1e-20)) > least


def test_two_keys_that_read_the_same_are_refused():
    with raises_case(SourceError, "same-name"):
        flatten_outputs({1: torch.zeros(2), "1": torch.zeros(2)})
