import onnxruntime as ort
import pytest

from penjing import runtimes
from penjing.runtimes import onnxruntime as runtime

VNNI = ("avx", "avx2", "avx512f", "avx512_vnni")


@pytest.mark.parametrize(
    ("instruction_sets", "bits"),
    [(VNNI, 8), (("avx", "avx2", "fma"), 7), (("avx2", "avx_vnni"), 8), (("neon", "asimddp"), 8), ((), 8)],
)
def test_weights_are_narrow_where_sums_of_16_bits_would_saturate(instruction_sets, bits):
    capabilities = runtime.capabilities(instruction_sets)
    assert capabilities.weight.bits == bits
    assert bool(capabilities.notes) == (bits == 7)
    assert not capabilities.activation.signed


def test_the_session_takes_its_threads(exported):
    artifact = exported("residual", "onnxruntime", "fp32")
    session = runtimes.open_artifact(artifact.folder, 2).session.session
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_half_precision_is_gone_once_the_file_is_loaded(exported, tmp_path):
    import onnx
    from onnx import TensorProto

    artifact = exported("residual", "onnxruntime", "fp16")
    stored = onnx.load(artifact.folder / "model.onnx").graph
    halves = [t for t in stored.initializer if t.data_type == TensorProto.FLOAT16]
    casts = [node for node in stored.node if node.op_type == "Cast"]
    assert len(halves) == len(casts) == 2  # the two convolutions; biases and the head are too small
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(artifact.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "optimized.onnx").graph
    assert "Cast" not in {node.op_type for node in loaded.node}
    assert TensorProto.FLOAT16 not in {t.data_type for t in loaded.initializer}


def test_counting_leaves_the_artifact_as_it_was(exported):
    artifact = exported("residual", "onnxruntime", "int8")
    before = {path.name: path.read_bytes() for path in artifact.folder.iterdir()}
    runtimes.executed(artifact.folder, artifact.manifest)
    assert {path.name: path.read_bytes() for path in artifact.folder.iterdir()} == before


def test_integer_operators_are_told_by_their_type_in_the_optimized_file(exported, tmp_path):
    artifact = exported("residual", "onnxruntime", "int8")
    types = {site: op.type for op in runtimes.executed(artifact.folder, artifact.manifest) for site in op.sites}
    assert types["stem"] == types["body"] == "QLinearConv"
    assert types["head"] == "QGemm"
    assert types["/add#0"] == "QLinearAdd"
    # the same file without optimizations holds float operators between its quantizers
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "plain.onnx")
    ort.InferenceSession(str(artifact.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    import onnx

    plain = {node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node}
    assert {"Conv", "Gemm", "Add"} <= plain


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("conv1", "conv1"),
        ("conv1_token_3", "conv1"),
        ("conv10_nhwc", "conv10"),
        ("layer/add#0/fused", "layer/add#0"),
        ("other", None),
        ("", None),
    ],
)
def test_fused_names_lead_back_to_their_site(name, origin):
    assert runtime._origin(name, {"conv1", "conv10", "layer/add#0", "layer", ""}) == origin
