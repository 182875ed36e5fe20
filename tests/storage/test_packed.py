"""Packed files: equal to the bit when unpacked, smaller than what a general compressor writes, and safe to open."""

import json
import lzma
import shutil
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

pytest.importorskip("numba")

from penjing import cli
from penjing.errors import ArtifactError, CheckpointError, OutputError
from penjing.records.folder import ARTIFACT
from penjing.records.manifest import read_manifest
from penjing.report.numbers import figure
from penjing.storage import checkpoint, packed
from tests.packed_samples import RANDOM, every_type, laplace
from tests.raises import raises_case


def onnx_file(path):
    """Initializers of 4 and 8 bits, of which one has an odd number of values."""
    raw = [
        helper.make_tensor("w4", TensorProto.INT4, (33, 21), RANDOM.integers(-8, 8, (33, 21)).tolist()),
        helper.make_tensor("w8", TensorProto.INT8, (64, 32), laplace((64, 32), 15).astype(np.int8).tobytes(), raw=True),
    ]
    half = (RANDOM.integers(0, 256, 347, dtype=np.uint8)).tobytes()
    raw.append(TensorProto(name="odd", data_type=TensorProto.UINT4, dims=(3, 231), raw_data=half))
    graph = helper.make_graph([], "net", [], [], raw)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def assert_state_equal(network, other):
    assert list(network.state_dict()) == list(other.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def assert_returns(source, folder):
    """Packed and unpacked, every file is what it was; what the packed file holds."""
    done = packed.pack(source, folder / "net.pj")
    files = packed.unpack(folder / "net.pj", folder / "again")
    root = source if source.is_dir() else source.parent
    assert {f.relative_to(folder / "again") for f in files} == {(root / name).relative_to(root) for name in done.files}
    for file in files:
        assert file.read_bytes() == (root / file.relative_to(folder / "again")).read_bytes()
    return done


def test_tensors_of_every_type_return(tmp_path):
    (tmp_path / "net").mkdir()
    tensors = every_type(tmp_path / "net")
    done = assert_returns(tmp_path / "net", tmp_path)
    sizes = {name: after / before for name, _, before, after in done.tensors}
    assert set(sizes) == {*tensors} - {"none"}
    assert sizes["double"] < 0.5 and sizes["index"] < 0.1 and sizes["float8_e4m3"] < 0.85 and sizes["bool"] < 0.1
    assert sizes["pruned"] < 0.3 and sizes["codebook"] < 0.2 and sizes["bfloat16"] < 0.75 and sizes["float32"] < 0.9
    for name, dtype, _, _ in done.tensors:
        expected = tensors[name].float() if dtype == "bf16" or dtype.startswith("f8") else tensors[name]
        assert np.array_equal(
            packed.read(done.path, name), expected.numpy(), equal_nan=tensors[name].is_floating_point()
        )


def test_initializers_of_an_onnx_file_return(tmp_path):
    onnx_file(tmp_path / "model.onnx")
    done = assert_returns(tmp_path / "model.onnx", tmp_path)
    assert {"w8", "odd"} <= {name for name, _, _, _ in done.tensors}
    assert packed.read(done.path, "odd").shape == (3, 231)


def plain_tensor(name, values):
    """A tensor in `float_data`, not in `raw_data`."""
    return helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.reshape(-1).tolist())


def test_constants_subgraphs_and_functions_of_an_onnx_file_are_told(tmp_path):
    weights = {name: RANDOM.normal(size=(40, 30)).astype(np.float32) for name in ("field", "constant", "inside", "f")}
    branch = helper.make_graph([], "branch", [], [], [numpy_helper.from_array(weights["inside"], "inside")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weights["constant"], "constant")),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    body = [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weights["f"], "f"))]
    function = helper.make_function("other", "F", [], ["c"], body, [helper.make_opsetid("", 20)])
    graph = helper.make_graph(nodes, "net", [], [], [plain_tensor("field", weights["field"])])
    (tmp_path / "net.onnx").write_bytes(helper.make_model(graph, functions=[function]).SerializeToString())
    done = assert_returns(tmp_path / "net.onnx", tmp_path)
    assert sorted(name for name, _, _, _ in done.tensors) == ["constant", "f", "field", "inside", "inside"]
    for name, values in weights.items():
        assert np.array_equal(packed.read(done.path, name), values)


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_of_an_onnx_file_is_told_by_the_file_beside_it(tmp_path, one_file):
    weights = {f"w{i}": RANDOM.normal(size=(50, 40)).astype(np.float32) for i in range(3)}
    graph = helper.make_graph([], "net", [], [], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    (tmp_path / "net").mkdir()
    onnx.save(
        helper.make_model(graph), tmp_path / "net" / "model.onnx", save_as_external_data=True,
        all_tensors_to_one_file=one_file, location="model.onnx.data" if one_file else None, size_threshold=0,
    )  # fmt: skip
    (tmp_path / "net" / "other.onnx").write_bytes(RANDOM.bytes(99))
    done = assert_returns(tmp_path / "net", tmp_path)
    assert {name: kind for name, kind, _, _ in done.tensors} == dict.fromkeys(weights, "f32")
    assert np.array_equal(packed.read(done.path, "w1"), weights["w1"])


@pytest.mark.parametrize("name", ["f32.pth", "bf16.bin", "f16.pt2", "f64.pt", "i8.pt", "f32.npz"])
def test_weights_within_an_archive_are_told(tmp_path, name):
    kind = name.partition(".")[0]
    weights = [torch.randn(200, 80) * 0.05 for _ in range(2)]
    if kind == "i8":
        weights = [(weight * 400).round().to(torch.int8) for weight in weights]
    else:
        weights = [
            w.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}[kind])
            for w in weights
        ]
    if name.endswith("npz"):
        np.savez(tmp_path / name, *[weight.numpy() for weight in weights])
    else:
        torch.save(weights, tmp_path / name)
    done = assert_returns(tmp_path / name, tmp_path)
    assert [dtype for _, dtype, _, _ in done.tensors] == [kind, kind]
    assert done.size_bytes < len(lzma.compress((tmp_path / name).read_bytes(), preset=9))
    assert np.array_equal(packed.read(done.path, done.tensors[0][0])[:80], weights[0][0].float().numpy())


