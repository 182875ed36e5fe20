"""Integer files as QONNX: a plain evaluation of its Quant operators, qonnx's own, and hls4ml's emulation with g++."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from penjing import runtimes, targets
from penjing.errors import ArtifactError
from penjing.network.capture import capture_network
from penjing.onnx_files.qonnx import as_quant_nodes, convert
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.targets.narrowing import narrowed
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case

FPGA = targets.load("fpga")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A fully connected network for an FPGA, its file, inputs, and the answers of ONNX Runtime."""
    folder = tmp_path_factory.mktemp("fpga")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    task = Task(example=torch.randn(1, 16), calibration=list(torch.randn(64, 1, 16)), dynamic={})
    captured = capture_network(network, *task.call(), dynamic={})
    known = narrowed(FPGA, runtimes.get("onnxruntime").capabilities(FPGA.instruction_sets))
    draft = Static()(Draft(captured), Context(task=task, capabilities=known, source=captured))
    structure = flatten_outputs(network(task.example))[1]
    manifest = building.build(draft, "onnxruntime", "int8", task, structure, folder)
    x = np.random.default_rng(0).standard_normal((64, 1, 16)).astype(np.float32)
    session = runtimes.get("onnxruntime").open_session(folder, manifest, 1)
    return draft, folder / "model.onnx", x, np.concatenate([session.run([one])[0] for one in x])


def test_scales_are_powers_of_two_and_there_is_no_zero_point(artifact):
    entries = artifact[0].plan.entries.values()
    assert entries and all(len(entry.scale) == 1 and entry.zero_point == (0,) for entry in entries)
    assert all(entry.spec.signed and np.log2(entry.scale[0]).is_integer() for entry in entries)


def evaluated(model, x):
    """The answers by the operators' definitions; Gemm and Relu beside Quant."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values[model.graph.input[0].name] = x
    for node in model.graph.node:
        a = [values[name].astype(np.float64) for name in node.input]
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Quant":
            assert node.domain == "qonnx.custom_op.general" and given["rounding_mode"] == b"ROUND"
            value, scale, zero, bits = a
            low = -(2 ** (bits - 1)) + given["narrow"] if given["signed"] else 0
            high = 2 ** (bits - 1) - 1 if given["signed"] else 2**bits - 1 - given["narrow"]
            result = (np.clip(np.round(value / scale + zero), low, high) - zero) * scale
        elif node.op_type == "Gemm":
            result = a[0] @ (a[1].T if given.get("transB") else a[1]) + a[2]
        else:
            assert node.op_type == "Relu"
            result = np.maximum(a[0], 0)
        values[node.output[0]] = result.astype(np.float32)
    return values[model.graph.output[0].name]


def test_quant_operators_compute_what_the_file_computes(artifact, tmp_path):
    _, path, x, expected = artifact
    convert(path, tmp_path / "qonnx.onnx")
    model = onnx.load(tmp_path / "qonnx.onnx")
    assert [node.op_type for node in model.graph.node].count("Quant") == 4
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}
    assert np.array_equal(evaluated(model, x[:, 0]), expected)


def test_zero_points_and_a_scale_a_channel_are_kept(exported):
    artifact = exported("residual", "onnxruntime", "int8")
    before = onnx.load(artifact.folder / "model.onnx")
    after = onnx.load(artifact.folder / "model.onnx")
    as_quant_nodes(after)
    scales = [numpy_helper.to_array(t) for t in after.graph.initializer if t.name.endswith("_scale")]
    assert any(scale.ndim == 4 and scale.shape[1:] == (1, 1, 1) for scale in scales)
    pairs = sum(n.op_type == "DequantizeLinear" for n in before.graph.node)
    constants = sum(node.op_type == "Quant" for node in after.graph.node)
    assert pairs - 3 == constants  # two convolutions and a linear layer have biases
    assert any(numpy_helper.to_array(t).any() for t in after.graph.initializer if t.name.endswith("_zero"))


def test_what_is_no_such_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no file")
    with raises_case(ArtifactError, "qonnx"):
        convert(tmp_path / "model.onnx", tmp_path / "qonnx.onnx")
    assert not (tmp_path / "qonnx.onnx").exists()


def test_qonnx_executes_it_to_the_bit(artifact, tmp_path):
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    _, path, x, expected = artifact
    convert(path, tmp_path / "qonnx.onnx")
    model = cleanup_model(wrapper.ModelWrapper(str(tmp_path / "qonnx.onnx")))
    answers = [execute_onnx(model, {model.graph.input[0].name: one}) for one in x]
    assert np.array_equal(np.concatenate([next(iter(a.values())) for a in answers]), expected)


@pytest.mark.slow
def test_hls4ml_emulates_it_to_the_bit(artifact, tmp_path):
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    hls4ml = pytest.importorskip("hls4ml")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    _, path, x, expected = artifact
    convert(path, tmp_path / "qonnx.onnx")
    model = cleanup_model(wrapper.ModelWrapper(str(tmp_path / "qonnx.onnx"))).transform(GemmToMatMul())
    model = cleanup_model(model)
    settings = {"granularity": "name", "backend": "Vivado", "default_precision": "fixed<32,16>"}
    config = hls4ml.utils.config.config_from_onnx_model(model, **settings)
    options = {"io_type": "io_parallel", "backend": "Vivado", "hls_config": config}
    emulated = hls4ml.converters.convert_from_onnx_model(model, output_dir=str(tmp_path / "hls"), **options)
    emulated.compile()
    assert np.array_equal(emulated.predict(np.ascontiguousarray(x[:, 0])).reshape(expected.shape), expected)
