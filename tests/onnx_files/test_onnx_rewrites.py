"""Rewrites change the operators of a file, never its answers."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from penjing import runtimes
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.onnx_files import write as onnx_file
from penjing.onnx_files.rewrites import pad_in_convolutions, read_sizes_behind, store_in_half, turn_for_each
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

RANDOM = np.random.default_rng(0)


def constant(name, values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def built(nodes, constants, outputs=("y",), shape=(2, 3, 9, 8)):
    graph = helper.make_graph(
        nodes,
        "a test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list("nchw")) for name in outputs],
        [constant("w", RANDOM.normal(size=(4, 3, 3, 3))), *constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def answers(model, shape=(2, 3, 9, 8)):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def rewritten(model):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    pad_in_convolutions(changed)
    onnx.checker.check_model(changed)
    for mine, theirs in zip(answers(changed), answers(model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    return changed


def types(model):
    return [node.op_type for node in model.graph.node]


def quantizers(before, after, grid, clipped=False):
    nodes = [helper.make_node("QuantizeLinear", [before, *grid], [f"{after}_q"])]
    last = f"{after}_q"
    if clipped:
        nodes.append(helper.make_node("Clip", [last, "low", "high"], [f"{after}_c"]))
        last = f"{after}_c"
    return [*nodes, helper.make_node("DequantizeLinear", [last, *grid], [after])]


GRID = [constant("scale", 0.05), constant("zero", 117, np.uint8)]
EDGES = [constant("low", 0, np.uint8), constant("high", 127, np.uint8)]
PADS = {
    "even": [0, 0, 1, 1, 0, 0, 1, 1],
    "uneven": [0, 0, 2, 0, 0, 0, 1, 3],
    "one side": [0, 0, 0, 1, 0, 0, 0, 0],
}


@pytest.mark.parametrize("own", [None, [0, 1, 2, 0]], ids=["plain", "padded itself"])
@pytest.mark.parametrize("value", [None, 0.0], ids=["no value", "zero"])
@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_a_pad_with_zeros_moves_into_the_convolution(pads, value, own):
    inputs = ["x", "pads"] + (["value"] if value is not None else [])
    attributes = {"pads": own} if own else {}
    model = built(
        [
            helper.make_node("Pad", inputs, ["p"]),
            helper.make_node("Conv", ["p", "w"], ["y"], strides=[2, 1], **attributes),
        ],
        [constant("pads", pads, np.int64)] + ([constant("value", value)] if value is not None else []),
    )
    changed = rewritten(model)
    assert types(changed) == ["Conv"]
    assert {tensor.name for tensor in changed.graph.initializer} == {"w"}


@pytest.mark.parametrize("clipped", [False, True])
def test_between_quantizers_of_one_grid_the_second_goes_too(clipped):
    grid = ["scale", "zero"]
    model = built(
        [
            *quantizers("x", "a", grid, clipped),
            helper.make_node("Pad", ["a", "pads"], ["p"]),
            *quantizers("p", "b", grid, clipped),
            helper.make_node("Conv", ["b", "w"], ["y"]),
        ],
        [*GRID, constant("pads", PADS["uneven"], np.int64), *(EDGES if clipped else [])],
    )
    changed = rewritten(model)
    assert types(changed) == ["QuantizeLinear", *["Clip"] * clipped, "DequantizeLinear", "Conv"]


def test_a_quantizer_on_another_grid_stays():
    model = built(
        [
            *quantizers("x", "a", ["scale", "zero"]),
            helper.make_node("Pad", ["a", "pads"], ["p"]),
            *quantizers("p", "b", ["other", "zero"]),
            helper.make_node("Conv", ["b", "w"], ["y"]),
        ],
        [*GRID, constant("other", 0.2), constant("pads", PADS["even"], np.int64)],
    )
    assert types(rewritten(model)) == types(model)


def test_a_narrower_quantizer_behind_the_pad_stays():
    model = built(
        [
            *quantizers("x", "a", ["scale", "zero"]),
            helper.make_node("Pad", ["a", "pads"], ["p"]),
            *quantizers("p", "b", ["scale", "zero"], clipped=True),
            helper.make_node("Conv", ["b", "w"], ["y"]),
        ],
        [*GRID, *EDGES, constant("pads", PADS["even"], np.int64)],
    )
    assert "Pad" in types(rewritten(model))


LEFT = {
    "ones": (["x", "pads", "one"], {}, [0, 0, 1, 1, 0, 0, 1, 1]),
    "reflection": (["x", "pads"], {"mode": "reflect"}, [0, 0, 1, 1, 0, 0, 1, 1]),
    "edges": (["x", "pads"], {"mode": "edge"}, [0, 0, 1, 1, 0, 0, 1, 1]),
    "cropping": (["x", "pads"], {}, [0, 0, -1, 1, 0, 0, 1, 1]),
    "batch": (["x", "pads"], {}, [1, 0, 1, 1, 0, 0, 1, 1]),
    "some axes": (["x", "pads", "", "axes"], {}, [1, 2]),
    "computed": (["x", "computed"], {}, [0, 0, 1, 1, 0, 0, 1, 1]),
}


@pytest.mark.parametrize(("inputs", "attributes", "pads"), LEFT.values(), ids=LEFT)
def test_other_pads_are_left_alone(inputs, attributes, pads):
    model = built(
        [
            helper.make_node("Abs", ["pads"], ["computed"]),
            helper.make_node("Pad", inputs, ["p"], **attributes),
            helper.make_node("Conv", ["p", "w"], ["y"]),
        ],
        [constant("pads", pads, np.int64), constant("one", 1.0), constant("axes", [2], np.int64)],
    )
    assert types(rewritten(model)) == types(model)


@pytest.mark.parametrize("reader", ["Relu", None], ids=["another operator", "an output"])
def test_a_pad_that_somebody_else_reads_stays(reader):
    nodes = [helper.make_node("Pad", ["x", "pads"], ["p"]), helper.make_node("Conv", ["p", "w"], ["y"])]
    if reader:
        nodes.append(helper.make_node(reader, ["p"], ["z"]))
    model = built(nodes, [constant("pads", PADS["even"], np.int64)], outputs=("y", "z" if reader else "p"))
    assert types(rewritten(model)) == types(model)


def test_a_convolution_that_chooses_its_own_pads_is_left_alone():
    model = built(
        [
            helper.make_node("Pad", ["x", "pads"], ["p"]),
            helper.make_node("Conv", ["p", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2]),
        ],
        [constant("pads", PADS["uneven"], np.int64)],
    )
    assert types(rewritten(model)) == types(model)


def test_what_stands_before_a_convolution_may_have_outputs_that_nobody_reads():
    model = built(
        [
            helper.make_node("Split", ["x"], ["unread", "read"], axis=1, num_outputs=2),
            helper.make_node("Conv", ["read", "w"], ["y"]),
        ],
        [],
        shape=(2, 6, 9, 8),
    )
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    pad_in_convolutions(changed)
    assert changed == model


def test_two_pads_that_share_their_sizes_both_go():
    model = built(
        [
            helper.make_node("Pad", ["x", "pads"], ["p"]),
            helper.make_node("Conv", ["p", "w"], ["a"]),
            helper.make_node("Pad", ["x", "pads"], ["r"]),
            helper.make_node("Conv", ["r", "w"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        [constant("pads", PADS["uneven"], np.int64)],
    )
    changed = rewritten(model)
    assert types(changed) == ["Conv", "Conv", "Add"]
    assert {tensor.name for tensor in changed.graph.initializer} == {"w"}


class Padded(nn.Module):
    """Pads in front of strided convolutions, as in networks that came from TensorFlow."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.depthwise(F.pad(x, (0, 1, 1, 2))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("capabilities", [None, "onnxruntime", "openvino"])
