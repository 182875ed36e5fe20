"""What the ONNX file says: names, axes, types, and nothing of the machine that wrote it."""

import getpass
import socket
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.network.graph import kind, sites
from penjing.onnx_files import write as onnx_file
from penjing.pipeline.building import executed_rows
from penjing.steps.plan import Entry, Plan, QuantSpec
from penjing.surgery import freeze, insert
from tests.raises import raises_case
from tests.tiny_networks import CASES, Case, export


def graph_of(exported):
    return onnx.load(exported.folder / "model.onnx").graph


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_called_by_the_sites_of_the_network(exported, case):
    artifact = exported(case, "onnxruntime", "int8")
    names = {node.name for node in graph_of(artifact).node}
    network = artifact.draft.network
    expected = {s for s, node in sites(network).items() if kind(network, node) in artifact.case.integer}
    assert len(expected) == sum(artifact.case.integer.values())
    assert expected <= names


def test_an_addition_in_a_linear_layer_is_not_taken_for_one_of_the_network(exported):
    artifact = exported("tokens", "onnxruntime", "fp32")
    named = {node.name: node.op_type for node in graph_of(artifact).node}
    assert (named["/add#0"], named["/add#1"]) == ("Add", "Add")
    assert (named["up"], named["down"], named["shift"]) == ("MatMul", "MatMul", "Gemm")
    inputs = next(node.input for node in graph_of(artifact).node if node.name == "/add#1")
    assert "mean" in inputs


@pytest.mark.parametrize("case", CASES)
def test_inputs_and_outputs_keep_their_names_and_their_batch_varies(exported, case):
    artifact = exported(case, "onnxruntime", "fp32")
    graph = graph_of(artifact)
    assert tuple(value.name for value in graph.output) == artifact.case.outputs
    shapes = artifact.case.shapes
    if isinstance(shapes, dict):
        assert [value.name for value in graph.input] == list(shapes)
    for value in [*graph.input, *graph.output]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [port.name for port in artifact.manifest.programs[0].inputs] == [value.name for value in graph.input]


def test_quantized_weights_are_stored_as_integers_alone(exported):
    artifact = exported("residual", "onnxruntime", "int8")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph_of(artifact).initializer}
    by_type = {}
    for array in stored.values():
        by_type.setdefault(array.dtype.name, []).append(array.size)
    weights = [8 * 3 * 9, 8 * 8 * 9, 5 * 8]
    assert sorted(size for size in by_type["int8"] if size > 8) == sorted(weights)
    assert max(by_type["int32"]) == 8  # biases, one number an output channel
    assert max(by_type["float32"]) == 8  # scales, one a channel: no float weight lies beside its integers


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_trace_of_this_machine_is_left(exported, runtime, precision):
    artifact = exported("residual", runtime, precision)
    data = b"".join(path.read_bytes() for path in sorted(artifact.folder.iterdir()))
    here = {Path.cwd(), Path(__file__).parent, artifact.folder, Path.home(), Path(torch.__file__).parent}
    for trace in here - {Path("/")}:
        assert str(trace).encode() not in data
    assert b"Traceback" not in data and b'File "' not in data and b"stack_trace" not in data
    for name in (socket.gethostname(), getpass.getuser()):
        if len(name) > 4:  # "root" is also a word
            assert name.encode() not in data


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_network_gives_the_same_bytes(exported, tmp_path, runtime, precision):
    artifact = exported("branches", runtime, precision)
    export(artifact.case, runtime, precision, tmp_path)
    files = {path.name: path.read_bytes() for path in artifact.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert {"manifest.json", "load.py"} < set(files)


def one_edge(spec, scale, zero_point):
    """A network of one rectifier whose input is quantized, exported, with its torch twin."""
    network = capture_network(nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.zeros(2, 4),))
    edge = f"{next(iter(sites(network)))}:in0"
    plan = Plan({edge: Entry(spec, (scale,), (zero_point,))})
    return insert(network, plan), freeze(network, plan)


