"""Weights of a codebook are stored as indices, and the runtime computes with what it looked up."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from penjing import share
from penjing.network.capture import capture_network
from penjing.onnx_files.codebooks import look_up
from penjing.pipeline import building
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import looked_up
from penjing.tasks.task import Task
from tests import pairs

onnxruntime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Linear(16 * 36, 24)

    def forward(self, x):
        return self.head(
            self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3), keepdim=True).expand(-1, -1, 6, 6).flatten(1)
        )


TASK = Task(example=torch.randn(2, 1, 8, 8), calibration=[torch.randn(8, 1, 8, 8)])


@pytest.fixture(scope="module")
def draft():
    torch.manual_seed(0)
    network = Net()
    with torch.no_grad():
        for tensor in (network.norm.weight, network.norm.running_mean, network.norm.running_var):
            tensor.uniform_(0.3, 3)
        network.head.weight[:, ::3] = 0
    return Draft(capture_network(network.eval(), *TASK.call()))


def built(draft, folder, runtime="onnxruntime", precision="fp32"):
    building.build(draft, runtime, precision, TASK, {"kind": "tensor"}, folder)
    predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
    with torch.no_grad():
        return np.asarray(predict(TASK.example.numpy())), draft.network(TASK.example).numpy()


@pytest.mark.parametrize("scope", ["tensor", "channels", "global"])
def test_the_file_holds_a_byte_for_each_weight(draft, tmp_path, scope):
    shared = share.Codebook(bits=4, scope=scope, rows=8)(draft, Context(task=TASK))
    answers, reference = built(shared, tmp_path)
    np.testing.assert_allclose(answers, reference, atol=1e-5)
    stored = {t.name: t for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    for name in ("up.weight", "head.weight"):
        assert stored[f"{name}_indices"].data_type == onnx.TensorProto.UINT8 and name not in stored
    assert len(stored["head.weight_indices"].raw_data) in (24 * 576, 24 * 576 / 2)


@pytest.mark.parametrize(("entries", "together"), [(2, 8), (4, 4), (6, 3), (16, 2), (17, 1)])
def test_few_entries_share_a_byte(entries, together, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 96)
    task = Task(example=x[:2], calibration=[x])
    draft = Draft(capture_network(nn.Sequential(nn.Linear(96, 128)), *task.call()))
    shared = share.Codebook(entries=entries)(draft, Context(task=task))
    assert pairs.parity_db(shared, task, tmp_path) > 100
    stored = {t.name: t for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    assert len(stored["0.weight_indices"].raw_data) == 96 * 128 // together


def test_the_batch_norm_that_the_exporter_multiplies_in_stands_beside_the_codebook(draft, tmp_path):
    wide = draft.copy()
    wide.network.conv = nn.Conv2d(1, 32, 5, bias=False)
    shared = share.Codebook(bits=2)(wide, Context(task=TASK))
    answers, reference = built(shared, tmp_path)
    np.testing.assert_allclose(answers, reference, atol=1e-5)
    stored = {t.name: t for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    assert list(stored["conv.weight_scale"].dims) == [32, 1, 1, 1]
    assert list(stored["conv.weight_entries"].dims) == [16, 2]


def test_matrices_that_the_exporter_transposes_are_looked_up_too(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 32)  # of three axes: a product, not a Gemm
    task = Task(example=x[:2], calibration=[x])
    draft = Draft(capture_network(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), *task.call()))
    for step in (share.Codebook(bits=4), share.ProductCodebook(dimension=2, bits=4, levels=2)):
        shared = step(draft, Context(task=task))
        folder = tmp_path / type(step).__name__
        folder.mkdir()
        assert pairs.parity_db(shared, task, folder) > 100
        graph = onnx.load(str(folder / "model.onnx")).graph
        assert {t.data_type for t in graph.initializer if len(t.raw_data) >= 32 * 48 / 2} == {onnx.TensorProto.UINT8}


def test_a_table_that_the_output_layer_shares_is_looked_up_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x):
            return self.head(self.tokens(x))

    torch.manual_seed(0)
    x = torch.randint(0, 64, (8, 5))
    task = Task(example=x[:2], calibration=[x])
    shared = share.Codebook(bits=4)(Draft(capture_network(Tied(), *task.call())), Context(task=task))
    assert pairs.parity_db(shared, task, tmp_path) > 100
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert {t.data_type for t in graph.initializer if len(t.raw_data) >= 64 * 32 / 2} == {onnx.TensorProto.UINT8}


def test_the_runtime_looks_up_when_it_loads(draft, tmp_path):
    shared = share.Codebook(bits=4)(draft, Context(task=TASK))
    built(shared, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    run = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert not run & {"Gather", "Cast", "Mul"} and run & {"Conv", "FusedConv"}
    types = {operator.type for operator in isolated.executed(tmp_path, read_manifest(tmp_path))}
    assert not types & {"Gather", "Cast", "Mul"} and "Conv" in types


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino_reads_the_same_file(draft, tmp_path, precision):
    openvino = pytest.importorskip("openvino")
    shared = share.Codebook(bits=4)(draft, Context(task=TASK))
    _, reference = built(shared, tmp_path, precision=precision)
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()}
    assert not kinds & {"Gather", "Convert"}
    np.testing.assert_allclose(
        compiled([TASK.example.numpy()])[0], reference, atol=1e-5 if precision == "fp32" else 1e-2
    )


def test_what_became_other_values_is_stored_in_full(draft):
    shared = share.Codebook(bits=4)(draft, Context(task=TASK))
    tensors = looked_up(shared.network, shared.codebooks)
    values = np.random.default_rng(0).normal(size=tensors["head.weight"].shape).astype(np.float32)
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(values, "head.weight")])
    model = onnx.helper.make_model(graph)
    look_up(model, tensors)
    assert [t.name for t in model.graph.initializer] == ["head.weight"] and not model.graph.node
    np.testing.assert_array_equal(tensors["head.weight"].values, shared.network.head.weight.detach().numpy())
