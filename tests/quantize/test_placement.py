from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, runtimes
from penjing.architectures import build
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.quantize.placement import CONSTANT, FIXED, place
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms, insert
from penjing.tasks.task import Task


class Net(nn.Module):
    """A module around a forward that is written in the test."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=4, outputs=4, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def placed(model, *shape, capabilities=GENERIC, excluded=None):
    network = capture_network(model, (torch.zeros(1, *shape),))
    fold_batch_norms(network)
    return network, place(network, capabilities, excluded or {})


def value_at(network, name):
    """The graph's name of what an operator computes."""
    return sites(network)[name].name


def test_a_convolution_has_its_input_and_weight_quantized_and_its_output_not():
    _, placement = placed(Net(lambda m, x: m.a(x), a=conv()), 4, 8, 8)
    assert placement.edges == {"a:in0": "x"}
    assert placement.weights == ("a",)
    assert placement.floats == {}


def test_a_rectifier_is_absorbed_by_the_convolution_before_it():
    network, placement = placed(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv()), 4, 8, 8)
    assert set(placement.edges) == {"a:in0", "b:in0"}  # nothing between a and the rectifier
    assert placement.edges["b:in0"] == value_at(network, "/relu#0")


def test_both_inputs_of_a_residual_addition_are_quantized():
    network, placement = placed(Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv()), 4, 8, 8)
    assert set(placement.edges) == {"a:in0", "b:in0", "/add#0:in0", "/add#0:in1"}
    assert placement.edges["/add#0:in0"] == value_at(network, "a")
    assert placement.edges["/add#0:in1"] == value_at(network, "b")


def test_resnet20_has_no_floating_island():
    network, placement = placed(build("resnet20"), 3, 16, 16)
    assert placement.floats == {}
    assert len(placement.weights) == 22  # 19 convolutions, 2 shortcuts, the classifier
    for block in range(3):
        for name in (f"stages.0.{block}/add#0:in0", f"stages.0.{block}/add#0:in1"):
            assert name in placement.edges
    between = {node.name for node in network.graph.nodes if "relu" in node.name}
    assert not {edge for edge in placement.edges if edge.split(":")[0] in between}
    assert "classifier:in0" in placement.edges and "average/adaptive_avg_pool2d#0:in0" in placement.edges


def test_a_pooling_carries_the_scale_of_its_input():
    network, placement = placed(Net(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2)), a=conv(), b=conv()), 4, 8, 8)
    rectified = value_at(network, "/relu#0")
    assert placement.edges == {"a:in0": "x", "b:in0": rectified, "/max_pool2d#0:in0": rectified}


def test_a_chain_that_only_moves_values_carries_one_scale():
    def forward(m, x):
        y = F.dropout(F.max_pool2d(m.a(x), 2), 0.5, m.training)
        return m.head(y.permute(0, 2, 3, 1).flatten(1))

    network, placement = placed(Net(forward, a=conv(), head=nn.Linear(4 * 16, 3)), 4, 8, 8)
    source = value_at(network, "a")
    assert placement.edges == {
        "a:in0": "x",
        "head:in0": source,
        "/max_pool2d#0:in0": source,
        "/permute#0:in0": source,
        "/flatten#0:in0": source,
    }


def test_every_input_of_a_concatenation_is_quantized():
    def forward(m, x):
        return m.c(torch.cat([m.a(x), F.relu(m.b(x)), x], 1))

    network, placement = placed(Net(forward, a=conv(), b=conv(), c=conv(12)), 4, 8, 8)
    assert {e: v for e, v in placement.edges.items() if "cat" in e} == {
        "/cat#0:in0": value_at(network, "a"),
        "/cat#0:in1": value_at(network, "/relu#0"),
        "/cat#0:in2": "x",
    }
    assert placement.edges["c:in0"] == value_at(network, "/cat#0")


def test_an_average_pooling_is_an_operator_with_integers_of_its_own():
    network, placement = placed(Net(lambda m, x: m.head(m.a(x).mean((2, 3))), a=conv(), head=nn.Linear(4, 2)), 4, 8, 8)
    assert placement.edges["/mean#0:in0"] == value_at(network, "a")
    assert placement.edges["head:in0"] == value_at(network, "/mean#0")


