"""Re-running the evidence of a record: what holds, what does not, and that nothing named in a record is run."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import ArtifactError, RecordError
from penjing.measure import machine
from penjing.pipeline.run import Variant
from penjing.pipeline.verify import _speed_holds, batch_of, verify
from penjing.tasks.opening import open_task
from tests.raises import raises_case


def checked(folder, task=None, seconds=0.0):
    return {check.figure: check for check in verify(folder, task, threads=1, seconds=seconds)}


def test_a_run_holds_on_the_machine_that_made_it(digits_run, digits_task):
    checks = checked(digits_run.folder, open_task(digits_task), seconds=0.05)
    assert list(checks) == [
        "SHA-256 of the files",
        "size in bytes",
        "integer operators",
        "parity with planned",
        "parity with source",
        "limits of the parity",
        "latency",
        "speed-up over the source",
        "accuracy",
    ]
    # Times drift, and the speed-up of some milliseconds is judged on a quiet machine alone.
    assert all(c.holds for c in checks.values() if c.figure not in ("latency", "speed-up over the source"))
    assert checks["integer operators"].found == "1 add, 1 avg_pool, 2 conv, 1 linear"
    assert checks["accuracy"].found == f"{digits_run.record.artifact.metric:.6g}"


@pytest.mark.parametrize(
    ("recorded", "measured", "same", "then", "now", "holds"),
    [
        (4.0, 4.0, True, "", "", True),
        (4.0, 4.9, True, "", "", True),
        (4.0, 3.1, True, "", "", True),
        (4.0, 5.1, True, "", "", False),
        (4.0, 2.9, True, "", "", False),
        (4.0, 4.0, True, "spread", "", None),
        (4.0, 4.0, True, "", "spread", None),
        (4.0, 4.0, False, "", "", None),
    ],
)
def test_a_speedup_is_judged_where_two_timings_compare(recorded, measured, same, then, now, holds):
    judged, note = _speed_holds(recorded, measured, same, then, now)
    assert judged is holds and bool(note) == (holds is None)


def test_a_size_that_the_record_tells_in_two_ways_does_not_hold(digits_copy):
    rewrite(digits_copy, lambda record: record["artifact"].update(size_bytes=10))
    size = checked(digits_copy)["size in bytes"]
    assert size.holds is False and "10 and " in size.recorded


def test_flipped_bits_of_a_weight_are_found(digits_copy):
    chosen = json.loads((digits_copy / "record.json").read_text(encoding="utf-8"))["goal"]["chosen"]
    assert chosen == "onnxruntime-int8"
    import onnx

    path = digits_copy / "artifact" / "model.onnx"
    graph = onnx.load(path).graph
    weight = max((t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8), key=lambda t: len(t.raw_data))
    data = path.read_bytes()
    assert data.count(weight.raw_data) == 1
    path.write_bytes(data.replace(weight.raw_data, bytes(b ^ 0x40 for b in weight.raw_data)))
    checks = checked(digits_copy)
    assert checks["SHA-256 of the files"].holds is False
    assert "model.onnx" in checks["SHA-256 of the files"].found
    assert checks["size in bytes"].holds is True
    assert checks["parity with source"].holds is False


def test_files_that_no_longer_open_are_a_check_that_fails(digits_copy):
    path = digits_copy / "artifact" / "model.onnx"
    path.write_bytes(path.read_bytes()[:200])
    checks = checked(digits_copy)
    assert checks["SHA-256 of the files"].holds is False
    assert checks["size in bytes"].holds is False
    assert checks["opens in onnxruntime"].holds is False


def rewrite(folder, change):
    path = folder / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_figures_that_were_written_by_hand_do_not_hold(digits_copy, digits_task):
    def embellish(record):
        record["artifact"]["metric"] = 1.0
        chosen = next(c for c in record["candidates"] if c["name"] == record["goal"]["chosen"])
        chosen["measured"]["size_bytes"] = 1000
        chosen["integer_operators"] = {"conv": 3}
        chosen["parity"][1]["largest"] = 1e-7

    rewrite(digits_copy, embellish)
    checks = checked(digits_copy, open_task(digits_task))
    failed = {c.figure for c in checks.values() if c.holds is False}
    assert failed == {"size in bytes", "integer operators", "parity with source", "accuracy"}


def test_code_that_a_record_names_is_never_run(digits_copy):
    mark = digits_copy / "executed"
    evil = f"open({str(mark)!r}, 'w').close()\ndef factory(): pass\ntask = None\n"
    for place in (digits_copy, digits_copy / "artifact"):
        (place / "evil.py").write_text(evil, encoding="utf-8")
    (digits_copy / "load.py").write_text(evil, encoding="utf-8")
    (digits_copy / "artifact" / "load.py").write_text(evil, encoding="utf-8")

    def name_it(record):
        record.update(name=f"{digits_copy / 'evil.py'}:factory", task=f"{digits_copy / 'evil.py'}:task")
        record["recipe"] = [{"evil:factory": {"code": "__import__('evil')"}}]

    rewrite(digits_copy, name_it)
    checks = checked(digits_copy)
    assert not mark.exists()
    assert checks["parity with source"].holds is True


def test_a_hash_of_a_file_outside_the_folder_is_not_read(digits_copy):
    (digits_copy / "secret").write_bytes(b"x")

    def point_outside(record):
        chosen = next(c for c in record["candidates"] if c["name"] == record["goal"]["chosen"])
        chosen["sha256"]["../secret"] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"

    rewrite(digits_copy, point_outside)
    assert checked(digits_copy)["SHA-256 of the files"].holds is False


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "record.json").unlink(), RecordError),
        (lambda folder: (folder / "record.json").write_text("[]"), RecordError),
        (lambda folder: rewrite(folder, lambda record: record.pop("goal")), RecordError),
        (lambda folder: rewrite(folder, lambda record: record["goal"].update(chosen=None)), RecordError),
        (lambda folder: (folder / "evidence.npz").unlink(), RecordError),
        (lambda folder: (folder / "evidence.npz").write_bytes(b"no zip"), RecordError),
        (lambda folder: (folder / "artifact" / "manifest.json").unlink(), ArtifactError),
        (lambda folder: (folder / "artifact" / "model.onnx").unlink(), ArtifactError),
    ],
)
def test_what_is_missing_is_named(digits_copy, damage, error):
    damage(digits_copy)
    with pytest.raises(error) as caught:
        verify(digits_copy, threads=1, seconds=0)
    assert caught.value.what and caught.value.got


def test_evidence_with_pickles_is_refused(digits_copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    np.savez(digits_copy / "evidence.npz", input_000=np.array([Trap()], dtype=object))
    with raises_case(RecordError, "unreadable"):
        verify(digits_copy, threads=1, seconds=0)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_a_timed_call_has_as_many_samples_as_were_asked_for(digits_run, tmp_path, batch):
    from penjing.records.manifest import read_manifest

    ports = read_manifest(digits_run.artifact).programs[0].inputs
    for folder in (digits_run.folder, tmp_path):  # with evidence, and without
        (x,) = batch_of(folder, ports, batch)
        assert x.shape == (batch, 1, 8, 8) and x.dtype == np.float32


class Detector(nn.Module):
    """Boxes in pixels and scores below 1, as two outputs and side by side in a third."""

    def __init__(self):
        super().__init__()
        self.body, self.boxes, self.scores = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        h = torch.relu(self.body(x))
        boxes, scores = self.boxes(h).flatten(2) * 300 + 200, self.scores(h).flatten(2).sigmoid()
        return {"boxes": boxes, "scores": scores, "both": torch.cat([boxes, scores], 1).transpose(1, 2)}


class Tagger(nn.Module):
    """A recurrent layer, whose integers are counted as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(40, 24), nn.LSTM(24, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 5)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


