"""The node tests that the package onnx brings: one operator each, its inputs and its outputs.

Shapes, axes and other inputs that an operator has to know beforehand are given as constants, as exporters write them;
`KNOWN_INPUTS` says which these are. Networks compute in float32, so float16, bfloat16 and float64 values are compared
as numbers.
"""

import functools
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from penjing.network.capture import capture_network
from penjing.onnx_files.build import build
from penjing.onnx_files.node import from_array
from penjing.onnx_files.operators import KNOWN_INPUTS
from penjing.onnx_files.read import prepared
from penjing.onnx_files.write import write

LAST_SET = 23
TYPES = {1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16}  # floating point from 16 bits, integers from 8 bits, booleans
REFUSED = {
    "Bernoulli": "random",
    "RandomNormalLike": "random",
    "RandomUniformLike": "random",
    "ImageDecoder": "its input is a file",
    "Loop": "control flow",
    "Scan": "control flow",
    "TfIdfVectorizer": "text",
    "StringNormalizer": "text",
    "OptionalGetElement": "optional values",
    "OptionalHasElement": "optional values",
    "SequenceMap": "sequences",
}  # fmt: skip
"""Operator → why it does not take part."""

_ROUNDING = "the reference rounds bfloat16 after every operator, and torch within"
_TIES = "of equal values others are taken, which the standard leaves open to the largest index alone"
FAILING = {
    "test_attention_3d_causal_bf16": _ROUNDING,
    "test_attention_3d_causal_bf16_expanded": _ROUNDING,
    "test_attention_4d_attn_mask_causal_bf16": _ROUNDING,
    "test_attention_4d_attn_mask_causal_bf16_expanded": _ROUNDING,
    "test_attention_4d_causal_bf16": _ROUNDING,
    "test_attention_4d_causal_bf16_expanded": _ROUNDING,
    "test_attention_4d_causal_padded_kv_bf16": _ROUNDING,
    "test_attention_4d_causal_padded_kv_bf16_expanded": "a padding of bfloat16 is computed",
    "test_attention_4d_padded_kv_bf16": _ROUNDING,
    "test_attention_4d_padded_kv_bf16_expanded": "a padding of bfloat16 is computed",
    "test_basic_deform_conv_with_padding": "a zero is 2e-7",
    "test_dft_inverse": "zeros are 5e-15, and 2e-7 in the reference",
    "test_dft_inverse_opset19": "zeros are 5e-15, and 2e-7 in the reference",
    "test_if": "its branch follows from the value of an input",
    "test_top_k_same_values": _TIES,
    "test_top_k_same_values_2d": _TIES,
    "test_top_k_same_values_largest": _TIES,
}
"""Test → why it fails, already as a module of torch."""


@functools.cache
def cases():
    """Every node test by its name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def left_out(case):
    """Why a test does not take part; None where it does."""
    graph = case.model.graph
    for value in [*graph.input, *graph.output]:
        if value.type.WhichOneof("value") != "tensor_type":
            return "sequences, optional values"
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "text"
        if value.type.tensor_type.elem_type not in TYPES:
            return "types of fewer than 8 bits, float8, complex numbers"
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            return f"operators of {node.domain}"
        if node.op_type in REFUSED:
            return f"{node.op_type}: {REFUSED[node.op_type]}"
        if not any(schema.since_version <= LAST_SET for schema in _schemas().get(node.op_type, ())):
            return f"operators after set {LAST_SET}"
    if "training" in case.name or "train_" in case.name:
        return "training"
    return None


@functools.cache
def _schemas():
    by_name = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            by_name.setdefault(schema.name, []).append(schema)
    return by_name


def taking_part():
    """Names of the tests that take part."""
    return [name for name, case in cases().items() if left_out(case) is None]


class Node:
    """One test: its network, its inputs and what it has to give."""

    def __init__(self, name):
        case = cases()[name]
        inputs, outputs = case.data_sets[0]
        self.case = case
        self.expected = [_array(value) for value in outputs]
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        names = [value.name for value in model.graph.input]
        values = dict(zip(names, map(_array, inputs), strict=False))
        plain = cases().get(name.split("_expanded")[0], case).model.graph
        fixed = {
            word
            for node in plain.node
            for position, word in enumerate(node.input)
            if word in values and position in KNOWN_INPUTS.get(node.op_type, ())
        }
        for word in sorted(fixed):
            model.graph.initializer.append(numpy_helper.from_array(values[word], word))
        left = [value for value in model.graph.input if value.name not in fixed]
        del model.graph.input[:]
        model.graph.input.extend(left)
        self.network = build(prepared(model)).eval()
        self.inputs = tuple(from_array(values[word]) for word in self.network.ports["inputs"].values())

    def as_module(self):
        """Compare what the module gives."""
        with torch.no_grad():
            self.compare(self.network(*self.inputs))

    def captured_and_exported(self):
        """Compare what the captured network gives, and ONNX Runtime of the file that is written of it."""
        import onnxruntime

        inputs = tuple(value.float() if value.is_floating_point() else value for value in self.inputs)
        network = capture_network(self.network, inputs, {}, {})
        with torch.no_grad():
            self.compare(network(*inputs))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            names = [f"output_{i}" for i in range(len(self.expected))]
            ports, _ = write(network, (inputs, {}), {}, names, path)
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            read = {port.name for port in session.get_inputs()}
            feed = {port.name: value.numpy() for port, value in zip(ports, inputs, strict=True) if port.name in read}
            self.compare([from_array(value) for value in session.run(None, feed)])

    def compare(self, outputs):
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        assert len(outputs) == len(self.expected)
        for output, right in zip(outputs, self.expected, strict=True):
            assert tuple(output.shape) == right.shape
            if right.dtype.kind not in "biu":  # floating point, NumPy's own or not
                half = right.dtype == np.float16
                rtol, atol = (max(self.case.rtol, 2e-2), 1e-3) if half else (self.case.rtol, self.case.atol)
                np.testing.assert_allclose(output.double().numpy(), right.astype(np.float64), rtol=rtol, atol=atol)
            else:
                np.testing.assert_array_equal(output.numpy(), right)


def _array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
