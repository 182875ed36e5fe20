"""ONNX files as sources: what others exported trains, prunes, quantizes, and keeps its names."""

import random

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

import penjing as pj
from penjing.errors import CheckpointError, PenjingError, SourceError
from penjing.network.capture import capture_network
from penjing.network.graph import line
from penjing.records.manifest import read_manifest
from penjing.sources.onnx import open_network
from penjing.sources.source import in_single_precision, open_source, with_declared_axes
from tests.raises import raises_case

RUNTIMES = ("onnxruntime", "openvino")


class Two(nn.Module):
    """Convolutions, a batch norm, a recurrent layer and two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3, stride=2)
        self.head, self.steps, self.last = nn.Linear(32, 5), nn.LSTM(32, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.bn(self.a(x)))))
        return self.head(h.mean((2, 3))), self.last(self.steps(h.flatten(2).transpose(1, 2))[0][:, -1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file of torch's exporter, with names that are no identifiers, and the network it is of."""
    torch.manual_seed(0)
    network = Two().eval()
    path = tmp_path_factory.mktemp("onnx") / "two.onnx"
    torch.onnx.export(
        network,
        (torch.randn(2, 3, 8, 8),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["input.1"],
        output_names=["scores/0", "boxes:1"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    return path, network


def batch(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def task():
    return pj.Task(example=batch(1), calibration=[batch(4, 1), batch(4, 2)])


def test_it_computes_what_it_was_exported_from(exported):
    path, network = exported
    opened, example, dynamic = open_network(path)
    assert [tuple(value.shape) for value in example] == [(1, 3, 8, 8)]
    assert dynamic == {0: {0: "batch"}}
    with torch.no_grad():
        outputs, right = opened(batch(5)), network(batch(5))
    assert list(outputs) == ["scores/0", "boxes:1"]
    for output, expected in zip(outputs.values(), right, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_the_captured_network_has_layers_under_the_names_of_the_file(exported, task):
    path, _ = exported
    source = open_source(path)
    network = capture_network(source.module, *task.call(), with_declared_axes(source, task).dynamic)
    assert {"a", "b", "head", "last"} <= {name for name, part in network.named_modules() if name}
    assert isinstance(network.get_submodule("a"), nn.Conv2d)
    assert any("lstm" in str(node.target) for node in network.graph.nodes)
    node = next(n for n in network.graph.nodes if "relu" in str(n.target))
    assert line(node).startswith(" (two.onnx:")
    with torch.no_grad():
        assert network(batch(7))["scores/0"].shape == (7, 5)


@pytest.fixture(scope="module")
def compressed(exported, task, tmp_path_factory):
    """A run of the file over both runtimes."""
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
    recipe, out = pj.Recipe(pj.quantize.Static()), tmp_path_factory.mktemp("onnx") / "run"
    return pj.run(recipe, str(exported[0]), task, runtime=RUNTIMES, out=out, seconds=0.02, threads=1)


class Folded(nn.Module):
    """Layers whose weights the older exporter of torch stores under numbers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.stage = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)), nn.ReLU())
        self.one, self.two = nn.Linear(8, 6, bias=False), nn.Linear(6, 4)
        self.score = nn.Conv2d(8, 1, 1)  # its bias is a number

    def forward(self, x):
        x = self.stage(self.stem(x))
        return self.two(self.one(x.flatten(2).transpose(1, 2))), self.score(x)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "folded.onnx"
    torch.onnx.export(Folded().eval(), (torch.randn(2, 3, 8, 8),), path, dynamo=False)
    return path


def layers_of(path):
    network, _, _ = open_network(path)
    captured = capture_network(network, (torch.randn(2, 3, 8, 8),), dynamic={})
    weights = {f"{name}.weight" for name, module in captured.named_modules() if hasattr(module, "weight")}
    return weights, captured.meta["renamed"], dict(network.named_parameters())


def test_layers_whose_weights_are_called_by_numbers_are_called_after_their_nodes(folded):
    weights, renamed, parameters = layers_of(folded)
    assert weights == {"stem.0.weight", "stage.0.0.weight", "one.weight", "two.weight", "score.weight"}
    originals = {renamed.get(name, name) for name in weights}
    assert originals <= parameters.keys() and sum("::" in name for name in originals) > 2


def test_nodes_without_a_path_name_layers_too_and_a_weight_that_two_read_is_one_layer(folded, tmp_path):
    model = onnx.load(folded)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and "::" in node.input[1]]
    again = model.graph.node.add()
    again.CopyFrom(convolutions[1])
    again.name, again.input[0], again.output[0] = "Conv_again", convolutions[1].output[0], "twice"
    model.graph.output.append(helper.make_tensor_value_info("twice", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "numbered.onnx")
    weights, _, _ = layers_of(tmp_path / "numbered.onnx")
    assert {node.name + ".weight" for node in convolutions} < weights and "Conv_again.weight" not in weights


def test_a_tensor_that_lies_where_a_layer_would_be_is_not_hidden(folded, tmp_path):
    model = onnx.load(folded)
    (scope,) = [node for node in model.graph.node if node.name == "/stem/stem.0/Conv" or node.name == "/stem/0/Conv"]
    value = numpy_helper.from_array(np.ones((1, 8, 1, 1), np.float32) * 2, "stem.0.weight")
    model.graph.initializer.append(value)
    reader = next(node for node in model.graph.node if scope.output[0] in node.input)
    scaled = helper.make_node("Mul", [scope.output[0], "stem.0.weight"], ["scaled"], name="scale")
    reader.input[0] = "scaled"
    model.graph.node.insert(list(model.graph.node).index(reader), scaled)
    onnx.save(model, tmp_path / "hidden.onnx")
    network, _, _ = open_network(tmp_path / "hidden.onnx")
    x = torch.randn(2, 3, 8, 8)
    captured = capture_network(network, (x,), dynamic={})
    torch.testing.assert_close(captured(x), network(x))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_is_compressed_and_keeps_the_names_of_its_ports(compressed, runtime):
    integers = next(row for row in compressed.record.candidates if row.name == f"{runtime}-int8")
    assert integers.rejection is None
    assert min(row.snr_db for row in integers.parity) > 25
    program = read_manifest(compressed.folder / "candidates" / integers.name).programs[0]
    assert [port.name for port in program.inputs] == ["input.1"]
    assert [port.name for port in program.outputs] == ["scores/0", "boxes:1"]


def test_its_weights_are_counted_as_in_the_file(compressed, exported):
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(exported[0]).graph.initializer]
    weights = [array.size for array in stored if array.dtype == np.float32 and array.size > 1]
    assert compressed.record.source.parameters == sum(weights)


def test_it_is_pruned_and_trains(exported, task):
    small = pj.apply(pj.Recipe(pj.prune.Channels(macs=0.6)), exported[0], task)
    assert small.a.out_channels < 16
    small(batch(2))["scores/0"].sum().backward()
    assert small.a.weight.grad is not None


# --- files by hand ------------------------------------------------------------------------------------------------


def model(nodes, inputs, outputs, initializers=(), opset=18, domains=()):
    """A model of nodes; inputs and outputs as name → shape, of float32."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in dict(initializers).items()],
    )
    sets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    proto = helper.make_model(graph, opset_imports=sets)
    proto.ir_version = 8
    return proto


def stored(tmp_path, proto):
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refusal(path, kind, code, **fixed):
    with raises_case(kind, code) as caught:
        open_network(path, **fixed)
    return caught.value


def test_a_branch_on_a_constant_is_taken_and_the_other_not_stored(tmp_path):
    def branch(name, width):
        product = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = numpy_helper.from_array(np.full((4, 3), width, np.float32), "w")
        shown = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        return helper.make_graph([product], name, [], [shown], [weight])

    nodes = [
        helper.make_node("Equal", ["rate", "wide"], ["is_wide"]),
        helper.make_node("If", ["is_wide"], ["out"], then_branch=branch("a", 1.0), else_branch=branch("b", 2.0)),
    ]
    proto = model(nodes, {"x": ["batch", 4]}, {"out": ["batch", 3]}, {"wide": np.array(16000, np.int64)})
    proto.graph.input.append(helper.make_tensor_value_info("rate", TensorProto.INT64, []))
    path = stored(tmp_path, proto)
    for rate, factor in ((16000, 1.0), (8000, 2.0)):
        network, *_ = open_network(path, rate=rate)
        assert torch.equal(network(torch.ones(2, 4)), torch.full((2, 3), 4 * factor))
        assert sum(p.numel() for p in network.parameters()) == 12
    network, *_ = open_network(path)
    with raises_case(SourceError, "branch") as caught:
        network(torch.ones(2, 4), torch.tensor(16000))
    assert "node 2" in caught.value.got
    assert torch.equal(network(torch.ones(2, 4), 8000), torch.full((2, 3), 8.0))


def test_sizes_that_are_computed_follow_the_input(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"], axis=0),
        helper.make_node("Unsqueeze", ["length", "zero"], ["lengths"]),
        helper.make_node("Concat", ["minus", "lengths", "four"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    numbers = {"one": np.array(1), "zero": np.array([0]), "minus": np.array([-1]), "four": np.array([4])}
    proto = model(nodes, {"x": ["n", "length", 2, 2]}, {"y": ["n", "length", 4]}, numbers)
    network, _, dynamic = open_network(stored(tmp_path, proto))
    captured = capture_network(network, (torch.zeros(2, 5, 2, 2),), {}, dynamic)
    assert captured(torch.zeros(3, 7, 2, 2)).shape == (3, 7, 4)


def test_axes_without_a_name_vary(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [None, 3, None, None]}, {"y": [None, 3, None, None]})
    network, example, dynamic = open_network(stored(tmp_path, proto))
    assert example is None
    assert dynamic == {0: {0: "batch", 2: "axis_0_2", 3: "axis_0_3"}}
    captured = capture_network(network, (torch.zeros(2, 3, 5, 6),), {}, dynamic)
    assert captured(torch.zeros(4, 3, 7, 9)).shape == (4, 3, 7, 9)


RESIZED = [
    ("linear", "asymmetric", {}, [2, 1.5]),
    ("linear", "align_corners", {}, [2, 3]),
    ("linear", "half_pixel", {}, [0.5, 0.5]),
    ("linear", "half_pixel_symmetric", {}, [0.75, 1.25]),
    ("cubic", "asymmetric", {}, [2, 2]),
    ("cubic", "half_pixel", {"cubic_coeff_a": -0.5}, [1.5, 1.5]),
    ("nearest", "align_corners", {"nearest_mode": "floor"}, [2, 2]),
    ("nearest", "pytorch_half_pixel", {"nearest_mode": "round_prefer_ceil"}, [0.5, 0.5]),
    ("nearest", "tf_half_pixel_for_nn", {"nearest_mode": "floor"}, [2, 2]),
    ("nearest", "asymmetric", {"nearest_mode": "ceil"}, [1.5, 0.5]),
]
"""Of images whose sizes vary, in the ways that torch's own interpolation does not have."""


def captured_and_run(tmp_path, proto, arrays):
    """What a file gives in ONNX Runtime, captured, and exported to both runtimes, for inputs of two sizes."""
    from penjing import runtimes
    from penjing.pipeline import building
    from penjing.records.manifest import read_manifest
    from penjing.runtimes.artifact import predictor
    from penjing.steps.draft import Draft
    from penjing.tasks.outputs import flatten_outputs

    ort = pytest.importorskip("onnxruntime")
    network, _, dynamic = open_network(stored(tmp_path, proto))
    example = torch.from_numpy(arrays[0])
    captured = capture_network(network, (example,), {}, dynamic)
    with torch.no_grad():
        _, structure = flatten_outputs(captured(example))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = {"source": [session.run(None, {"x": array}) for array in arrays]}
    with torch.no_grad():
        answers["captured"] = [
            [leaf.numpy() for leaf in flatten_outputs(captured(torch.from_numpy(array)))[0]] for array in arrays
        ]
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        folder = tmp_path / runtime
        folder.mkdir()
        task = pj.Task(example=example, dynamic=dynamic)
        building.build(Draft(captured), runtime, "fp32", task, structure, folder)
        predict = predictor(runtimes.open_artifact(folder, 1), read_manifest(folder))
        answers[runtime] = [flatten_outputs(predict(array))[0] for array in arrays]
    return answers


def test_images_of_varying_sizes_are_resized_in_every_way(tmp_path):
    nodes, numbers = [], {}
    for i, (mode, transform, more, scales) in enumerate(RESIZED):
        numbers[f"s{i}"] = np.float32([1, 1, *scales])
        nodes.append(
            helper.make_node(
                "Resize", ["x", "", f"s{i}"], [f"y{i}"], mode=mode, coordinate_transformation_mode=transform, **more
            )
        )
    shapes = {f"y{i}": ["n", 2, f"h{i}", f"w{i}"] for i in range(len(RESIZED))}
    proto = model(nodes, {"x": ["n", 2, "h", "w"]}, shapes, numbers)
    arrays = [
        np.random.default_rng(0).normal(size=(n, 2, h, w)).astype(np.float32) for n, h, w in ((2, 8, 12), (3, 12, 4))
    ]
    answers = captured_and_run(tmp_path, proto, arrays)
    for who in ("captured", *RUNTIMES):
        for mine, right in zip(answers[who], answers["source"], strict=True):
            for way, one, other in zip(RESIZED, mine, right, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4, err_msg=f"{who}: {way}")


def test_sizes_that_must_be_multiples_still_vary(tmp_path):
    nodes = [
        helper.make_node("SpaceToDepth", ["x"], ["d"], blocksize=2),
        helper.make_node("Conv", ["d", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    proto = model(nodes, {"x": ["n", 3, "h", "w"]}, {"y": None}, {"w": values(4, 12, 3, 3)})
    arrays = [
        np.random.default_rng(0).normal(size=(n, 3, h, w)).astype(np.float32) for n, h, w in ((2, 8, 8), (1, 10, 6))
    ]
    answers = captured_and_run(tmp_path, proto, arrays)
    for who in ("captured", *RUNTIMES):
        for (mine,), (right,) in zip(answers[who], answers["source"], strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-4, err_msg=who)


@pytest.mark.parametrize("indices", [[-1], [0, -2], [[-1, 0], [1, -3]]])
def test_what_counts_from_the_end_of_an_axis_that_varies(tmp_path, indices):
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=1)
    proto = model([node], {"x": ["n", "length", 4]}, {"y": None}, {"i": np.array(indices)})
    network, _, dynamic = open_network(stored(tmp_path, proto))
    captured = capture_network(network, (torch.zeros(2, 6, 4),), {}, dynamic)
    x = np.random.default_rng(0).normal(size=(3, 9, 4)).astype(np.float32)
    assert np.array_equal(captured(torch.from_numpy(x)).numpy(), x[:, np.array(indices)])


def test_of_a_recurrent_network_the_first_open_axis_is_the_batch(tmp_path):
    node = helper.make_node("RNN", ["x", "w", "r", "", "", "h"], ["y"], hidden_size=6)
    proto = model(
        [node], {"x": [5, None, 4], "h": [1, None, 6]}, {"y": None}, {"w": values(1, 6, 4), "r": values(1, 6, 6)}
    )
    _, _, dynamic = open_network(stored(tmp_path, proto))
    assert dynamic == {0: {1: "batch"}, 1: {1: "batch"}}


def test_an_axis_that_the_file_declares_and_a_recurrent_layer_fixes_is_told(tmp_path):
    node = helper.make_node("RNN", ["x", "w", "r"], ["y"], hidden_size=6)
    ports = {"x": ["n", "length", 4]}
    proto = model([node], ports, {"y": None}, {"w": values(1, 6, 4), "r": values(1, 6, 6)})
    source = open_source(stored(tmp_path, proto))
    assert source.inputs == ("x float32 (n, length, 4)",)
    example = torch.zeros(5, 2, 4)
    silent = pj.Task(example=example, dynamic={0: {1: "batch"}})
    assert in_single_precision(source, silent)[2] is None  # what the task says itself is what it wants
    note = in_single_precision(source, with_declared_axes(source, pj.Task(example=example)))[2]
    assert note.startswith("the axis length of x has the example's size in every artifact")


def test_a_fixed_batch_stays_fixed(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]})
    _, example, dynamic = open_network(stored(tmp_path, proto))
    assert dynamic == {}
    assert example[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("node", "code", "word"),
    [
        (helper.make_node("Fused", ["x"], ["y"], name="mine", domain="my.domain"), "operator", "my.domain"),
        (helper.make_node("QuantizeLinear", ["x", "s"], ["y"], name="mine"), "quantized", "QuantizeLinear"),
        (helper.make_node("RandomNormalLike", ["x"], ["y"], name="mine"), "operator", "set 18"),
    ],
    ids=["another domain", "quantized", "random"],
)
def test_what_is_not_taken_is_named_with_its_node(tmp_path, node, code, word):
    proto = model(
        [helper.make_node("Relu", ["x0"], ["x"]), node], {"x0": [1, 4]}, {"y": [1, 4]}, {"s": np.float32([1.0])}
    )
    proto.opset_import.append(helper.make_opsetid("my.domain", 1))
    error = refusal(stored(tmp_path, proto), SourceError, code)
    assert "node 2" in error.got
    assert "'mine'" in error.got
    assert word in error.got


def test_a_loop_is_refused_by_name(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Relu", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, [1, 4]),
        ],
    )
    node = helper.make_node("Loop", ["count", "", "x"], ["y"], name="rounds", body=body)
    proto = model([node], {"x": [1, 4]}, {"y": [1, 4]}, {"count": np.array(3)})
    error = refusal(stored(tmp_path, proto), SourceError, "operator")
    assert "Loop" in error.what
    assert "rounds" in error.got


@pytest.mark.parametrize("opset", [6, 999])
def test_sets_that_are_not_read(tmp_path, opset):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]})
    proto.opset_import[0].version = opset
    assert str(opset) in refusal(stored(tmp_path, proto), SourceError, "unknown-set").got


def test_cycles_and_two_values_of_one_name(tmp_path):
    circle = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    error = refusal(stored(tmp_path, model(circle, {"x": [1, 4]}, {"a": [1, 4]})), CheckpointError, "damaged")
    assert "'b'" in error.got
    twice = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    error = refusal(stored(tmp_path, model(twice, {"x": [1, 4]}, {"y": [1, 4]})), CheckpointError, "damaged")
    assert "'y'" in error.got


def test_an_output_that_nothing_gives(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"z": [1, 4]})
    assert "'z'" in refusal(stored(tmp_path, proto), CheckpointError, "damaged").got


def test_absurd_sizes_take_no_memory(tmp_path):
    sum_ = [helper.make_node("Add", ["x", "w"], ["y"])]
    huge = model(sum_, {"x": [1, 4]}, {"y": ["a", "b"]}, {"w": np.zeros(4, np.float32)})
    huge.graph.initializer[0].dims[:] = [1 << 40]
    refusal(stored(tmp_path, huge), CheckpointError, "damaged")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["x", "zeros"], ["y"]),
    ]
    proto = model(nodes, {"x": [1, 4]}, {"y": ["a", "b"]}, {"shape": np.array([1 << 30, 1 << 20])})
    network, *_ = open_network(stored(tmp_path, proto))
    with raises_case(SourceError, "operator"):
        network(torch.zeros(1, 4))