def test_tensors_that_are_equal_are_stored_once(tmp_path):
    weight = torch.randn(100, 90)
    save_file({"a": weight, "b": torch.randn(7, 5), "c": weight.clone()}, tmp_path / "net.safetensors")
    done = assert_returns(tmp_path / "net.safetensors", tmp_path)
    assert {name: after for name, _, _, after in done.tensors}["c"] == 4
    assert np.array_equal(packed.read(done.path, "c"), weight.numpy())


@pytest.mark.parametrize("kind", ["biases", "matrices", "kernels"])
def test_many_small_tensors_take_less_than_with_a_general_compressor(tmp_path, kind):
    shape = {"biases": (16,), "matrices": (9, 8), "kernels": (16, 1, 3, 3)}[kind]
    tensors = {f"layer.{i}.{kind}": torch.randn(shape) for i in range(100)}
    save_file(tensors, tmp_path / "net.safetensors")
    done = assert_returns(tmp_path / "net.safetensors", tmp_path)
    assert done.size_bytes < 0.97 * len(lzma.compress((tmp_path / "net.safetensors").read_bytes(), preset=9))
    name = f"layer.57.{kind}"
    assert np.array_equal(packed.read(done.path, name), tensors[name].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_infinite_value_does_not_cost_the_others(tmp_path, dtype):
    weight = torch.randn(100, 90).to(dtype)
    before = packed_share(tmp_path, weight)
    weight[3, 5] = float("inf")
    (tmp_path / "net.pj").unlink()
    shutil.rmtree(tmp_path / "again")
    assert packed_share(tmp_path, weight) < before + 0.005


def test_weights_that_were_rounded_in_every_row_take_no_more_than_with_a_general_compressor(tmp_path):
    weight = torch.randn(200, 500) * torch.exp(torch.randn(200, 1))
    step = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / step).round() * step
    assert packed_share(tmp_path, rounded) < len(lzma.compress(rounded.numpy().tobytes())) / (4 * weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "share"), [(8, 500, 0.95), (4, 500, 0.45), (4, 50, None), (4, 32, 0.58)])
def test_floats_that_were_rounded_take_what_their_integers_take(tmp_path, dtype, bits, group, share):
    """Quantized weights of a checkpoint are floats; every row, or every few values, have a step of their own."""
    torch.manual_seed(0)
    columns = 480 if group == 32 else 500
    blocks = (torch.randn(100, columns) * torch.exp(torch.randn(100, 1))).reshape(-1, group)
    top = 2 ** (bits - 1) - 1
    step = blocks.abs().amax(1, keepdim=True) / top
    weight = ((blocks / step).round() * step).to(dtype).reshape(100, columns)
    weight[3] = 0
    taken = packed_share(tmp_path, weight) * dtype.itemsize
    assert share is None or taken < share


def test_a_step_is_told_though_values_were_rounded_once_more(tmp_path):
    weight = torch.randn(100, 300)
    largest = weight.abs().amax(1, keepdim=True)
    rounded = (weight / largest * 127).round() * largest / 127  # not the same as multiples of `largest / 127`
    assert packed_share(tmp_path, rounded) < 0.3