vnni = pytest.mark.skipif(
    not any("vnni" in name or name == "amx_int8" for name in machine(1).instruction_sets),
    reason="OpenVINO is given integer LSTMs on processors with VNNI alone",
)


def images(samples, seed=0):
    return torch.randn(samples, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def words(samples, seed=0):
    return torch.randint(0, 40, (samples, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("network", "data", "step", "runtime"),
    [
        (Detector, images, pj.quantize.Static(), "onnxruntime"),
        (Tagger, words, pj.quantize.Dynamic(), "onnxruntime"),
        pytest.param(Tagger, words, pj.quantize.Static(), "openvino", marks=vnni),
        (Transformer, words, pj.quantize.Static(), "onnxruntime"),
    ],
)
def test_what_was_built_holds_at_every_limit(tmp_path, monkeypatch, network, data, step, runtime):
    # So small, the file with integers is not always the smallest; it is the one that is looked at.
    monkeypatch.setattr("penjing.pipeline.candidates._variants", lambda _: [Variant(runtime, "int8")])
    torch.manual_seed(0)
    task = pj.Task(example=data(2), calibration=[data(16, seed) for seed in range(3)])
    result = pj.compress(
        network().eval(), task, "minimize size_bytes", runtime=runtime, recipe=pj.Recipe(step),
        out=tmp_path / "run", seconds=0.01, threads=1,
    )  # fmt: skip
    chosen = result.record.chosen
    assert chosen.precision == "int8" and chosen.rejection is None
    if network is Tagger:
        assert chosen.integer_operators["lstm"] == 1
    checks = checked(result.folder)
    assert [c for c in checks.values() if c.holds is not True] == []
    assert checks["limits of the parity"].recorded == "at least 30 dB"
    assert float(checks["limits of the parity"].found.rpartition(": ")[2].removesuffix(" dB")) >= 20