FAR, WIDE = 1 << 15, 1 << 26
GROWING = {
    "Pad": ({"mode": "edge"}, {"p": np.array([0, 0, FAR, FAR, 0, 0, FAR, FAR])}),
    "Conv": ({"pads": [FAR] * 4}, {"w": np.ones((3, 3, 3, 3), np.float32)}),
    "ConvTranspose": ({"strides": [FAR, FAR]}, {"w": np.ones((3, 3, 3, 3), np.float32)}),
    "AveragePool": ({"kernel_shape": [2, 2], "pads": [FAR] * 4}, {}),
    "MaxPool": ({"kernel_shape": [2, 2], "pads": [FAR, 0, FAR, WIDE]}, {}),
    "LRN": ({"size": WIDE}, {}),
    "MaxUnpool": ({"kernel_shape": [2, 2], "strides": [FAR, FAR]}, {"i": np.zeros((1, 3, 8, 8), np.int64)}),
}


@pytest.mark.parametrize("operator", GROWING)
def test_a_few_numbers_do_not_make_a_small_tensor_a_huge_one(tmp_path, operator):
    attributes, stored_values = GROWING[operator]
    node = helper.make_node(operator, ["x", *stored_values], ["y"], **attributes)
    proto = model([node], {"x": [1, 3, 8, 8]}, {"y": None}, stored_values)
    network, *_ = open_network(stored(tmp_path, proto))
    with raises_case(SourceError, "operator") as caught:
        network(torch.zeros(1, 3, 8, 8))
    assert "too large" in caught.value.what


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "C:\\weights.bin", "", "a/../../weights.bin"])
def test_tensors_outside_the_folder_are_not_read(tmp_path, location):
    proto = model(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}, {"w": np.ones(4, np.float32)}
    )
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    (tmp_path / "inner").mkdir()
    assert repr(location) in refusal(stored(tmp_path / "inner", proto), CheckpointError, "outside").got


