"""The quick way: one file that the runtime opens alone, with the integers that `compress` would choose."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import cli
from penjing.errors import OutputError, ParityError, UsageError
from penjing.onnx_files import write as onnx_file
from tests.raises import raises_case


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Net().eval()


def batches():
    return [torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def quantized(out, **more):
    return pj.quantize_to(network(), batches(), out, threads=1, **more)


def in_onnxruntime(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def in_openvino(path, x):
    import openvino

    return openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]


@pytest.mark.parametrize(("name", "run"), [("small.onnx", in_onnxruntime), ("small.xml", in_openvino)])
def test_the_runtime_opens_the_file_alone_and_it_answers_as_the_network(tmp_path, name, run):
    done = quantized(tmp_path / name)
    assert {file.name for file in done.files} == {file.name for file in tmp_path.iterdir()}
    assert done.size_bytes == sum(file.stat().st_size for file in done.files)
    x = batches()[0]
    with torch.no_grad():
        expected = network()(x).numpy()
    noise = np.square(run(tmp_path / name, x.numpy()) - expected).sum()
    decibels = 10 * np.log10(np.square(expected).sum() / noise)
    planned, source = done.parity
    assert 25 < decibels and abs(decibels - source.snr_db) < 5 and planned.snr_db > 40
    assert done.integer_operators["conv"] == 2 and "conv" not in done.float_operators


def test_it_is_the_file_that_compress_makes(tmp_path):
    done = quantized(tmp_path / "small.onnx")
    task = pj.Task(
        example=batches()[0], calibration=batches(), evaluate=lambda predict: float(predict(batches()[0].numpy()).std())
    )
    pj.compress(network(), task, "minimize size_bytes", runtime="onnxruntime", out=tmp_path / "run", seconds=0)
    reference = tmp_path / "run" / "candidates" / "onnxruntime-int8" / "model.onnx"
    assert done.path.read_bytes() == reference.read_bytes()


def test_the_same_seed_gives_the_same_file_and_what_is_excluded_stays_in_floats(tmp_path):
    first, second, without = (
        quantized(tmp_path / f"{i}.onnx", fast=True, exclude=exclude) for i, exclude in enumerate([(), (), ("b",)])
    )
    assert first.path.read_bytes() == second.path.read_bytes() != without.path.read_bytes()
    assert without.float_operators["conv"] == 1


@pytest.mark.parametrize(
    ("name", "more", "kind", "code"),
    [
        ("small.weights", {}, UsageError, "suffix"),
        ("small.xml", {"runtime": "onnxruntime"}, UsageError, "suffix"),
        ("small.onnx", {"runtime": "onnx"}, UsageError, "unknown-runtime"),
        ("old.onnx", {}, OutputError, "exists"),
        ("old.xml", {}, OutputError, "exists"),  # its weights lie there
        ("folder.onnx", {"force": True}, OutputError, "folder"),
    ],
)
def test_where_it_cannot_write_it_says_so_before_anything_is_opened(tmp_path, name, more, kind, code):
    (tmp_path / "old.onnx").write_text("mine")
    (tmp_path / "old.bin").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    with raises_case(kind, code):
        pj.quantize_to("no-such-network", "no-such-data", tmp_path / name, **more)
    assert (tmp_path / "old.onnx").read_text() == (tmp_path / "old.bin").read_text() == "mine"


@pytest.fixture
def negated(monkeypatch):
    """The exporter writes the second convolution's output with the wrong sign."""
    exported = onnx_file._exported

    def wrong(*arguments):
        import onnx

        model = onnx.load_from_string(exported(*arguments))
        node = next(node for node in model.graph.node if node.name == "b")
        (result,) = node.output
        node.output[0], node.name = f"{result}_before", ""
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Neg", [f"{result}_before"], [result], name="b"))
        return model.SerializeToString(deterministic=True)

    monkeypatch.setattr(onnx_file, "_exported", wrong)
    monkeypatch.setattr(onnx_file.export_cache, "recall", lambda key: None)
    monkeypatch.setattr(onnx_file.export_cache, "store", lambda key, data: None)


def test_a_file_that_does_not_compute_what_was_planned_is_not_written(tmp_path, negated):
    (tmp_path / "small.onnx").write_text("the one before")
    with raises_case(ParityError, "parity") as caught:
        quantized(tmp_path / "small.onnx", force=True)
    assert caught.value.field == "b" and caught.value.exit_code == 3
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]
    assert (tmp_path / "small.onnx").read_text() == "the one before"


@pytest.fixture
def files(tmp_path):
    """An ONNX file with a fixed batch, and its inputs as an array."""
    x = np.concatenate([batch.numpy() for batch in batches()])
    np.save(tmp_path / "inputs.npy", x)
    onnx_program = torch.onnx.export(network(), (torch.from_numpy(x[:4]),), dynamo=True, verbose=False)
    onnx_program.save(str(tmp_path / "net.onnx"))
    return tmp_path


def test_from_an_onnx_file_on_the_command_line(files, capsys):
    command = ["quantize", str(files / "net.onnx"), "--calibration", str(files / "inputs.npy"), "--threads", "1"]
    command += ["--out", str(files / "made" / "small.onnx"), "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runtime"] == "onnxruntime" and told["parity"][1]["snr_db"] > 25
    x = np.load(files / "inputs.npy")[:4]
    assert np.abs(in_onnxruntime(told["path"], x) - in_onnxruntime(files / "net.onnx", x)).max() < 0.1
    assert cli.main(command) == 1  # it is there already
    assert json.loads(capsys.readouterr().out)["code"] == "exists"
    assert cli.main([*command[:-1], "--force", "--fast"]) == 0
    assert "parity with the source" in capsys.readouterr().out


class TwoScales(nn.Module):
    """Boxes of hundreds beside scores below 1, in one output."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 7, 1)

    def forward(self, x):
        y = self.head(self.trunk(x).relu()).flatten(2).transpose(1, 2)
        return torch.cat([y[..., :4].exp() * 300, y[..., 4:].sigmoid()], -1)


def test_what_is_printed_tells_inputs_the_worst_columns_and_what_stays_in_floats(tmp_path):
    torch.manual_seed(0)
    done = pj.quantize_to(
        TwoScales().eval(), batches(), tmp_path / "small.onnx", fast=True, threads=1, exclude=["trunk"]
    )
    text = str(done)
    assert "takes x float32 (batch, 3, 10, 10)" in text
    worst = min(done.parity[1].rows, key=lambda row: row.snr_db)
    assert len(done.parity[1].rows) > 1 and f"in {worst.place} {worst.snr_db:.1f} dB" in text
    assert set(done.floats) == {"trunk", "/cat#0"} | ({"head"} if "head" in done.floats else set())
    assert "trunk: excluded by 'trunk'" in text