def test_what_an_integer_kernel_cannot_do_is_listed_with_its_reason():
    def forward(m, x):
        y = m.a(x) + 1
        y = y + m.table
        y = torch.add(y, x, alpha=2)
        return F.conv2d(y, m.table.expand(4, 4, 1, 1)) @ x, m.up(x)

    model = Net(forward, a=conv(), up=nn.ConvTranspose2d(4, 4, 2))
    model.table = nn.Parameter(torch.rand(4, 1, 1))
    _, placement = placed(model, 4, 8, 8)
    assert placement.floats == {
        "/add#0": "one of its inputs is a number",
        "/add#1": "one of its inputs is a constant",
        "/add#2": "its second input is scaled",
        "/conv2d#0": "its weight is computed, not stored",
        "/matmul#0": "any runtime has no integer kernel for matmul",
        "up": "any runtime has no integer kernel for conv_transpose",
    }
    assert placement.weights == ("a",)


def test_arithmetic_on_integers_is_left_alone():
    def forward(m, x):
        places = (x.flatten(1).abs() * 3).long()
        return m.table((places + places) % 10).sum(1) + m.head(x.flatten(1))

    _, placement = placed(Net(forward, table=nn.Embedding(10, 3), head=nn.Linear(16, 3)), 4, 2, 2)
    assert not any(edge.startswith("/add#0") for edge in placement.edges)
    assert "/add#0" not in placement.floats
    assert {"/add#1:in0", "/add#1:in1", "head:in0"} <= set(placement.edges)


def test_an_excluded_operator_has_no_edges_and_keeps_its_reason():
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv())
    _, placement = placed(model, 4, 8, 8, excluded={"b": "excluded by 'b'"})
    assert placement.edges == {"a:in0": "x"}
    assert placement.weights == ("a",)
    assert placement.floats == {"b": "excluded by 'b'"}


def test_a_layer_called_twice_has_edges_for_each_call():
    _, placement = placed(Net(lambda m, x: m.a(F.relu(m.a(x))), a=conv()), 4, 8, 8)
    assert set(placement.edges) == {"a:in0", "a@1:in0"}
    assert placement.weights == ("a", "a@1")


WRITES_INTEGERS = replace(GENERIC, quantized_output=frozenset({"conv", "add"}))


class TestKernelsThatOnlyWriteIntegers:
    def test_every_reader_behind_the_activation_gets_a_quantizer(self):
        model = Net(lambda m, x: torch.tanh(F.relu(m.a(x))), a=conv())
        network, placement = placed(model, 4, 8, 8, capabilities=WRITES_INTEGERS)
        assert placement.edges == {"a:in0": "x", "/tanh#0:in0": value_at(network, "/relu#0")}

    def test_a_reader_that_has_one_keeps_it(self):
        model = Net(lambda m, x: m.b(m.a(x)) + x, a=conv(), b=conv())
        network, placement = placed(model, 4, 8, 8, capabilities=WRITES_INTEGERS)
        assert placement.edges["b:in0"] == value_at(network, "a")
        assert placement.edges["/add#0:in0"] == value_at(network, "b")
        assert placement.edges["/output:in0"] == value_at(network, "/add#0")

    def test_an_activation_with_two_readers_is_quantized_for_both(self):
        def forward(m, x):
            y = F.relu(m.a(x))
            return torch.tanh(y), torch.sigmoid(y)

        network, placement = placed(Net(forward, a=conv()), 4, 8, 8, capabilities=WRITES_INTEGERS)
        rectified = value_at(network, "/relu#0")
        assert (placement.edges["/tanh#0:in0"], placement.edges["/sigmoid#0:in0"]) == (rectified, rectified)


def test_what_a_runtime_does_not_absorb_stays_between():
    plain = replace(GENERIC, fuses=frozenset(), quantized_output=frozenset({"conv"}))
    network, placement = placed(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv()), 4, 8, 8, capabilities=plain)
    assert placement.edges["/relu#0:in0"] == value_at(network, "a")