def test_tensors_beside_the_file_are_read_and_have_to_be_whole(tmp_path):
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [1, 2000]}, {"y": [1, 2000]},
                 {"w": np.arange(2000, dtype=np.float32)})  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    network, *_ = open_network(path)
    assert torch.equal(network(torch.zeros(1, 2000))[0], torch.arange(2000.0))
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:-1])
    refusal(path, CheckpointError, "incomplete")


def test_a_damaged_file_is_an_error_and_no_crash(exported, tmp_path):
    content = exported[0].read_bytes()
    path = tmp_path / "model.onnx"
    draw = random.Random(7)
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(min(len(changed), 6000))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed) if draw.random() < 0.8 else content[: draw.randrange(len(content))])
        try:
            open_network(path)
        except PenjingError as error:
            assert len(str(error)) < 3000


# --- what other exporters write, against ONNX Runtime -----------------------------------------------------------


def assert_agrees(tmp_path, proto, *batches):
    """The module computes what ONNX Runtime computes of the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = stored(tmp_path, proto)
    network, *_ = open_network(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in batches:
        with torch.no_grad():
            outputs = network(*[torch.from_numpy(value) for value in inputs.values()])
        given = outputs.values() if isinstance(outputs, dict) else [outputs]
        for output, expected in zip(given, session.run(None, inputs), strict=True):
            np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-5)
    return network


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


NAMES = ("a b", "a/b", "a:0", "'q\"", "class", "forward", "training", "_order", "_known", "_stored", "_freed", "ports",
         "inputs", "0", "a.b", "a.b.c", "self", "é", "..", "_parameters", "run", "compute", "layer")  # fmt: skip


def test_nodes_weights_and_ports_may_have_any_name(tmp_path):
    nodes, weights, at = [], {}, "return"
    for i, name in enumerate(NAMES):
        weights[name] = values(4, 4, seed=i) / 2
        nodes.append(helper.make_node("MatMul", [at, name], [f"value {i}"], name=name))
        at = f"value {i}"
    proto = model(nodes, {"return": ["batch", 4]}, {at: ["batch", 4]}, weights)
    network = assert_agrees(tmp_path, proto, {"return": values(2, 4)}, {"return": values(3, 4)})
    assert sum(p.numel() for p in network.parameters()) == 16 * len(NAMES)
    captured = capture_network(network, (torch.ones(2, 4),), {}, {0: {0: "batch"}})
    with torch.no_grad():
        torch.testing.assert_close(captured(torch.ones(3, 4)), network(torch.ones(3, 4)))


def test_weights_may_lie_below_the_name_of_a_node(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "a.weight"], ["y"], name="a"),
        helper.make_node("Mul", ["y", "a.weight.b"], ["z"], name="/a/weight"),
    ]
    proto = model(nodes, {"x": ["n", 4]}, {"z": ["n", 4]}, {"a.weight": values(4), "a.weight.b": values(4, seed=1)})
    assert_agrees(tmp_path, proto, {"x": values(2, 4)})


@pytest.mark.parametrize("opset", [10, 13])
def test_constants_among_sizes_are_numbers(tmp_path, opset):
    """Scales that are computed from sizes in floating point, as TensorFlow's converter writes them."""
    given = ["x", "scales"] if opset == 10 else ["x", "", "scales"]
    more = {} if opset == 10 else {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["target", "floats"], ["factors"]),
        helper.make_node("Concat", ["ones", "factors"], ["scales"], axis=0),
        helper.make_node("Resize", given, ["y"], mode="nearest", **more),
    ]
    constants = {
        "two": np.array([2]),
        "four": np.array([4]),
        "target": np.float32([12, 10]),
        "ones": np.float32([1, 1]),
    }
    proto = model(nodes, {"x": ["n", 3, "h", "w"]}, {"y": ["a", "b", "c", "d"]}, constants, opset)
    network = assert_agrees(tmp_path, proto, {"x": values(1, 3, 4, 5)}, {"x": values(2, 3, 6, 5)})
    assert not list(network.parameters())