@pytest.mark.parametrize("bits", [8, 7])
def test_a_quantized_network_with_pads_has_none_in_its_file(tmp_path, capabilities, bits):
    torch.manual_seed(0)
    data = torch.randn(16, 3, 15, 15)
    task = Task(example=data[:2], calibration=[data])
    here = runtimes.get(capabilities or "onnxruntime").capabilities(machine(1).instruction_sets)
    told = here if capabilities else None
    network = capture_network(Padded().eval(), *task.call())
    # Without VNNI products of 8 by 8 bits saturate, and the file could not be run here.
    draft = Static(weight_bits=here.weight.bits, activation_bits=bits)(
        Draft(network), Context(task=task, capabilities=told)
    )
    path = tmp_path / "model.onnx"
    onnx_file.write(freeze(draft.network, draft.plan), task.call(), None, ["output"], path)
    assert "Pad" not in types(onnx.load(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    with torch.no_grad():
        planned = insert(draft.network, draft.plan)(data).numpy()
    step = np.ptp(planned) / 255
    assert np.abs(output - planned).max() <= 2 * step
    assert np.abs(output - planned).mean() <= 0.1 * step


def test_constants_are_stored_in_half_where_they_fit_and_it_pays():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Max", ["a", "mask"], ["b"]),
        helper.make_node("Add", ["b", "few"], ["c"]),
        helper.make_node("Reshape", ["c", "sizes"], ["y"]),
    ]
    mask = np.full((1, 4, 7, 6), -np.inf)
    sizes = constant("sizes", [2, 4, 7, 6], np.int64)
    model = built(nodes, [constant("mask", mask), constant("few", [0.1] * 6), sizes])
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    store_in_half(changed)
    onnx.checker.check_model(changed)
    data_types = {tensor.name: tensor.data_type for tensor in changed.graph.initializer}
    other = {"mask": TensorProto.FLOAT, "few": TensorProto.FLOAT, "sizes": TensorProto.INT64}
    assert data_types == {"w_half": TensorProto.FLOAT16, **other}
    (before,), (after,) = answers(model), answers(changed)
    assert 0 < np.abs(before - after).max() < 1e-2


class Again(nn.Module):
    """A layer that is called three times, also as the table that the words are looked up in."""

    def __init__(self, table):
        super().__init__()
        self.layer, self.words = nn.Linear(32, 32), nn.Embedding(32, 32)
        if table:
            self.words.weight = self.layer.weight

    def forward(self, ids):
        return self.layer(self.layer(self.layer(self.words(ids)).relu()).relu())


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_a_layer_that_is_called_again_on_three_axes_is_integer_every_time(runtime, table, tmp_path):
    torch.manual_seed(0)
    data = [torch.randint(0, 32, (n, 5)) for n in (2, 16, 16, 3)]
    task = Task(example=data[0], calibration=data[1:3])
    context = Context(task=task, capabilities=runtimes.get(runtime).capabilities(machine(1).instruction_sets))
    draft = Static()(Draft(capture_network(Again(table).eval(), *task.call())), context)
    structure = flatten_outputs(draft.network(data[0]))[1]
    manifest = building.build(draft, runtime, "int8", task, structure, tmp_path)
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, tmp_path)[0]
    assert [row.executed for row in rows if row.kind == "linear"] == ["int8"] * 3
    session = isolated.open_artifact(tmp_path, 1)
    for x in data:
        output = predictor(session, manifest)(x.numpy())
        np.testing.assert_allclose(output, insert(draft.network, draft.plan)(x).numpy(), atol=1e-5)
    if runtime == "onnxruntime":
        graph = onnx.load(str(tmp_path / "model.onnx")).graph
        tables = [t for t in graph.initializer if list(t.dims) == [32, 32]]
        assert [t.data_type for t in tables] == [TensorProto.INT8] * (1 if table else 2)


