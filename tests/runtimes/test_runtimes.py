"""What every runtime has to do alike: the same answers as torch, integers where the plan says, a clear refusal."""

import copy
import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from penjing import runtimes
from penjing.errors import ArtifactError, MissingDependency, TaskError
from penjing.measure import size_bytes
from penjing.network.graph import kind, sites
from penjing.pipeline import building
from penjing.records.manifest import MANIFEST, read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.surgery import insert
from penjing.tasks.task import as_call
from tests.raises import raises_case
from tests.tiny_networks import CASES, Case, export

both = pytest.mark.parametrize("runtime", runtimes.DEPLOYED)
every_case = pytest.mark.parametrize("case", CASES)


@both
@every_case
def test_fp32_answers_as_torch_at_another_batch(exported, runtime, case):
    artifact = exported(case, runtime, "fp32")
    session = isolated.open_artifact(artifact.folder, 1)
    for samples in (1, 5):
        outputs = session.run(artifact.arrays(samples, seed=7))
        for mine, theirs in zip(outputs, artifact.answers(samples, seed=7), strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@both
def test_fp16_is_half_the_size_and_answers_as_weights_in_half_precision_do(tmp_path, runtime):
    case = Case(Wide, ((8,),), {}, ("output",))
    for name in ("fp32", "fp16"):
        (tmp_path / name).mkdir()
    fp32, fp16 = (export(case, runtime, name, tmp_path / name) for name in ("fp32", "fp16"))
    sizes = [size_bytes(artifact.folder, artifact.manifest.files()) for artifact in (fp32, fp16)]
    assert sizes[1] < 0.6 * sizes[0]
    network = copy.deepcopy(fp16.network).half().float()
    (mine,) = isolated.open_artifact(fp16.folder, 1).run(fp16.arrays(5, seed=7))
    (plain,), (rounded,) = fp16.answers(5, seed=7), fp16.answers(5, seed=7, network=network)
    np.testing.assert_allclose(mine, rounded, rtol=0, atol=1e-3 * np.abs(plain - rounded).max() + 1e-6)
    assert np.abs(plain - rounded).max() > 1e-5


class Wide(nn.Module):
    """Enough weights that a file is hardly anything else, and one that half precision can't hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4, bias=False)
        )
        self.register_buffer("mask", torch.full((1, 256), -1e30))

    def forward(self, x):
        return self.body[2:](torch.maximum(self.body[:2](x), self.mask))


@both
@every_case
def test_fp16_computes_in_float32(exported, runtime, case):
    artifact = exported(case, runtime, "fp16")
    outputs = isolated.open_artifact(artifact.folder, 1).run(artifact.arrays(5, seed=7))
    for mine, theirs in zip(outputs, artifact.answers(5, seed=7), strict=True):
        assert np.abs(mine - theirs).max() <= 5e-3 * max(1, np.ptp(theirs))
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    assert {operator.precision for operator in operators} == {"fp32"}


@both
@every_case
def test_int8_answers_as_the_planned_network_at_another_batch(exported, runtime, case):
    artifact = exported(case, runtime, "int8")
    outputs = isolated.open_artifact(artifact.folder, 1).run(artifact.arrays(5, seed=7))
    for mine, planned, source in zip(
        outputs, artifact.answers(5, seed=7), artifact.answers(5, seed=7, network=artifact.network), strict=True
    ):
        step = np.ptp(planned) / 255
        assert np.abs(mine - planned).max() <= 3 * step  # a rounding may fall to the other side, here and behind it
        assert np.abs(mine - planned).mean() <= 0.1 * step
        assert np.abs(mine - source).mean() <= 0.1 * np.ptp(source)  # and it is still the network
        assert np.abs(mine - source).max() > 0  # which integers can't meet to the bit


@both
@every_case
def test_every_planned_operator_is_integer_in_the_runtimes_own_graph(exported, runtime, case):
    artifact = exported(case, runtime, "int8")
    assert artifact.draft.plan.floats == {}
    precisions = {}
    for operator in runtimes.executed(artifact.folder, artifact.manifest):
        for site in operator.sites:
            precisions.setdefault(site, set()).add(operator.precision)
    network = artifact.draft.network
    counted = {}
    for site, node in sites(network).items():
        what = kind(network, node)
        if what in artifact.case.integer:
            assert "int8" in precisions.get(site, ()), f"{site} is {precisions.get(site)}"
            counted[what] = counted.get(what, 0) + 1
    assert counted == artifact.case.integer


@both
def test_a_layer_that_the_plan_leaves_out_stays_float_between_quantized_neighbours(exported, tmp_path, runtime):
    artifact = exported("residual", runtime, "int8")
    plan = artifact.draft.plan
    remaining = {edge: entry for edge, entry in plan.entries.items() if edge != "body:weight"}
    draft = replace(artifact.draft, plan=replace(plan, entries=remaining))
    manifest = building.build(draft, runtime, "int8", artifact.task, artifact.structure, tmp_path)
    precisions = {site: op.precision for op in runtimes.executed(tmp_path, manifest) for site in op.sites}
    assert (precisions["stem"], precisions["body"], precisions["head"]) == ("int8", "fp32", "int8")
    reference = insert(draft.network, draft.plan)
    arrays = artifact.arrays(5, seed=7)
    (mine,) = isolated.open_artifact(tmp_path, 1).run(arrays)
    (planned,) = artifact.answers(5, seed=7, network=reference)
    assert np.abs(mine - planned).max() <= 2 * np.ptp(planned) / 255
    np.savez(tmp_path / "in.npz", arg_0=arrays[0])
    done = subprocess.run(
        [sys.executable, "-B", "-c", ALIKE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), mine, rtol=0, atol=1e-6)


ALIKE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from load import predict
np.save("out.npy", predict(np.load("in.npz")["arg_0"]))
"""


@both
def test_nothing_is_integer_in_an_fp32_artifact(exported, runtime):
    artifact = exported("residual", runtime, "fp32")
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    assert {operator.precision for operator in operators} == {"fp32"}
    assert {"stem", "body", "head", "/add#0"} <= {site for operator in operators for site in operator.sites}


@both
def test_predict_is_called_as_the_network_is_and_answers_in_its_structure(exported, runtime):
    artifact = exported("branches", runtime, "fp32")
    predict = predictor(isolated.open_artifact(artifact.folder, 1), artifact.manifest)
    scores, rest = predict(artifact.arrays(3, seed=1)[0])
    assert scores.shape == (3, 4, 6, 6)
    assert rest["mean"].shape == (3, 4)
    artifact = exported("tokens", runtime, "fp32")
    predict = predictor(isolated.open_artifact(artifact.folder, 1), artifact.manifest)
    _, named = as_call(artifact.case.inputs(3, seed=1))
    answer = predict(context=named["context"].numpy(), tokens=named["tokens"].double().numpy())  # types are cast
    assert list(answer) == ["logits", "hidden"]
    np.testing.assert_allclose(answer["logits"], artifact.answers(3, seed=1)[0], rtol=0, atol=1e-4)
    with raises_case(TaskError, "inputs") as caught:
        predict(tokens=named["tokens"].numpy())
    assert caught.value.got == "0 positional and ['tokens']"


class CachedTeacher(nn.Module):
    """Numbers and None among the outputs, an integer, and one output twice."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 4)

    def forward(self, x):
        y = self.line(x)
        return {"scores": [y, {"again": y, "best": y.argmax(-1)}], "classes": 4, "loss": None, "version": "1.0"}


@both
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_numbers_among_the_outputs_stand_in_the_structure(tmp_path, runtime, precision):
    artifact = export(
        Case(CachedTeacher, ((8,),), {}, ("scores_0", "scores_1_again", "scores_1_best")), runtime, precision, tmp_path
    )
    answer = predictor(isolated.open_artifact(artifact.folder, 1), artifact.manifest)(artifact.arrays(3, seed=1)[0])
    scores, rest = answer.pop("scores")
    assert answer == {"classes": 4, "version": "1.0"}
    for mine, theirs in zip((scores, rest["again"], rest["best"]), artifact.answers(3, seed=1), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@both
def test_answers_stay_when_the_session_is_asked_again(exported, runtime):
    artifact = exported("residual", runtime, "int8")
    session = isolated.open_artifact(artifact.folder, 1)
    first = session.run(artifact.arrays(4, seed=1))[0]
    snapshot = first.copy()
    other = session.run(artifact.arrays(4, seed=2))[0]
    assert np.array_equal(first, snapshot)
    assert not np.array_equal(first, other)
    assert np.array_equal(session.run(artifact.arrays(4, seed=1))[0], snapshot)


@both
def test_damaged_files_are_an_error_with_a_remedy(exported, tmp_path, runtime):
    artifact = exported("residual", runtime, "fp32")
    for path in artifact.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = tmp_path / artifact.manifest.files()[0]
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 3])
    with raises_case(ArtifactError, "unopenable") as caught:
        runtimes.open_artifact(tmp_path, 1)
    assert "penjing verify" in caught.value.remedy
    with raises_case(ArtifactError, "unopenable"):
        runtimes.executed(tmp_path, artifact.manifest)


def test_an_empty_folder_is_no_artifact(tmp_path):
    with raises_case(ArtifactError, "no-artifact") as caught:
        runtimes.open_artifact(tmp_path, 1)
    assert "artifact folder" in caught.value.remedy


def tampered(artifact, folder, change):
    for path in artifact.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("name", ["../secret.onnx", "/etc/passwd", "..", ".", "", "a/../../secret.onnx", "a//b.onnx"])
def test_a_manifest_can_name_only_files_of_its_folder(exported, tmp_path, name):
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "secret.onnx").write_bytes(b"secret")
    tampered(exported("residual", "onnxruntime", "fp32"), folder, lambda data: data["programs"][0].update(files=[name]))
    with raises_case(ArtifactError, "outside") as caught:
        read_manifest(folder)
    assert caught.value.got == name


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(programs=[]),
        lambda data: data["programs"][0].update(files=[]),
        lambda data: data["programs"][0].pop("inputs"),
        lambda data: data.update(programs="model.onnx"),
        lambda data: data.update(runtime=3),
    ],
)
def test_a_damaged_manifest_is_refused(exported, tmp_path, change):
    tampered(exported("residual", "onnxruntime", "fp32"), tmp_path, change)
    with raises_case(ArtifactError, "damaged"):
        read_manifest(tmp_path)


def test_a_missing_file_is_named(exported, tmp_path):
    artifact = exported("residual", "openvino", "fp32")
    tampered(artifact, tmp_path, lambda data: None)
    (tmp_path / "model.bin").unlink()
    with raises_case(ArtifactError, "missing") as caught:
        runtimes.open_artifact(tmp_path, 1)
    assert caught.value.got.endswith("model.bin")


@both
def test_a_runtime_that_is_not_installed_says_how_to_install_it(monkeypatch, runtime):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == runtime else real(name, *more))
    assert not runtimes.installed(runtime)
    with raises_case(MissingDependency, "not-installed") as caught:
        runtimes.get(runtime)
    assert caught.value.got == f"no package {runtime}"
    assert f"pip install 'penjing[{runtime}]'" in caught.value.remedy


def test_the_source_is_stored_in_the_same_bytes_by_every_process(tmp_path):
    def store(folder):
        """In this process, and in another one that has this text alone."""
        import torch
        from torch import nn

        from penjing.network.capture import capture_network
        from penjing.runtimes import eager

        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        network = capture_network(net, (torch.zeros(1, 3, 8, 8),))
        folder.mkdir()
        eager.export(network, ((torch.zeros(2, 3, 8, 8),), {}), None, "fp32", {"kind": "tensor"}, folder)

    text = textwrap.dedent(inspect.getsource(store))
    text += f"import pathlib\nstore(pathlib.Path({str(tmp_path / 'two')!r}))\n"
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
    store(tmp_path / "one")
    assert (tmp_path / "one" / "model.pt2").read_bytes() == (tmp_path / "two" / "model.pt2").read_bytes()