def test_outputs_that_are_sizes_have_the_type_of_the_file(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["shape"], ["integers"], to=TensorProto.INT32),
        helper.make_node("Abs", ["floats"], ["a"]),
        helper.make_node("Mul", ["floats", "half"], ["halves"]),
        helper.make_node("Slice", ["x", "zero", "two", "one"], ["narrow"]),
        helper.make_node("Add", ["narrow", "halves"], ["y"]),
    ]
    names = ("shape", "floats", "integers", "a", "halves")
    constants = {"half": np.float32([0.5]), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    proto = model(nodes, {"x": ["n", 4]}, dict.fromkeys(names, [2]) | {"y": ["n", 2]}, constants)
    types = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT)
    for output, kind in zip(proto.graph.output, types, strict=False):
        output.type.tensor_type.elem_type = kind
    answers = captured_and_run(tmp_path, proto, [values(3, 4), values(5, 4)])
    for where in ("captured", *RUNTIMES):
        for batch, expected in zip(answers[where], answers["source"], strict=True):
            for output, reference in zip(batch, expected, strict=True):
                np.testing.assert_allclose(output, reference, rtol=1e-4)
                assert output.dtype == reference.dtype, where


def test_a_weight_times_a_size_is_a_weight(tmp_path):
    nodes = [
        helper.make_node("Size", ["x"], ["count"]),
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["w", "number"], ["scaled"]),
        helper.make_node("MatMul", ["x", "scaled"], ["y"]),
    ]
    proto = model(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": values(4, 3)})
    assert sum(p.numel() for p in assert_agrees(tmp_path, proto, {"x": values(5, 4)}).parameters()) == 12


def test_nearest_of_the_tenth_set_rounds_up_where_it_shrinks(tmp_path):
    proto = model([helper.make_node("Resize", ["x", "s"], ["y"])], {"x": ["n", 3, 8, 6]}, {"y": ["a", "b", "c", "d"]},
                 {"s": np.float32([1, 1, 1.5, 0.6])}, 10)  # fmt: skip
    assert_agrees(tmp_path, proto, {"x": values(2, 3, 8, 6)})


@pytest.mark.parametrize("transform", ["half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"])
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil"])
def test_images_of_varying_sizes_are_enlarged_by_whole_factors(tmp_path, transform, rounding):
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], coordinate_transformation_mode=transform,
                            nearest_mode=rounding)  # fmt: skip
    proto = model([node], {"x": ["n", 3, "h", "w"]}, {"y": ["a", "b", "c", "d"]}, {"s": np.float32([1, 1, 2, 3])}, 13)
    network = assert_agrees(tmp_path, proto, {"x": values(1, 3, 4, 5)}, {"x": values(2, 3, 6, 5)})
    captured = capture_network(network, (torch.zeros(2, 3, 4, 5),), {}, {0: {0: "n", 2: "h", 3: "w"}})
    x = torch.from_numpy(values(3, 3, 7, 9))
    assert torch.equal(captured(x), network(x))