def test_a_weight_is_turned_for_each_product_that_reads_it_so():
    def linear(n):
        return helper.make_node("MatMul", ["rows", "turned"], [f"y{n}"])

    def model(count):
        nodes = [
            helper.make_node("Reshape", ["x", "shape"], ["rows"]),
            helper.make_node("DequantizeLinear", ["w8", "scale", "zero"], ["float"], axis=0),
            helper.make_node("Transpose", ["float"], ["turned"], perm=[1, 0]),
            *map(linear, range(count)),
        ]
        constants = [
            constant("shape", [-1, 8], np.int64),
            constant("w8", RANDOM.integers(-127, 128, size=(5, 8)), np.int8),
            constant("scale", RANDOM.uniform(0.01, 0.1, size=5)),
            constant("zero", np.zeros(5), np.int8),
        ]
        return built(nodes, constants, [f"y{n}" for n in range(count)])

    for count in (1, 2, 3):
        before = model(count)
        after = onnx.ModelProto()
        after.CopyFrom(before)
        turn_for_each(after)
        assert types(after).count("Transpose") == types(after).count("DequantizeLinear") == count
        assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
        for mine, theirs in zip(answers(after), answers(before), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_sizes_are_read_behind_activations_and_quantizers():
    """The second reader of a convolution's result keeps it in floating point."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Shape", ["conv"], ["size"], start=2),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["floats"]),
        helper.make_node("MaxPool", ["floats"], ["pool"], kernel_shape=[2, 2]),
        helper.make_node("Concat", ["four", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["pool", "", "", "sizes"], ["large"]),
        helper.make_node("Add", ["large", "floats"], ["y"]),
    ]
    constants = [constant("scale", 0.1), constant("zero", 0, np.uint8), constant("four", [2, 4], np.int64)]
    model = built(nodes, constants)
    before = answers(model)
    read_sizes_behind(model)
    onnx.checker.check_model(model)
    assert [node.input[0] for node in model.graph.node if node.op_type == "Shape"] == ["floats"]
    assert np.array_equal(answers(model)[0], before[0])


def test_sizes_stay_in_front_of_what_needs_them():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Shape", ["conv"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Add", ["relu", "zeros"], ["y"]),
    ]
    model = built(nodes, [])
    read_sizes_behind(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in nodes]


class ComesBack(nn.Module):
    """Half the size, and back to the size that a convolution's activation has."""

    def __init__(self):
        super().__init__()
        self.fine, self.small = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x):
        fine = F.relu(self.fine(x))
        low = self.up(self.small(F.max_pool2d(fine, 2))) + fine
        return F.interpolate(low, size=fine.shape[2:]) * 2


@torch.no_grad()
def test_a_convolution_whose_size_is_asked_for_is_integer_with_its_activation(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(8, 3, 8, 8)
    task = Task(example=data[:2], calibration=[data], dynamic={"x": {0: "batch", 2: "height", 3: "width"}})
    network = capture_network(ComesBack().eval(), *task.call(), task.dynamic)
    capabilities = runtimes.get("onnxruntime").capabilities(machine(1).instruction_sets)
    draft = Static()(Draft(network), Context(task=task, capabilities=capabilities))
    manifest = building.build(draft, "onnxruntime", "int8", task, flatten_outputs(network(data))[1], tmp_path)
    rows = building.executed_rows(draft.network, draft.plan, task.call(), manifest, tmp_path)[0]
    assert [row.name for row in rows if row.reason and row.name in ("fine", "small")] == []
