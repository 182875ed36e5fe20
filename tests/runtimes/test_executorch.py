"""ExecuTorch: a tiny network for every pattern, what is computed in integers, sizes that vary, refusals."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, runtimes
from penjing.errors import ArtifactError, ExportError
from penjing.network.graph import kind, sites
from penjing.pipeline import building
from penjing.pipeline.building import counted, executed_precisions
from penjing.runtimes import isolated
from penjing.runtimes.executorch import _divisible
from penjing.runtimes.loader import write_loader
from penjing.steps.plan import Plan
from penjing.surgery import insert
from tests.pairs import INTEGER_DB
from tests.raises import raises_case
from tests.tiny_networks import Case, conv, export

pytestmark = pytest.mark.skipif(not runtimes.installed("executorch"), reason="executorch is not installed")


class Convolutions(nn.Module):
    """Batch norm, depthwise, grouped and transposed convolutions, a residual addition, concatenation, poolings."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = conv(8, 8, groups=8)
        self.grouped = conv(8, 8, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu6(self.deep(x) + x)
        x = torch.cat([F.max_pool2d(self.up(F.relu(self.grouped(x))), 2), F.relu(x)], 1)
        return self.head(F.avg_pool2d(x, 2).mean((2, 3)))


class Line(nn.Module):
    """Convolutions over a sequence."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=1)
        self.second = nn.Conv1d(6, 6, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


class Attention(nn.Module):
    """Attention, layer norm, GELU, dropout: integers in the linear layers and additions alone."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.mix = nn.Linear(16, 48)
        self.join = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        x = x + self.drop(self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Recurrent(nn.Module):
    """An LSTM behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Linear(6, 8)
        self.cells = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cells(torch.tanh(self.shift(x)))[0][:, -1])


CASES = {
    "convolutions": Case(
        Convolutions, ((3, 8, 8),), {"conv": 3, "conv_transpose": 1, "add": 1, "cat": 1, "linear": 1}, ("output",)
    ),
    "line": Case(Line, ((4, 10),), {"conv": 2}, ("output",)),
    "attention": Case(Attention, ((5, 16),), {"linear": 4, "add": 2}, ("output",)),
    "recurrent": Case(Recurrent, ((4, 6),), {"linear": 2}, ("output",)),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """``artifacts(name, precision)``: an artifact of a case, made once."""
    made = {}

    def get(name, precision):
        if (name, precision) not in made:
            folder = tmp_path_factory.mktemp("artifact")
            made[name, precision] = export(CASES[name], "executorch", precision, folder)
        return made[name, precision]

    return get


def snr_db(artifact, session, batch):
    answers = session.run(artifact.arrays(batch, seed=3))
    return measure.parity([artifact.answers(batch, seed=3)], [answers], "planned").snr_db


@pytest.mark.parametrize("name", CASES)
def test_fp32_answers_as_torch_at_every_batch(artifacts, name):
    artifact = artifacts(name, "fp32")
    session = isolated.open_artifact(artifact.folder, 1)
    assert min(snr_db(artifact, session, batch) for batch in (1, 2, 5, 40)) > 100


@pytest.mark.parametrize("name", CASES)
def test_int8_answers_as_the_plan_and_runs_in_integers(artifacts, name):
    artifact = artifacts(name, "int8")
    session = isolated.open_artifact(artifact.folder, 1)
    assert min(snr_db(artifact, session, batch) for batch in (1, 2, 5, 40)) > INTEGER_DB
    network = artifact.draft.network
    kinds = {name: kind(network, node) for name, node in sites(network).items()}
    integer, _ = counted(kinds, executed_precisions(artifact.folder, artifact.manifest))
    assert integer.items() >= artifact.case.integer.items()


def test_layers_without_integers_around_them_compute_in_floating_point(artifacts, tmp_path):
    artifact = artifacts("line", "int8")
    plan = Plan({edge: e for edge, e in artifact.draft.plan.entries.items() if edge != "/output:in0"})
    draft = replace(artifact.draft, plan=plan)
    manifest = building.build(draft, "executorch", "int8", artifact.task, artifact.structure, tmp_path)
    precisions = executed_precisions(tmp_path, manifest)
    assert (precisions["first"], precisions["second"]) == ("int8", "fp32")
    (answer,) = isolated.open_artifact(tmp_path, 1).run(artifact.arrays(3, seed=3))
    expected = artifact.answers(3, seed=3, network=insert(draft.network, plan))
    assert measure.parity([expected], [[answer]], "planned").snr_db > INTEGER_DB


class Backwards(nn.Module):
    """An operator that no delegate computes, on values of a megabyte, and one that no runtime has a kernel for."""

    def forward(self, x):
        return torch.flip(x.repeat(1, 256), (1,)).cumsum(1)[:, -3:]


class Gamma(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return torch.lgamma(self.head(x))


def test_more_samples_than_memory_is_set_aside_for_are_passed_in_several_calls(tmp_path):
    artifact = export(Case(Backwards, ((1024,),), {}, ("output",)), "executorch", "fp32", tmp_path)
    assert artifact.manifest.settings == {"samples": "apart"}
    session = isolated.open_artifact(tmp_path, 1)
    inputs = artifact.arrays(60, seed=3)
    expected = artifact.answers(60, seed=3)[0]
    np.testing.assert_allclose(session.run(inputs)[0], expected, rtol=1e-3, atol=1e-2)
    write_loader(tmp_path / "load.py", artifact.manifest, ".", 1)
    np.savez(tmp_path / "inputs.npz", fits=inputs[0], other=inputs[0][:4, :-1])
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "(60, 3)", done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), expected, rtol=1e-3, atol=1e-2)
    assert "has the shape (4, 1023)" in done.stdout


LOADED = """
import numpy as np
from load import predict
with np.load("inputs.npz") as given:
    np.save("answer.npy", answer := predict(given["fits"]))
    print(answer.shape)
    try:
        predict(given["other"])
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(("couples", "divisible"), [(lambda x: x - x.mean(0), False), (torch.tanh, True)])
def test_samples_that_depend_on_each_other_stay_together(couples, divisible):
    assert _divisible(couples, ((torch.randn(1, 3),), {}), [{"0": "batch"}]) is divisible


def test_more_than_there_is_memory_set_aside_for_is_refused_where_samples_stay_together(artifacts):
    session = runtimes.open_artifact(artifacts("line", "fp32").folder, 1).session
    session.apart, most = False, session.largest[0]
    with raises_case(ArtifactError, "size") as refusal:
        session.run([np.zeros((most[0] + 1, *most[1:]), np.float32)])
    assert refusal.value.expected == f"at most {most}"


def test_sessions_with_other_numbers_of_threads_take_turns(artifacts):
    artifact = artifacts("line", "int8")
    inputs = artifact.arrays(3, seed=5)
    one, two = (isolated.open_artifact(artifact.folder, threads) for threads in (1, 2))
    answers = [session.run(inputs)[0].tobytes() for session in (one, two, one, two)]
    assert len(set(answers)) == 1


def test_the_same_network_gives_the_same_file(artifacts, tmp_path):
    artifact = artifacts("line", "int8")
    export(CASES["line"], "executorch", "int8", tmp_path)
    assert (tmp_path / "model.pte").read_bytes() == (artifact.folder / "model.pte").read_bytes()


@pytest.mark.parametrize("length", [0, 100, -40])
def test_a_truncated_file_is_an_error(artifacts, tmp_path, length):
    artifact = artifacts("line", "int8")
    shutil.copytree(artifact.folder, tmp_path, dirs_exist_ok=True)
    data = (tmp_path / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(data[:length])
    with raises_case(ArtifactError, "unopenable"):
        isolated.open_artifact(tmp_path, 1)
    with raises_case(ArtifactError, "unopenable"):
        isolated.executed(tmp_path, artifact.manifest)


def test_an_operator_without_a_kernel_is_named_with_its_layer(tmp_path):
    with raises_case(ExportError, "no-kernel") as refusal:
        export(Case(Gamma, ((4,),), {}, ("output",)), "executorch", "fp32", tmp_path)
    assert "aten::lgamma" in refusal.value.got and "/lgamma#0" in refusal.value.got
    assert "another runtime" in refusal.value.remedy


class ManyAxes(nn.Module):
    def forward(self, x):
        return torch.relu(x).permute(0, 2, 1, 4, 3, 6, 5) + 1


def test_more_axes_than_its_kernels_know_are_refused_with_the_layer(tmp_path):
    with raises_case(ExportError, "axes") as refusal:
        export(Case(ManyAxes, ((2, 1, 2, 1, 2, 3),), {}, ("output",)), "executorch", "fp32", tmp_path)
    assert "7 axes at /" in refusal.value.got and "reshape" in refusal.value.remedy