def test_outputs_of_an_unknown_rank_are_read(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": None}, {"y": None})
    network, example, _ = open_network(stored(tmp_path, proto))
    assert example is None
    assert network(torch.ones(2, 3)).shape == (2, 3)


# --- files that nobody should write --------------------------------------------------------------------------------


def one(operator, *constants, shape=(2, 4), opset=18, **attributes):
    """A node of x and constants, and its model."""
    numbers = {f"c{i}": np.asarray(value) for i, value in enumerate(constants)}
    node = helper.make_node(operator, ["x", *numbers], ["y"], name="bad", **attributes)
    return model([node], {"x": list(shape)}, {"y": ["a", "b"]}, numbers, opset)


def of_sizes(operator, *constants, **attributes):
    numbers = {f"c{i}": np.asarray(value) for i, value in enumerate(constants)}
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node(operator, ["s", *numbers], ["t"], name="bad", **attributes),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    return model(nodes, {"x": [2, 4]}, {"y": ["a", "b"]}, numbers)


def of_constants(operator, *constants, **attributes):
    numbers = {f"c{i}": np.asarray(value) for i, value in enumerate(constants)}
    nodes = [
        helper.make_node(operator, [*numbers], ["t"], name="bad", **attributes),
        helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT),
    ]
    return model(nodes, {"x": [2, 4]}, {"y": ["a", "b"]}, numbers)


