"""Gates: ONNX Runtime computes SiLU and other products with a sigmoid in integers, and no other products."""

import collections

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.network.graph import kind
from penjing.pipeline import building
from penjing.quantize.static import Static
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated, onnxruntime
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert, replay
from penjing.tasks.outputs import flatten_outputs


class Gated(nn.Module):
    """Three convolutions, what is written in the test between them, and a linear layer."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(F.relu(self.c(self.between(self, self.a(x)))).mean((2, 3)))


def excited(m, x):
    x = F.relu(x)
    return x * torch.sigmoid(m.b(F.adaptive_avg_pool2d(x, 1)))


def residual(m, x):
    x = F.silu(x)
    return x + F.silu(m.b(x))


def pooled(m, x):
    x = F.silu(x)
    return x + F.max_pool2d(x, 3, 1, 1).to(torch.float32)


def excited_hard(m, x):
    x = F.hardswish(x)
    return x * F.hardsigmoid(m.b(F.adaptive_avg_pool2d(x, 1)))


GATES = {  # → sigmoids
    "silu": (lambda m, x: F.silu(m.b(F.silu(x))), 2),
    "silu by hand": (lambda m, x: x * x.sigmoid(), 1),
    "gated linear unit": (lambda m, x: x * torch.sigmoid(m.b(x)), 1),
    "sigmoid first": (lambda m, x: torch.sigmoid(x) * m.b(x), 1),
    "two sigmoids": (lambda m, x: torch.sigmoid(x) * torch.sigmoid(m.b(x)), 2),
    "one sigmoid for two": (lambda m, x: (s := torch.sigmoid(x)) * m.b(x) + s * x, 1),
    "squeeze and excitation": (excited, 1),
    "residual": (residual, 2),
    "pooled": (pooled, 1),
}
HARD = {  # → hard sigmoids, which are sums
    "hard swish": (lambda m, x: F.hardswish(m.b(F.hardswish(x))), 2),
    "hard swish by hand": (lambda m, x: x * F.hardsigmoid(x), 1),
    "squeeze and excitation": (excited_hard, 2),
    "both kinds": (lambda m, x: F.silu(x) * F.hardsigmoid(m.b(x)), 1),
}
FLOATS = {
    "sigmoid times a number": lambda m, x: torch.sigmoid(x) * 3.0,
    "sigmoid times a stored value": lambda m, x: torch.sigmoid(x) * m.a.bias[:, None, None],
    "of a value in floating point": lambda m, x: (x.tanh() + 1) * torch.sigmoid(x.exp()),
}


def images(n):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


def quantized(model, runtime="onnxruntime", step=None):
    task = pj.Task(example=images(2), calibration=[images(16), images(17)])
    network = capture_network(model, *task.call())
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return (step or Static())(Draft(network), Context(task=task, capabilities=capabilities)), task


def built(draft, task, folder, runtime="onnxruntime"):
    structure = flatten_outputs(draft.network(*task.call()[0]))[1]
    building.build(draft, runtime, "int8", task, structure, folder)
    return predictor(isolated.open_artifact(folder, 1), read_manifest(folder))


def operators(folder):
    return collections.Counter(e.type for e in onnxruntime.executed(folder, read_manifest(folder)))


def decibel(reference, other):
    reference, other = (torch.as_tensor(x).detach().double() for x in (reference, other))
    return float(10 * torch.log10(reference.square().mean() / (reference - other).square().mean().clamp(min=1e-30)))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_between_integer_kernels_is_computed_in_integers(name, tmp_path):
    torch.manual_seed(0)
    between, count = GATES[name]
    model = Gated(between).eval()
    draft, task = quantized(model)
    predict = built(draft, task, tmp_path)
    executed = operators(tmp_path)
    assert executed["QLinearSigmoid"] == count and executed["QLinearMul"]
    assert not {"Sigmoid", "Mul", "DequantizeLinear"} & executed.keys()
    x = images(5)
    with torch.no_grad():
        source, planned = model(x), insert(draft.network, draft.plan)(x)
    answer = predict(x.numpy())
    assert decibel(planned, answer) > 30
    assert decibel(source, answer) > 25


@pytest.mark.parametrize("spread", [0.2, 1.0, 20.0])
@pytest.mark.parametrize("name", HARD)
def test_a_hard_gate_is_computed_in_integers_whatever_part_of_it_is_reached(name, spread, tmp_path):
    torch.manual_seed(0)
    between, count = HARD[name]
    model = Gated(between).eval()
    with torch.no_grad():
        model.a.weight.mul_(spread)
    draft, task = quantized(model)
    predict = built(draft, task, tmp_path)
    executed = operators(tmp_path)
    assert executed["QLinearAdd"] == count and executed["QLinearMul"]
    assert not {"HardSigmoid", "HardSwish", "Add", "Mul", "DequantizeLinear"} & executed.keys()
    x = images(5)
    with torch.no_grad():
        source, planned = model(x), insert(draft.network, draft.plan)(x)
    answer = predict(x.numpy())
    assert decibel(planned, answer) > 30
    assert decibel(source, answer) > 25


def test_a_hard_sigmoid_of_other_bits_is_right_too(tmp_path):
    """With fewer levels or signed integers its quantizer does not clip to 0 and 1."""
    for step in (Static(activation_bits=6), Static(activation_symmetric=True)):
        torch.manual_seed(0)
        model = Gated(HARD["squeeze and excitation"][0]).eval()
        draft, task = quantized(model, step=step)
        (folder := tmp_path / str(step.activation_bits)).mkdir()
        predict, x = built(draft, task, folder), images(5)
        with torch.no_grad():
            assert decibel(insert(draft.network, draft.plan)(x), predict(x.numpy())) > 25


ALONE = {
    "gelu": lambda x: F.gelu(x),
    "mish": lambda x: F.mish(x),
    "elu": lambda x: F.elu(x),
    "tanh": lambda x: torch.tanh(x),
}


@pytest.mark.parametrize("name", ALONE)
def test_functions_without_an_integer_kernel_between_integer_kernels_are_named(name):
    torch.manual_seed(0)
    draft, _ = quantized(Gated(lambda m, x: ALONE[name](m.b(x))).eval())
    assert draft.plan.floats == {f"/{name}#0": f"onnxruntime has no integer kernel for {name}"}
    behind_floats, _ = quantized(Gated(lambda m, x: ALONE[name](m.b(x))).eval(), step=Static(exclude=("b",)))
    assert set(behind_floats.plan.floats) == {"b"}
    fused, _ = quantized(Gated(lambda m, x: ALONE[name](m.b(x))).eval(), "openvino")
    assert name == "mish" or not fused.plan.floats


@pytest.mark.parametrize("slope", [0.01, 0.1])
def test_leaky_relu_is_computed_in_integers_behind_integers(slope, tmp_path):
    torch.manual_seed(0)
    model = Gated(lambda m, x: F.leaky_relu(m.b(F.leaky_relu(x, slope)), slope)).eval()
    draft, task = quantized(model)
    predict = built(draft, task, tmp_path)
    executed = operators(tmp_path)
    assert executed["QLinearLeakyRelu"] == 2 and not {"LeakyRelu", "DequantizeLinear"} & executed.keys()
    x = images(5)
    with torch.no_grad():
        assert decibel(insert(draft.network, draft.plan)(x), predict(x.numpy())) > 30
        assert decibel(model(x), predict(x.numpy())) > 25


def test_leaky_relu_behind_floats_gets_no_quantizers_of_its_own():
    draft, _ = quantized(Gated(lambda m, x: F.leaky_relu(m.b(x))).eval(), step=Static(exclude=("b",)))
    assert not [edge for edge in draft.plan.entries if "leaky" in edge]


@pytest.mark.parametrize("name", FLOATS)
def test_other_products_with_a_sigmoid_keep_floating_point(name):
    torch.manual_seed(0)
    draft, _ = quantized(Gated(FLOATS[name]).eval())
    assert not [edge for edge in draft.plan.entries if "/mul#" in edge]


def test_a_gate_behind_a_layer_in_floating_point_keeps_it_too():
    draft, _ = quantized(Gated(GATES["silu"][0]).eval(), step=Static(exclude=("a",)))
    names = {edge.rpartition(":")[0] for edge in draft.plan.entries}
    assert not [name for name in names if name.startswith("/silu#0")]
    assert {"/silu#1.sigmoid", "/silu#1.product"} <= names


def test_a_gate_whose_sigmoid_is_excluded_keeps_floating_point():
    draft, _ = quantized(Gated(GATES["silu by hand"][0]).eval(), step=Static(exclude=("/sigmoid#0",)))
    assert "/mul#0:in1" not in draft.plan.entries


def test_a_silu_can_be_left_whole():
    draft, _ = quantized(Gated(GATES["silu"][0]).eval(), step=Static(exclude=("/silu#0",)))
    assert [kind(draft.network, n) for n in draft.network.graph.nodes].count("silu") == 1


@pytest.mark.parametrize(("network", "what"), [(GATES["silu"][0], "silu"), (HARD["hard swish"][0], "hardswish")])
def test_an_unfolded_function_computes_the_same_and_is_replayed(network, what):
    torch.manual_seed(0)
    model = Gated(network).eval()
    draft, task = quantized(model)
    edits = [edit for edit in draft.edits if edit["edit"] == f"unfold_{what}"]
    assert [edit["site"] for edit in edits] == [f"/{what}#0", f"/{what}#1"]
    again = replay(capture_network(model, *task.call()), draft.edits)
    x = images(3)
    torch.testing.assert_close(again(x), model(x))
    assert torch.equal(again(x), draft.network(x))


def test_openvino_fuses_it_and_gets_no_quantizer_within(tmp_path):
    torch.manual_seed(0)
    model = Gated(GATES["silu"][0]).eval()
    draft, task = quantized(model, "openvino")
    assert not [edge for edge in draft.plan.entries if "silu" in edge]
    predict = built(draft, task, tmp_path, "openvino")
    x = images(5)
    with torch.no_grad():
        assert decibel(model(x), predict(x.numpy())) > 25


def test_a_conversion_to_the_same_type_hides_no_pooling_from_its_reader():
    network = capture_network(Gated(GATES["pooled"][0]).eval(), (images(2),))
    assert not [n for n in network.graph.nodes if kind(network, n) in ("to", "_to_copy")]


def test_files_hold_them_as_quantized_operators(tmp_path):
    """Of other runtimes too that read the file: what is quantized before a sigmoid is quantized behind it."""
    torch.manual_seed(0)
    draft, task = quantized(Gated(GATES["residual"][0]).eval())
    built(draft, task, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    readers = {name: node.op_type for node in graph.node for name in node.input}
    sigmoids = [node for node in graph.node if node.op_type == "Sigmoid"]
    assert len(sigmoids) == 2 and all(readers[node.output[0]] == "QuantizeLinear" for node in sigmoids)
