"""A file that breaks a rule of TensorRT's explicit quantization is refused, and the layer is named."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.errors import ExportError
from penjing.onnx_files import tensorrt_rules
from tests.raises import raises_case


def model(zero=0, kind=np.int8, scales=1, axis=0, weight_axis=0, bias=np.float32, opset=18, between="", whole=True):
    """A convolution behind a quantizer, with one thing that is as given."""
    stored = {
        "scale": np.full(scales, 0.5, np.float32) if scales > 1 else np.float32(0.5),
        "zero": np.full(scales, zero, kind) if scales > 1 else np.array(zero, kind),
        "w": np.ones((4, 4, 3, 3), np.int8),
        "w_scale": np.full(4, 0.1, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "bias": np.arange(4).astype(bias),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q", axis=1 if scales > 1 else axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["xq"], name="dq", axis=1 if scales > 1 else axis),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wq"], name="dqw", axis=weight_axis),
    ]
    weight, b = "wq", "bias"
    if between:
        nodes.append(helper.make_node(between, ["wq"], ["between"], name="between"))
        weight = "between"
    if bias == np.int32:
        stored |= {"b_scale": np.full(4, 0.05, np.float32)}
        nodes.append(helper.make_node("DequantizeLinear", ["bias", "b_scale"], ["bq"], name="dqb", axis=0))
        b = "bq"
    nodes.append(helper.make_node("Conv", ["xq" if whole else "x", weight, b], ["y"], name="body.conv"))
    ports = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, None, None])] for n in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "graph", *ports, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_a_file_that_obeys_has_nothing_broken():
    assert tensorrt_rules.broken(model()) == []
    tensorrt_rules.check(model())


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"zero": 3}, "the zero point 3"),
        ({"kind": np.uint8}, "integers of type uint8"),
        ({"kind": np.uint8, "zero": 128}, "integers of type uint8"),
        ({"scales": 4}, "an activation with 4 scales"),
        ({"weight_axis": 1}, "scales along axis 1 of the weight"),
        ({"bias": np.int32}, "a bias of int32"),
        ({"opset": 12}, "opset 12"),
        ({"between": "Relu"}, "Relu between a stored weight's dequantizer and the product"),
        ({"whole": False}, "a product whose input is not quantized"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_the_name_of_its_layer(change, got):
    with raises_case(ExportError, "tensorrt-rules") as caught:
        tensorrt_rules.check(model(**change))
    error = caught.value
    layers = {row.layer for row in tensorrt_rules.broken(model(**change))}
    assert error.got == got and error.expected and error.remedy
    assert "body.conv" in layers or change == {"between": "Relu"}


def test_an_operator_on_integers_is_not_the_form_that_it_reads():
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"], name="product")
    ports = [helper.make_tensor_value_info(n, TensorProto.INT8, [2, 2]) for n in ("a", "b")]
    out = [helper.make_tensor_value_info("y", TensorProto.INT32, [2, 2])]
    (row,) = tensorrt_rules.broken(helper.make_model(helper.make_graph([node], "graph", ports, out)))
    assert (row.layer, row.got) == ("product", "the operator MatMulInteger")


def test_a_bias_becomes_the_floats_that_it_stands_for():
    changed = model(bias=np.int32)
    tensorrt_rules.obey(changed)
    assert tensorrt_rules.broken(changed) == []
    values = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    np.testing.assert_array_equal(values["bq"], (np.arange(4) * np.float32(0.05)).astype(np.float32))