BAD = {
    "axis too large": one("Softmax", axis=1 << 62),
    "type unknown": one("Cast", to=99),
    "type of sizes unknown": of_sizes("Cast", to=99),
    "strides of zero": one("AveragePool", shape=(2, 3, 8, 8), kernel_shape=[2, 2], strides=[0, 0], ceil_mode=1),
    "kernel of another rank": one("AveragePool", shape=(2, 3, 8, 8), kernel_shape=[2, 2, 2]),
    "kernel of another shape": one("Conv", values(4, 3, 3, 3), shape=(2, 3, 8, 8), kernel_shape=[5, 5]),
    "mode unknown": one("Resize", np.float32([]), np.float32([1, 2]), nearest_mode="none"),
    "scales absurd": one("Resize", np.float32([]), np.float32([1, 1e9]), mode="linear"),
    "scales no number": one("Resize", np.float32([]), np.float32([np.nan, np.inf])),
    "shape absurd": one("Reshape", [1 << 40, 1 << 40]),
    "padding absurd": one("Pad", [1 << 40, 0, 0, 1 << 40]),
    "parts of nothing": one("Split", axis=1, num_outputs=0),
    "sizes out of range": of_sizes("Gather", [9]),
    "sizes by zero": of_sizes("Div", [0]),
    "sizes modulo zero": of_sizes("Mod", [0]),
    "sizes expanded": of_sizes("Expand", [1 << 20, 1 << 20, 2]),
    "range absurd": of_constants("Range", 0, 1 << 60, 1),
    "range without end": of_constants("Range", 0, 5, 0),
    "constant expanded": of_constants("Expand", 3, [1 << 20, 1 << 20]),
    "negative shape": of_constants("ConstantOfShape", [-5, 4]),
    "window absurd": of_constants("HannWindow", 1 << 50),
    "weights of no recurrent layer": one("LSTM", values(24), values(3), shape=(2, 3, 4), hidden_size=6),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_node_is_named(tmp_path, name):
    with raises_case(SourceError, "operator") as caught:
        network, example, _ = open_network(stored(tmp_path, BAD[name]))
        network(*example)
    assert "'bad'" in caught.value.got


def doubling(start):
    nodes = [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0, name=f"n{i}") for i in range(45)]
    return model([*nodes, helper.make_node("Cast", ["c45"], ["y"], to=1)], {"x": [1]}, {"y": ["a"]}, {"c0": start})


def filled(count, size):
    nodes = [helper.make_node("ConstantOfShape", ["s"], [f"c{i}"], name=f"n{i}") for i in range(count)]
    total = helper.make_node("Sum", ["x", *[f"c{i}" for i in range(count)]], ["y"])
    return model([*nodes, total], {"x": [1]}, {"y": ["a"]}, {"s": np.array([size])})


def outer(size):
    nodes = [
        helper.make_node("Reshape", ["c", "column"], ["a"]),
        helper.make_node("Mul", ["a", "c"], ["b"], name="n"),
        helper.make_node("Add", ["x", "b"], ["y"]),
    ]
    weights = {"c": values(size), "column": np.array([-1, 1])}
    return model(nodes, {"x": [1]}, {"y": ["a", "b"]}, weights)