@pytest.mark.parametrize(
    ("bits", "signed", "symmetric"),
    [(8, True, True), (8, True, False), (8, False, False), (7, False, False), (4, True, True), (4, False, False)],
)
def test_every_range_saturates_where_the_plan_says(tmp_path, bits, signed, symmetric):
    import onnxruntime

    spec = QuantSpec(bits=bits, signed=signed, symmetric=symmetric)
    zero = 0 if signed and symmetric else 1 if signed else 3
    replica, frozen = one_edge(spec, 0.05, zero)
    call = ((torch.zeros(2, 4),), {})
    onnx_file.write(frozen, call, None, ["output"], tmp_path / "edge.onnx")
    x = torch.linspace(-20, 20, 804).reshape(-1, 4)
    session = onnxruntime.InferenceSession(str(tmp_path / "edge.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = replica(x).numpy()
    assert np.abs(output - expected).max() < 1e-6
    high = spec.limits[1]
    assert expected.max() == pytest.approx(np.tanh((high - zero) * 0.05), abs=1e-6)  # the edge itself is met


def test_a_spatial_mean_becomes_a_pooling_with_or_without_the_empty_axes(tmp_path):
    class Means(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x.mean((-1, -2), keepdim=True), x.mean(1)

    network = capture_network(Means(), (torch.zeros(2, 3, 4, 4),))
    path = tmp_path / "means.onnx"
    onnx_file.write(network, ((torch.zeros(2, 3, 4, 4),), {}), None, ["a", "b", "c"], path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("GlobalAveragePool") == 2
    assert kinds.count("ReduceMean") == 1


def test_an_operator_without_an_onnx_form_is_named(tmp_path):
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    network = capture_network(Strange(), (torch.zeros(2, 3),))
    with raises_case(ExportError, "no-onnx-form") as caught:
        onnx_file.write(network, ((torch.zeros(2, 3),), {}), None, ["output"], tmp_path / "strange.onnx")
    assert "bessel_j0" in caught.value.what
    assert not (tmp_path / "strange.onnx").exists()


class PadsAsTensorFlow(nn.Module):
    """Sizes rounded up by the floor division of a negative number."""

    def forward(self, x):
        height = x.shape[2]
        over = max((-(-height // 2) - 1) * 2 + 3 - height, 0)
        return nn.functional.pad(x, (0, 0, over // 2, over - over // 2)) * (-height % 8)


def test_sizes_are_divided_as_python_divides_them(tmp_path):
    dynamic = {"x": {0: "batch", 2: "height"}}
    example = (torch.randn(2, 3, 12, 5),)
    network = capture_network(PadsAsTensorFlow(), example, dynamic=dynamic)
    file = tmp_path / "network.onnx"
    onnx_file.write(network, (example, {}), dynamic, [""], file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for height in (7, 8, 13):
        x = torch.randn(3, 3, height, 5)
        (answer,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), PadsAsTensorFlow()(x))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_layers_beside_a_recurrent_one_that_is_written_out_keep_their_names(tmp_path, nonlinearity):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.r = nn.RNN(8, 8, batch_first=True, nonlinearity=nonlinearity)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.b(x + self.r(x)[0])

    x = torch.randn(2, 5, 6)
    onnx_file.write(capture_network(Net().eval(), (x,)), ((x,), {}), None, ["y"], tmp_path / "model.onnx")
    named = {node.name: node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert (named["a"], named["b"], named["/add#0"], named["/relu#0"]) == ("MatMul", "MatMul", "Add", "Relu")


class ReadTwice(nn.Module):
    """A product with a stored weight that two stored factors, or two biases, are read with."""

    def __init__(self, combine):
        super().__init__()
        self.a, self.combine = nn.Linear(4, 6, bias=False), combine
        self.u, self.v = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = self.a(x)
        return self.combine(y, self.u), self.combine(y, self.v)


@pytest.mark.parametrize("combine", [torch.mul, torch.add])
def test_what_reads_a_product_twice_has_two_names(combine, tmp_path):
    net, x = ReadTwice(combine).eval(), torch.randn(2, 3, 4)
    onnx_file.write(capture_network(net, (x,)), ((x,), {}), None, ["y", "z"], tmp_path / "m.onnx")
    names = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert len(set(names)) == len(names)
    answers = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
    for given, expected in zip(answers, net(x), strict=True):
        np.testing.assert_allclose(given, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


class StoredTensors:
    """Layers whose integers a runtime only stores, so that what was written of them is rewritten."""

    class Upward(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 2, stride=2)

        def forward(self, x):
            return self.up(self.down(x).relu()).mean((2, 3))

    class Steps(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.steps, self.head = layer(8, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.steps(x)[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (StoredTensors.Upward, (3, 16, 16)),
        (lambda: StoredTensors.Steps(nn.LSTM), (6, 8)),
        (lambda: StoredTensors.Steps(nn.GRU), (6, 8)),
    ],
    ids=["transposed convolution", "lstm", "gru"],
)
def test_a_file_holds_no_tensor_that_nothing_reads(network, shape, precision, tmp_path):
    """ONNX Runtime warns of each when the file is opened."""
    torch.manual_seed(0)
    artifact = export(Case(network, (shape,), {}, ("output",)), "onnxruntime", precision, tmp_path)
    graph = graph_of(artifact)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [tensor.name for tensor in graph.initializer if tensor.name not in read] == []


class Sums(nn.Module):
    """Sums of two activations beside sums with a stored tensor, a number, and a tensor made in the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.place, self.head = nn.Parameter(torch.randn(16, 8, 8)), nn.Linear(16, 4)

    def forward(self, x):
        x = self.a(x) + self.place
        x = x + self.b(x)
        x = (x + 1.0) * torch.sigmoid(x)
        x = x + torch.tensor([[[0.5]], [[-0.5]]] * 8)
        x = x + self.b(x.relu())
        return self.head(x.mean((2, 3))) * 2.0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sums_of_activations_are_named_whatever_else_is_added(runtime, tmp_path):
    """Where stored tensors and numbers were counted among them, no sum had a name, and none was told as executed."""
    int8 = export(Case(Sums, ((3, 8, 8),), {"add": 2}, ("output",)), runtime, "int8", tmp_path)
    computed = {s for s, node in sites(int8.draft.network).items() if kind(int8.draft.network, node) == "add"}
    whole = {"/add#1", "/add#4"}
    assert whole < computed
    rows, integer, _ = executed_rows(int8.draft.network, int8.draft.plan, int8.task.call(), int8.manifest, int8.folder)
    assert integer["add"] == 2
    assert {row.name for row in rows if row.kind == "add" and row.executed == "int8"} == whole