def test_files_that_no_library_reads_return_as_bytes(tmp_path):
    (tmp_path / "net" / "deep").mkdir(parents=True)
    for name in ("bad.onnx", "bad.safetensors", "bad.bin", "deep/ü.onnx"):
        (tmp_path / "net" / name).write_bytes(RANDOM.bytes(999))
    (tmp_path / "net" / "bad.xml").write_text('<data element_type="i4" shape="3,x" offset="9" size="1"/>')
    (tmp_path / "net" / "empty.onnx").write_bytes(b"")
    assert not assert_returns(tmp_path / "net", tmp_path).tensors


def test_a_run_gives_its_artifact_and_the_command_says_what_it_takes(tmp_path, capsys, digits_run):
    out = tmp_path / "run.pj"
    assert cli.main(["pack", str(digits_run.folder), "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["size_bytes"] == out.stat().st_size < printed["unpacked_bytes"]
    assert cli.main(["unpack", str(out), "-o", str(tmp_path / "back")]) == 0
    for file in (digits_run.folder / ARTIFACT).iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_packed_checkpoint_is_loaded_equal_to_the_bit(tmp_path, digits_run, digits_source, digits_task):
    out = tmp_path / "checkpoint.pj"
    assert cli.main(["pack", str(digits_run.folder), "--checkpoint", "-o", str(out)]) == 0
    assert set(packed.contents(out).files) == set(checkpoint.FILES)
    whole = checkpoint.restore(digits_run.folder, digits_source, digits_task)
    again = checkpoint.restore(out, digits_source, digits_task)
    assert again.edits == whole.edits and again.plan == whole.plan
    assert_state_equal(again.network, whole.network)


def test_what_is_not_a_checkpoint_is_refused(tmp_path, capsys, digits_run, digits_source, digits_task):
    artifact = packed.pack(digits_run.folder, tmp_path / "artifact.pj").path
    with raises_case(CheckpointError, "incomplete") as refusal:
        checkpoint.restore(artifact, digits_source, digits_task)
    assert "--checkpoint" in refusal.value.remedy
    assert cli.main(["pack", str(digits_run.folder / ARTIFACT), "--checkpoint", "-o", str(tmp_path / "no.pj")]) == 1
    assert "edits.json" in capsys.readouterr().err
    assert not (tmp_path / "no.pj").exists()


def test_a_picture_shows_every_tensor_before_and_after(tmp_path, capsys):
    every_type(tmp_path)
    picture = tmp_path / "bytes.svg"
    source, out = tmp_path / "weights.safetensors", tmp_path / "net.pj"
    assert cli.main(["pack", str(source), "-o", str(out), "--picture", str(picture)]) == 0
    text = picture.read_text()
    ElementTree.fromstring(text)
    done = packed.contents(out)
    assert all(f">{name}<" in text for name, _, _, _ in done.tensors)
    (after,) = [after for name, _, _, after in done.tensors if name == "bfloat16"]
    assert f"bf16: 6.12 kB → 3.06 kB → {figure(after, 'bytes')}" in text
    deep = tmp_path / "deep" / "bytes.svg"
    assert cli.main(["pack", str(source), "-o", str(out), "--force", "--picture", str(deep)]) == 0 and deep.exists()
    assert cli.main(["pack", str(source), "-o", str(out), "--force", "--picture", str(tmp_path)]) == 1
    assert "folder" in capsys.readouterr().err


def test_the_packed_size_of_a_record_is_that_of_the_packed_files(tmp_path, digits_run):
    folder = digits_run.folder / ARTIFACT
    names = read_manifest(folder).files()
    (tmp_path / "program").mkdir()
    for name in names:
        shutil.copy(folder / name, tmp_path / "program" / name)
    size = packed.pack(tmp_path / "program", tmp_path / "program.pj").size_bytes
    assert digits_run.record.artifact.packed_bytes == packed.packed_bytes(folder, names) == size
    with raises_case(ArtifactError, "missing") as refusal:
        packed.packed_bytes(folder, ["gone.bin"])
    assert "gone.bin" in refusal.value.got


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_integer_artifact_is_smaller_than_a_general_compressor_makes_it(tmp_path, exported, runtime):
    artifact = exported("residual", runtime, "int8")
    done = assert_returns(artifact.folder, tmp_path)
    assert any(dtype in ("i8", "u8") for _, dtype, _, _ in done.tensors)


@pytest.mark.parametrize(("scale", "share"), [(12, 1), (2, 0.98), (0.3, 0.85)])  # about 8 and 4 bits, and sparse
def test_integers_take_less_than_with_a_general_compressor(tmp_path, scale, share):
    weights = {f"layer{i}": torch.tensor(laplace((128, 300), scale), dtype=torch.int8) for i in range(4)}
    save_file(weights, tmp_path / "net.safetensors")
    done = packed.pack(tmp_path / "net.safetensors", tmp_path / "net.pj")
    assert done.size_bytes < share * len(lzma.compress((tmp_path / "net.safetensors").read_bytes(), preset=9))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_few_integers_take_what_their_places_take(tmp_path, dtype):
    values = torch.tensor(
        [0, 31, 47, 60, 66, 80, 97, 127] if dtype == torch.uint8 else [-120, -99, -60, -31, 2, 29, 61, 127]
    )
    places = torch.randint(0, 8, (256, 300), generator=torch.Generator().manual_seed(0))
    assert packed_share(tmp_path, values.to(dtype)[places]) < 0.385  # 3 bits of 8 are 0.375


def packed_share(folder, tensor):
    """Bytes of the packed tensor by those of the tensor."""
    save_file({"a": tensor}, folder / "net.safetensors")
    ((_, _, before, after),) = assert_returns(folder / "net.safetensors", folder).tensors
    return after / before


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.34), (torch.float16, 0.43)])
def test_floats_that_were_of_a_shorter_type_take_no_more_than_in_it(tmp_path, dtype, share):
    assert packed_share(tmp_path, torch.randn(300, 400).to(dtype).float()) < share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_were_of_4_bits_take_what_a_general_compressor_takes(tmp_path, dtype):
    blocks = torch.randn(2000, 1) * torch.randint(-8, 8, (2000, 32)) + torch.randn(2000, 1)  # a step for every 32
    plain = lzma.compress(blocks.to(dtype).view(torch.uint8).numpy().tobytes())
    assert packed_share(tmp_path, blocks.to(dtype).reshape(500, -1)) < len(plain) / (64000 * dtype.itemsize)