BOMBS = {
    "numbers": doubling(np.array([1, 2])),
    "weights": doubling(np.float32([1, 2])),
    "many of some size": filled(300, 1 << 21),
    "a product": outer(100_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_grow_are_refused_before_they_are_computed(tmp_path, name):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises_case(SourceError, "operator") as caught:
        network, *_ = open_network(stored(tmp_path, BOMBS[name]))
        network(torch.zeros(1))
    assert "'n" in caught.value.got
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB; on macOS bytes, and less


def test_functions_that_double_are_counted_before_they_are_written_out(tmp_path):
    domain, sets = "mine", [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    proto = model([helper.make_node("f0", ["x"], ["y"], domain=domain)], {"x": [1]}, {"y": [1]}, domains=[domain])
    for i in range(40):
        names = [f"f{i + 1}"] * 2 if i < 39 else ["Relu", "Relu"]
        where = {"domain": domain} if i < 39 else {}
        body = [helper.make_node(names[0], ["a"], ["b"], **where), helper.make_node(names[1], ["b"], ["c"], **where)]
        proto.functions.append(helper.make_function(domain, f"f{i}", ["a"], ["c"], body, sets))
    assert refusal(stored(tmp_path, proto), SourceError, "too-large").code == "too-large"


@pytest.mark.parametrize(
    "node",
    [
        one("AveragePool", shape=(2, 3, 8, 8), kernel_shape=[2, 2], auto_pad="SAME"),
        one("LSTM", values(1, 24, 4), values(1, 24, 6), shape=(2, 3, 4), hidden_size=6, direction="backward"),
        one("Resize", np.float32([]), np.float32([1, 2]), mode="area"),
        one("Resize", np.float32([]), np.float32([1, 2]), mode="linear", coordinate_transformation_mode="corners"),
        one("ScatterElements", np.array([[0]]), np.float32([[1]]), reduction="mean"),
    ],
    ids=["auto_pad", "direction", "mode", "coordinate_transformation_mode", "reduction"],
)
def test_words_that_the_standard_does_not_have_are_named(tmp_path, node):
    error = refusal(stored(tmp_path, node), SourceError, "operator")
    assert "'bad'" in error.got
    assert "is not one of" in error.what


@pytest.mark.parametrize(
    "operator",
    ["DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "com.microsoft.QLinearAdd"],
)
def test_what_is_quantized_already_is_told(tmp_path, operator):
    domain, _, word = operator.rpartition(".")
    inputs, outputs = {
        "DequantizeLinear": (["w", "s"], ["y"]),
        "DynamicQuantizeLinear": (["x"], ["y", "a", "b"]),
        "MatMulInteger": (["w", "w"], ["y"]),
        "ConvInteger": (["w", "w"], ["y"]),
    }.get(operator, (["x", "s"], ["y"]))
    node = helper.make_node(word, inputs, outputs, name="mine", domain=domain)
    weights = {"w": np.zeros((4, 4), np.uint8), "s": np.float32(0.5)}
    proto = model([node], {"x": [4, 4]}, {"y": [4, 4]}, weights, domains=[domain] if domain else ())
    error = refusal(stored(tmp_path, proto), SourceError, "quantized")
    assert word in error.got
    assert "quantized from" in error.remedy


@pytest.mark.parametrize("state", ["of the input", "of the file"])
def test_states_of_recurrent_layers_have_the_batch_of_their_input(tmp_path, state):
    """Torch's own operator reads past the end of a state whose batch is another."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["batch"], axis=0),
        helper.make_node("Concat", ["two", "batch", "six"], ["sizes"], axis=0),
        helper.make_node("ConstantOfShape", ["sizes" if state == "of the input" else "fixed"], ["state"]),
        helper.make_node("LSTM", ["x", "w", "r", "b", "", "state", "state"], ["y"], hidden_size=6,
                         direction="bidirectional"),
    ]  # fmt: skip
    constants = {"one": np.array([1]), "two": np.array([2]), "six": np.array([6]), "fixed": np.array([2, 2, 6])}
    weights = {"w": values(2, 24, 4), "r": values(2, 24, 6, seed=1), "b": values(2, 48, seed=2)}
    proto = model(nodes, {"x": [5, "batch", 4]}, {"y": [5, 2, "batch", 6]}, {**constants, **weights})
    network, _, dynamic = open_network(stored(tmp_path, proto))
    assert dynamic == {0: {1: "batch"}}
    captured = capture_network(network, (torch.zeros(5, 2, 4),), {}, dynamic)
    x = torch.from_numpy(values(5, 7, 4))
    with torch.no_grad():
        torch.testing.assert_close(captured(x), network(x))
    fixed = capture_network(network, (torch.zeros(5, 2, 4),), {}, {})
    with torch.no_grad(), pytest.raises(RuntimeError):  # and no crash
        fixed(x)


def gates_in_order(shared):
    """An LSTM whose gates lie in torch's order, and are put into ONNX's by slices and joins."""
    nodes, joined = [], {}
    for name, at in (("w", "ih"), ("r", "hh")):
        for gate, (start, end) in enumerate(((0, 6), (18, 24), (6, 18))):
            places = [f"{at}_{gate}_{word}" for word in ("start", "end")]
            joined |= dict(zip(places, (np.array([start]), np.array([end])), strict=True))
            nodes.append(helper.make_node("Slice", [f"weight_{at}", *places, "zero"], [f"{at}_{gate}"]))
        nodes.append(helper.make_node("Concat", [f"{at}_{gate}" for gate in range(3)], [f"{at}_all"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{at}_all", "zero"], [name]))
    nodes.append(helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=6))
    outputs = {"y": [5, 1, "batch", 6]}
    if shared:
        nodes.append(helper.make_node("ReduceSum", ["ih_all"], ["sum"]))
        outputs["sum"] = None
    weights = {"weight_ih": values(24, 4), "weight_hh": values(24, 6, seed=1), "zero": np.array([0]), **joined}
    return model(nodes, {"x": [5, "batch", 4]}, outputs, weights)


@pytest.mark.parametrize("shared", [False, True])
def test_gates_in_another_order_are_weights_of_the_layer_unless_somebody_else_reads_them(tmp_path, shared):
    network = assert_agrees(tmp_path, gates_in_order(shared), {"x": values(5, 3, 4)})
    names = [name.rpartition(".")[2] for name, _ in network.named_parameters()]
    assert names == (["weight_ih", "weight_hh"] if shared else ["weight_ih_l0", "weight_hh_l0"])
    assert sum(p.numel() for p in network.parameters()) == 24 * (4 + 6)


def test_a_state_of_another_size_is_refused(tmp_path):
    node = helper.make_node(
        "GRU", ["x", "w", "r", "b", "", "h"], ["y"], hidden_size=6, linear_before_reset=1, name="bad"
    )
    weights = {"w": values(1, 18, 4), "r": values(1, 18, 6), "b": values(1, 36), "h": values(1, 2, 6)}
    network, *_ = open_network(stored(tmp_path, model([node], {"x": [5, "b", 4]}, {"y": [5, 1, "b", 6]}, weights)))
    network(torch.zeros(5, 2, 4))
    with raises_case(SourceError, "operator"):
        network(torch.zeros(5, 3, 4))


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("rows", ["zero", "one", "equal", "computed"])
def test_a_state_with_equal_rows_is_that_of_every_sample(tmp_path, operator, rows):
    """A runtime takes the batch of the state alone; the network, every batch."""
    batch = 1 if rows == "one" else 3
    state = np.zeros((1, 3, 6), np.float32) if rows == "zero" else values(1, 1, 6).repeat(batch, 1)
    inputs = ["x", "w", "r", "b", "", "state", *(["state"] if operator == "LSTM" else [])]
    more = {"linear_before_reset": 1} if operator == "GRU" else {}
    nodes = [helper.make_node(operator, inputs, ["y"], hidden_size=6, **more)]
    gates = {"LSTM": 24, "GRU": 18, "RNN": 6}[operator]
    weights = {"w": values(1, gates, 4), "r": values(1, gates, 6, seed=1), "b": values(1, 2 * gates), "state": state}
    if rows == "computed":
        half = numpy_helper.from_array(np.array([0.5], np.float32))
        nodes.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["state"], value=half))
        weights = {**weights, "sizes": np.array([1, 3, 6])}
        del weights["state"]
    x = values(5, batch, 4)
    network = assert_agrees(tmp_path, model(nodes, {"x": [5, "batch", 4]}, {"y": None}, weights), {"x": x})
    captured = capture_network(network, (torch.zeros(5, 2, 4),), {}, {0: {1: "batch"}})
    single = torch.from_numpy(x[:, :1])
    with torch.no_grad():
        torch.testing.assert_close(captured(torch.from_numpy(x)), network(torch.from_numpy(x)))
        torch.testing.assert_close(captured(single.repeat(1, 7, 1))[:, :, 6], network(single)[:, :, 0])


def test_a_stored_state_of_a_batch_is_refused_beside_a_batch_that_varies(tmp_path):
    node = helper.make_node("LSTM", ["x", "w", "r", "b", "", "h", "h"], ["y"], hidden_size=6, name="bad")
    weights = {"w": values(1, 24, 4), "r": values(1, 24, 6), "b": values(1, 48), "h": values(1, 2, 6)}
    network, _, dynamic = open_network(stored(tmp_path, model([node], {"x": [5, "batch", 4]}, {"y": None}, weights)))
    for batch in (1, 2, 3):
        with raises_case(SourceError, "state-batch") as caught:
            capture_network(network, (torch.zeros(5, batch, 4),), {}, dynamic)
        assert "'bad'" in caught.value.got
    captured = capture_network(network, (torch.zeros(5, 2, 4),), {}, {})
    x = torch.from_numpy(values(5, 2, 4))
    with torch.no_grad():
        torch.testing.assert_close(captured(x), network(x))


def test_branches_have_as_many_outputs_as_their_node(tmp_path):
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["t"])], "branch", [],
                              [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 4])])  # fmt: skip
    node = helper.make_node("If", ["c"], ["y", "z"], name="bad", then_branch=inner, else_branch=inner)
    proto = model([node], {"x": [2, 4]}, {"y": [2, 4], "z": [2, 4]}, {"c": np.array(True)})
    assert "'bad'" in refusal(stored(tmp_path, proto), SourceError, "operator").got


def test_names_that_are_no_text_sparse_tensors_and_text(tmp_path):
    bad = model([helper.make_node("Relu", ["QQQ"], ["y"])], {"QQQ": [2, 4]}, {"y": [2, 4]})
    path = tmp_path / "bytes.onnx"
    path.write_bytes(bad.SerializeToString().replace(b"QQQ", b"\xff\xfeq"))
    refusal(path, CheckpointError, "damaged")
    bad = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [2, 4]}, {"y": [2, 4]})
    few = numpy_helper.from_array(np.float32([1, 2]), "w")
    bad.graph.sparse_initializer.append(helper.make_sparse_tensor(few, numpy_helper.from_array(np.array([0, 3])), [4]))
    assert "'w'" in refusal(stored(tmp_path, bad), SourceError, "sparse").got
    bad = model([helper.make_node("Identity", ["w"], ["y"])], {"x": [2, 4]}, {"y": [2]})
    bad.graph.initializer.append(helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"b"]))
    assert "'w'" in refusal(stored(tmp_path, bad), SourceError, "text").got


def test_a_declared_size_that_is_absurd_takes_no_memory(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [1 << 40, 1 << 40]}, {"y": ["a", "b"]})
    assert open_network(stored(tmp_path, proto))[1] is None


def test_a_call_with_other_inputs_says_which_it_takes(tmp_path):
    proto = model([helper.make_node("Add", ["x", "z"], ["y"])], {"x": [2, 4], "z": [2, 4]}, {"y": [2, 4]})
    network, *_ = open_network(stored(tmp_path, proto))
    for inputs in ((torch.ones(2, 4),), (torch.ones(2, 4),) * 3):
        with pytest.raises(TypeError, match="takes x, z"):
            network(*inputs)


def test_a_table_of_positions_is_cut_to_a_length_that_varies(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"], axis=0),
        helper.make_node("Slice", ["positions", "zero", "length", "one"], ["places"]),
        helper.make_node("Gather", ["table", "places"], ["embedded"]),
        helper.make_node("Add", ["x", "embedded"], ["y"]),
    ]
    constants = {"one": np.array([1]), "zero": np.array([0]), "positions": np.arange(16)[None], "table": values(16, 4)}
    proto = model(nodes, {"x": ["n", "length", 4]}, {"y": ["n", "length", 4]}, constants)
    network = assert_agrees(tmp_path, proto, {"x": values(2, 5, 4)}, {"x": values(3, 9, 4)})
    captured = capture_network(network, (torch.zeros(2, 5, 4),), {}, {0: {0: "n", 1: "length"}})
    with torch.no_grad():
        torch.testing.assert_close(captured(torch.ones(3, 9, 4)), network(torch.ones(3, 9, 4)))