@pytest.mark.parametrize("model", [build("resnet20"), build("resnet18", width=8)], ids=["resnet20", "resnet18"])
def test_placement_needs_no_data_and_is_the_same_twice(model):
    _, one = placed(model, 3, 32, 32)
    _, other = placed(model, 3, 32, 32)
    assert one == other


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_layer_of_stored_values_is_computed_once_and_no_runtime_fails_at_it(runtime, tmp_path):
    class Relative(nn.Module):
        """Keys of relative positions, as DeBERTa's: a layer that reads a stored table, and one that reads the input."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.keys, self.head = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 16), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.keys(x) @ self.keys(torch.nn.functional.layer_norm(self.table, (16,))).T)

    net = Relative().eval()
    data = [torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    task = Task(example=data[0], calibration=data[:2])
    captured = capture_network(net, *task.call(), task.dynamic)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities, source=captured))
    assert draft.plan.floats["keys@1"] == FIXED and {"keys:in0", "head:in0"} <= set(draft.plan.entries)
    building.build(draft, runtime, "int8", task, {"kind": "tensor"}, tmp_path)
    [got] = isolated.open_artifact(tmp_path, 1).run([data[2].numpy()])
    with torch.no_grad():
        expected = insert(draft.network, draft.plan)(data[2])
    assert 10 * torch.log10(expected.square().mean() / (expected - torch.as_tensor(got)).square().mean()) > 40


class Positions(nn.Module):
    """Two layers, and between them something that is computed from stored tensors and sizes."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.scale, self.shift, self.table = (nn.Parameter(torch.randn(*n, 8)) for n in ((), (), (5,)))
        self.rows = nn.Embedding(5, 8)

    def forward(self, x):
        return self.head(self.between(self, self.up(x)))


CONSTANTS = {
    "a sum": lambda m, h: h + (m.scale + m.shift),
    "a product": lambda m, h: h + m.scale * m.shift,
    "places times a weight": lambda m, h: torch.arange(h.shape[1])[:, None] * m.scale + h,
    "a part of a table": lambda m, h: h + m.table[: h.shape[1]],
    "a function": lambda m, h: h + torch.sin(m.table),
    "a layer": lambda m, h: h + m.head(m.table),
    "for every sample": lambda m, h: h + (m.table + m.shift).unsqueeze(0).expand(h.shape[0], -1, -1),
    "rows and a vector": lambda m, h: h + (m.rows(torch.arange(h.shape[1])) + m.shift),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_sum_with_what_is_computed_from_constants_is_one_with_a_constant(name):
    network, placement = placed(Positions(CONSTANTS[name]), 5, 8)
    sums = [site for site in sites(network) if site.startswith("/add")]
    assert [placement.floats[site] for site in sums] == [*[FIXED] * (len(sums) - 1), CONSTANT]
    assert {edge for edge in placement.edges if "/add" in edge} == set()


def test_rows_of_an_embedding_are_integers_that_a_sum_reads_also_at_fixed_places():
    _, placement = placed(Positions(lambda m, h: h + m.rows(torch.arange(h.shape[1]))), 5, 8)
    assert {"/add#0:in0", "/add#0:in1"} <= set(placement.edges) and placement.floats == {}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_computes_beside_constants_what_was_planned(runtime, tmp_path):
    model = Positions(lambda m, h: CONSTANTS["a sum"](m, CONSTANTS["a part of a table"](m, h))).eval()
    x = torch.randn(4, 5, 8)
    task = Task(example=x, calibration=[torch.randn(32, 5, 8)])
    captured = capture_network(model, (x,))
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = Static()(Draft(captured), Context(task=task, capabilities=capabilities, source=captured))
    manifest = building.build(draft, runtime, "int8", task, {"kind": "tensor"}, tmp_path)
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, tmp_path)[0]
    planned = {row.name: row.executed for row in rows if row.planned == "int8"}
    assert planned == {"up": "int8", "head": "int8"}