def test_a_file_that_is_packed_is_not_replaced(tmp_path):
    save_file({"a": torch.zeros(9)}, tmp_path / "net.safetensors")
    before = (tmp_path / "net.safetensors").read_bytes()
    for source in (tmp_path, tmp_path / "net.safetensors"):
        with raises_case(OutputError, "source"):
            packed.pack(source, tmp_path / "net.safetensors", force=True)
    assert (tmp_path / "net.safetensors").read_bytes() == before


def test_links_to_files_are_followed_and_others_may_read_the_packed_file(tmp_path):
    """A snapshot in Hugging Face's cache is a folder of links."""
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.zeros(9)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "net.safetensors").symlink_to("../blob")
    (tmp_path / "snapshot" / "gone").symlink_to("nowhere")
    done = assert_returns(tmp_path / "snapshot", tmp_path)
    assert done.files == {"net.safetensors": (tmp_path / "blob").stat().st_size}
    (tmp_path / "plain").write_bytes(b"")
    assert done.path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_large_tensors_come_in_chunks_that_are_read_alone(tmp_path, monkeypatch):
    save_file({"a": torch.randn(300, 70), "b": torch.randn(10)}, tmp_path / "net.safetensors")
    monkeypatch.setattr("penjing.storage.chunks.VALUES", 1000)
    done = assert_returns(tmp_path / "net.safetensors", tmp_path)
    assert packed.read(done.path, "a").shape == (300, 70)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_file_is_the_same_whatever_the_threads(tmp_path, threads):
    (tmp_path / "net").mkdir()
    torch.manual_seed(0)
    every_type(tmp_path / "net")
    one, other = (packed.pack(tmp_path / "net", tmp_path / f"{n}.pj", threads=n).path for n in (threads, 3))
    assert one.read_bytes() == other.read_bytes()


def test_many_small_files_return(tmp_path, monkeypatch):
    """Where the contents have no more room for them, their bytes are chunks like those of large ones."""
    monkeypatch.setattr("penjing.storage.packed.ALL_ASIDE", 1000)
    (tmp_path / "net").mkdir()
    for i in range(9):
        (tmp_path / "net" / f"{i}.txt").write_bytes(RANDOM.bytes(300))
    assert_returns(tmp_path / "net", tmp_path)
    with packed.Opened(tmp_path / "net.pj") as opened:
        assert [c.coding for c in opened.chunks] == ["contents"] * 3 + ["raw"] * 6


def test_places_that_are_taken_are_left_as_they_are(tmp_path):
    save_file({"a": torch.randn(3)}, tmp_path / "net.safetensors")
    path = packed.pack(tmp_path / "net.safetensors", tmp_path / "net.pj").path
    before = path.read_bytes()
    with raises_case(OutputError, "exists"):
        packed.pack(tmp_path / "net.safetensors", path)
    assert path.read_bytes() == before
    with raises_case(OutputError, "foreign"):
        packed.unpack(path, tmp_path)
    with raises_case(ArtifactError, "missing"):
        packed.pack(tmp_path / "nothing", tmp_path / "other.pj")
    with raises_case(ArtifactError, "missing"):
        packed.read(path, "b")
    with raises_case(ArtifactError, "unreadable"):
        packed.contents(tmp_path / "nothing.pj")
