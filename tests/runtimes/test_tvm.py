"""TVM: compiled for one sample and this processor, with tuned schedules that are kept, and no foreign machine code."""

import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.errors import ArtifactError, ExportError, UsageError
from penjing.network.capture import capture_network
from penjing.pipeline.refusals import refused
from penjing.records.manifest import read_manifest, write_manifest
from penjing.runtimes import isolated, trusted
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case

pytest.importorskip("tvm")


class Several(nn.Module):
    """Convolutions of three kinds, batch norm, a residual addition, pooling, attention and layer norm, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.query, self.layer_norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.point(F.hardswish(self.depthwise(x))) + x
        tokens = F.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        scores = (self.query(tokens) @ tokens.transpose(1, 2) / 8**0.5).softmax(-1)
        tokens = self.layer_norm(F.gelu(scores @ tokens))
        return {"classes": self.head(tokens.mean(1)), "picture": torch.sigmoid(x)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The network, its artifact, and the folder of what was compiled and tuned."""
    torch.manual_seed(0)
    network = Several().eval()
    folder, cache = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENJING_CACHE", str(cache))
        patch.setenv("PENJING_TVM_SECONDS", "2")
        _end_worker()
        _export(network, (torch.randn(2, 3, 16, 16),), folder)
        yield network, folder, cache
    _end_worker()


def _end_worker():
    """The process of the runtime has the environment that it was started in."""
    if "tvm" in isolated._workers:
        isolated._workers["tvm"].close()


def _export(network, args, folder):
    captured = capture_network(network, args)
    structure = flatten_outputs(network(*args))[1]
    manifest = runtimes.get("tvm").export(captured, (args, {}), None, "fp32", structure, folder)
    write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize("batch", [1, 3])
def test_it_answers_as_the_network(built, batch):
    network, folder, _ = built
    x = torch.randn(batch, 3, 16, 16)
    outputs = isolated.open_artifact(folder, 1).run([x.numpy()])
    with torch.no_grad():
        expected = network(x)
    for output, wanted in zip(outputs, expected.values(), strict=True):
        np.testing.assert_allclose(output, wanted.numpy(), atol=1e-5)


def test_schedules_are_kept_and_the_time_is_kept_to(built, tmp_path):
    network, folder, cache = built
    sampled = {path: json.loads(path.read_text())["sampled"] for path in (cache / "tvm").iterdir()}
    assert sum(sampled.values()) > 0
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENJING_TVM_SECONDS", "0")
        _export(network, (torch.randn(2, 3, 16, 16),), tmp_path)
    assert time.monotonic() - start < 120
    assert {path: json.loads(path.read_text())["sampled"] for path in sampled} == sampled
    assert read_manifest(tmp_path) == read_manifest(folder)


class Refused(nn.Module):
    """Convolutions that TVM could tune around a function that its front end does not have."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.after(torch.special.erfinv(torch.tanh(self.before(x)) * 0.5))


def test_what_it_refuses_is_found_without_tuning_what_it_takes(tmp_path, monkeypatch):
    """Each half of the network that runs would be tuned for as long as an artifact is."""
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path))
    isolated.close()
    x = torch.randn(2, 3, 12, 12)
    (refusal,) = refused(capture_network(Refused().eval(), (x,)), Task(example=x), "tvm")
    isolated.close()
    assert refusal.kind == "special_erfinv" and not refusal.shapes
    assert not (tmp_path / "tvm").exists()


def test_an_operator_that_can_not_be_built_stops_the_tuning(monkeypatch):
    from penjing.runtimes import tvm_tuning

    (one, target), (other, _) = _operator(nn.Softmax(-1)), _operator(nn.Hardtanh(0, 0.5))
    other.seconds = float("inf")
    monkeypatch.setattr(tvm_tuning, "_operators", lambda *_: [one, other])
    sampled = []
    monkeypatch.setattr(tvm_tuning, "_samples", lambda _, operator, __: sampled.append(operator.key))
    before = one.module.script()
    tvm_tuning._tune(one.module, target, 60.0)
    assert sampled == [] and one.module.script() == before


def test_machine_code_of_others_is_not_opened(built, tmp_path, monkeypatch):
    _, folder, _ = built
    library = tmp_path / "model.so"
    library.write_bytes((folder / "model.so").read_bytes() + b"\0")
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with raises_case(ArtifactError, "foreign-code") as refusal:
        runtimes.open_artifact(tmp_path, 1)
    assert trusted.VARIABLE in refusal.value.remedy
    monkeypatch.setenv(trusted.VARIABLE, refusal.value.remedy.rpartition("=")[2])
    trusted.check(library)


def test_an_artifact_for_another_processor_is_refused(built, tmp_path):
    _, folder, _ = built
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data["settings"]["processor"] = "cortex-a72"
    (tmp_path / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "model.so").write_bytes((folder / "model.so").read_bytes())
    with raises_case(ArtifactError, "processor"):
        runtimes.open_artifact(tmp_path, 1)


def _operator(layer):
    import tvm

    from penjing.runtimes import tvm as runtime
    from penjing.runtimes import tvm_tuning

    call = (torch.randn(2, 3, 4),)
    program = torch.export.export(layer, call)
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    with target:
        module = tvm_tuning._lowered(runtime._relax(program, capture_network(layer, call)))
        (operator,) = tvm_tuning._operators(tvm_tuning._import(), module, target)
    return operator, target


def test_a_schedule_that_computes_something_else_is_not_taken(built):
    from penjing.runtimes import tvm_tuning

    (halved, target), (other, _) = _operator(nn.Hardtanh(0, 0.5)), _operator(nn.Hardtanh(0, 0.6))
    assert tvm_tuning._equal(halved, halved.module, target)
    assert not tvm_tuning._equal(halved, other.module, target)


def test_a_stored_schedule_that_is_damaged_or_of_another_operator_is_not_taken(built, monkeypatch):
    from penjing.runtimes import tvm_tuning

    monkeypatch.setenv("PENJING_CACHE", str(built[2]))
    own, (other, _) = _operator(nn.Hardtanh(0, 0.5))[0], _operator(nn.Softmax(-1))
    path = tvm_tuning._file(own.key)
    for stored in ("{", "[]", {"sampled": 1, "module": "{}"}, {"sampled": 1, "module": tvm_tuning._text(other.module)}):
        path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
        again, _ = _operator(nn.Hardtanh(0, 0.5))
        assert again.best is again.module
    path.write_text(json.dumps({"sampled": 2**40, "module": tvm_tuning._text(own.module)}))
    assert _operator(nn.Hardtanh(0, 0.5))[0].sampled == tvm_tuning.SAMPLES
    path.unlink()


class FromTheBack(nn.Module):
    """The last step, what stands at stored indices of both signs, and the last state of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return x[:, -1] + 1, x[:, [-1, 0, -2]] + 1, self.recurrent(x)[0][:, -1]


def test_indices_may_count_from_the_back(built, tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_TVM_SECONDS", "0")
    torch.manual_seed(0)
    network, x = FromTheBack().eval(), torch.randn(2, 5, 4)
    _export(network, (x,), tmp_path)
    answers = runtimes.open_artifact(tmp_path, 1).run([x.numpy()])
    for answer, expected in zip(answers, network(x), strict=True):
        np.testing.assert_allclose(answer, expected.detach().numpy(), atol=1e-6)


class Sorts(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


def test_an_operator_that_tvm_lacks_is_named(built, tmp_path):
    with raises_case(ExportError, "unreadable") as refusal:
        _export(Sorts(), (torch.randn(2, 4, 4),), tmp_path)
    assert "svd" in refusal.value.got and not list(tmp_path.iterdir())
    assert "/linalg_svdvals#0" in refusal.value.what and "test_tvm.py" in refusal.value.what


class Grouped(nn.Module):
    def forward(self, x):
        return F.group_norm(x, 2)


def test_an_operator_at_which_its_front_end_fails_is_named(built, tmp_path):
    with raises_case(ExportError, "unreadable") as refusal:
        _export(Grouped(), (torch.randn(2, 4, 4),), tmp_path)
    assert "/group_norm#0" in refusal.value.what


class Places(nn.Module):
    def forward(self, x):
        return torch.argsort(x, -1)


def test_an_integer_output_has_the_type_of_the_manifest(built, tmp_path):
    manifest = _export(Places(), (torch.randn(2, 6),), tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    (answer,) = isolated.open_artifact(tmp_path, 1).run([x])
    assert answer.dtype == manifest.programs[0].outputs[0].dtype == "int64"
    assert np.array_equal(answer, x.argsort(-1))


def test_a_time_that_is_none_is_refused(monkeypatch):
    from penjing.runtimes import tvm

    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv(tvm.SECONDS_VARIABLE, text)
        with raises_case(UsageError, "seconds"):
            tvm.seconds()
    monkeypatch.setenv(tvm.SECONDS_VARIABLE, "2.5")
    assert tvm.seconds() == 2.5
