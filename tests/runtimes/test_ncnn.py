"""ncnn: it answers as torch and the plan do, in the plan's integers; what it has no layer for is named."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, runtimes
from penjing.errors import ArtifactError, ExportError
from penjing.network.capture import capture_network
from penjing.numerics import grid
from penjing.pipeline import building
from penjing.runtimes import isolated
from penjing.runtimes.ncnn_convert import _where
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.pairs import FLOAT_DB
from tests.raises import raises_case
from tests.tiny_networks import Case, export

ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

HALF_DB = 50
WIDTH = 65536  # of a layer of many products


def worst_db(artifact, batch):
    """Of all outputs, beside torch."""
    outputs = runtimes.open_artifact(artifact.folder, 1).run(artifact.arrays(batch, seed=3))
    answers = artifact.answers(batch, seed=3)
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in answers]
    pairs = zip(answers, outputs, strict=True)
    return min(measure.parity([[answer]], [[output]], "planned").snr_db for answer, output in pairs)


class Words(nn.Module):
    """Integers as inputs, attention."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 18)

    def forward(self, ids):
        x = self.norm(self.words(ids))
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x, x.transpose(0, 1)


class Layers(nn.Module):
    """Layers with integer kernels beside some without; one is called twice, one twice on the same."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.rows = nn.Linear(8, 6)

    def forward(self, x):
        x = self.depthwise(nn.functional.hardswish(self.grouped(torch.relu(self.wide(x)))))
        x = self.twice(torch.sigmoid(self.twice(x)))
        x = x.permute(0, 2, 3, 1)
        return self.rows(x), self.rows(x) * 2


class Sequence(nn.Module):
    """Convolutions over a sequence, recurrent layers, and their states, which have their samples in axis 1."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1, stride=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, dilation=2, padding="same")
        self.cells = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.gates = nn.GRU(10, 4)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.line(x)))).transpose(1, 2)
        x, (state, _) = self.cells(x)
        return self.gates(x.transpose(0, 1))[1], state


class Sums(nn.Module):
    """So many products that their sum in floating point is not exact, of factors on the grid of their integers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4, bias=False)
        self.layer.weight.data = _whole(4, seed=1) * 0.1

    def forward(self, x):
        return self.layer(x)


class SumsCase(Case):
    def inputs(self, samples, seed):
        return (_whole(samples, seed) * 0.3,)


def _whole(rows, seed):
    """Whole numbers whose largest is 127."""
    numbers = torch.randint(-126, 127, (rows, WIDTH), generator=torch.Generator().manual_seed(seed)).float()
    numbers[:, 0] = 127
    return numbers


class WordsCase(Case):
    def inputs(self, samples, seed):
        return (torch.randint(0, 20, (samples, 7), generator=torch.Generator().manual_seed(seed)),)


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x).sort(1)[0]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("case", ["branches", "tokens", "two inputs"])
def test_it_answers_as_torch_at_every_batch(exported, case, precision):
    artifact = exported(case, "ncnn", precision)
    assert min(worst_db(artifact, batch) for batch in (1, 3)) >= FLOAT_DB


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """An int8 artifact of `Layers`."""
    return export(Case(Layers, ((4, 6, 6),), {}, ()), "ncnn", "int8", tmp_path_factory.mktemp("layers"))


def test_sequences_are_convolved_in_integers_and_recurrent_layers_compute_beside_them(tmp_path):
    artifact = export(Case(Sequence, ((4, 16),), {}, ()), "ncnn", "int8", tmp_path)
    assert min(worst_db(artifact, batch) for batch in (1, 3)) >= FLOAT_DB
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    assert {site for op in operators if op.precision == "int8" for site in op.sites} == {"line", "depthwise"}
    assert [port.shape[1] for port in artifact.manifest.programs[0].outputs] == ["batch", "batch"]


def test_what_it_computes_in_integers_is_the_plan(layers):
    # Far beyond what integers and floating point have in common.
    assert min(worst_db(layers, batch) for batch in (1, 3)) >= 100
    source = layers.answers(2, seed=3, network=layers.network)
    assert measure.parity([source], [layers.answers(2, seed=3)], "planned").snr_db < 60


def test_it_tells_which_layers_are_computed_in_integers(layers):
    operators = runtimes.executed(layers.folder, layers.manifest)
    precisions = {site: op.precision for op in operators for site in op.sites}
    assert precisions == dict.fromkeys(("wide", "depthwise", "twice", "twice@1", "rows"), "int8") | {"grouped": "fp32"}


def test_the_integers_in_its_file_are_those_of_the_plan(layers):
    data = (layers.folder / "model.bin").read_bytes()
    for name in ("wide", "depthwise", "twice", "rows"):
        entry = layers.draft.plan.entries[f"{name}:weight"]
        weight = layers.draft.network.get_submodule(name).weight.detach()
        assert grid.integers(weight, *_numbers(entry), entry.spec).to(torch.int8).numpy().tobytes() in data
        scale = layers.draft.plan.entries[f"{name}:in0"].scale[0]
        assert np.float32(1 / scale).tobytes() in data


def test_between_convolutions_there_are_integers(exported):
    artifact = exported("branches", "ncnn", "int8")
    net = ncnn.Net()
    net.load_param(str(artifact.folder / "model.param"))
    net.load_model(str(artifact.folder / "model.bin"))
    (image,) = artifact.arrays(1, seed=3)
    sizes = {}
    with net.create_extractor() as extractor:
        extractor.input("in0", ncnn.Mat(image[0]).clone())
        for layer in net.layers():
            if layer.name in ("wide", "depthwise", "point", "merge"):
                _, given = extractor.extract(net.blobs()[layer.tops[0]].name, 1)
                sizes[layer.name] = given.elemsize // given.elempack
    assert sizes == {"wide": 1, "depthwise": 1, "point": 4, "merge": 4}


def test_its_sums_are_exact_where_those_of_floating_point_are_not(tmp_path):
    artifact = export(SumsCase(Sums, (), {}, ()), "ncnn", "int8", tmp_path)
    weight, x = (artifact.draft.plan.entries[f"layer:{edge}"] for edge in ("weight", "in0"))
    factors = artifact.network.layer.weight.detach(), artifact.case.inputs(2, seed=9)[0]
    w, q = (torch.round(f.double() / e.scale[0]) for f, e in zip(factors, (weight, x), strict=True))
    exact = (q @ w.T).numpy() * weight.scale[0] * x.scale[0]
    (answer,) = runtimes.open_artifact(artifact.folder, 1).run(artifact.arrays(2, seed=9))
    one_rounding = 2.0**-23
    assert np.abs(answer / exact - 1).max() < one_rounding
    assert np.abs(artifact.answers(2, seed=9)[0] / exact - 1).max() > 8 * one_rounding


def _numbers(entry):
    return torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)


def test_integers_go_in_and_samples_come_out_in_any_axis(tmp_path):
    artifact = export(WordsCase(Words, (), {}, ()), "ncnn", "fp32", tmp_path)
    assert artifact.manifest.programs[0].outputs[1].shape == (7, "batch", 6)
    assert min(worst_db(artifact, batch) for batch in (1, 3)) >= FLOAT_DB


def test_an_axis_may_vary_beside_the_batch(tmp_path):
    words = WordsCase(Words, (), {}, ()).inputs(2, seed=1)
    task = Task(example=words, dynamic={0: {0: "batch", 1: "time"}})
    network = capture_network(Words().eval(), *task.call(), task.dynamic)
    structure = flatten_outputs(network(*words))[1]
    manifest = building.build(Draft(network), "ncnn", "fp32", task, structure, tmp_path)
    assert [port.shape for port in manifest.programs[0].inputs] == [("batch", "time")]
    session = runtimes.open_artifact(tmp_path, 1)
    for length in (3, 7, 12):
        ids = torch.randint(0, 20, (2, length))
        answers = [x.detach().numpy() for x in network(ids)]
        assert measure.parity([answers], [session.run([ids.numpy()])], "planned").snr_db >= FLOAT_DB


def test_half_precision_halves_the_file(exported):
    whole, half = (exported("residual", "ncnn", precision) for precision in ("fp32", "fp16"))
    size, halved = ((x.folder / "model.bin").stat().st_size for x in (whole, half))
    assert halved < 0.6 * size
    assert HALF_DB <= worst_db(half, 2) < worst_db(whole, 2)


def test_it_tells_half_precision_only_where_a_layer_computes_so(exported):
    artifact = exported("residual", "ncnn", "fp16")
    net = ncnn.Net()
    net.load_param(str(artifact.folder / "model.param"))
    halves = {layer.name for layer in net.layers() if layer.support_fp16_storage}
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    assert {site for op in operators for site in op.sites} == {"stem", "body", "head"}
    for operator in operators:
        assert all((operator.precision == "fp16") == (site in halves) for site in operator.sites)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_samples_that_affect_each_other_are_refused(tmp_path):
    with raises_case(ExportError, "samples-together"):
        export(Case(Centred, ((6,),), {}, ()), "ncnn", "fp32", tmp_path)


def test_what_pnnx_calls_otherwise_is_found_in_the_network():
    class Network(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x) + F.max_pool2d(x[:, None], 2, return_indices=True)[1].sum()

    network = capture_network(Network(), (torch.randn(2, 4, 4),))
    named = {"F.max_pool2d": "/max_pool2d", "exit code -6: torch.inv(": "/linalg_inv", "aten::sort": ""}
    for text, found in named.items():
        assert _where(network, text, "").startswith(found) and bool(_where(network, text, "")) == bool(found)


def test_an_operator_that_ncnn_lacks_is_named_with_its_line(tmp_path):
    with raises_case(ExportError, "no-operator") as refusal:
        export(Case(Sorts, ((6,),), {}, ()), "ncnn", "fp32", tmp_path)
    text = str(refusal.value)
    assert "aten::sort" in text and "/sort#0" in text and "test_ncnn.py" in text and "self.layer(x).sort(1)[0]" in text


@pytest.mark.parametrize("name", ["model.param", "model.bin"])
def test_a_truncated_file_is_refused(exported, tmp_path, name):
    artifact = exported("residual", "ncnn", "fp32")
    for file in artifact.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    for size in (0, 40, len(data) - 8):
        (tmp_path / name).write_bytes(data[:size])
        with raises_case(ArtifactError, "unopenable") as refusal:
            isolated.open_artifact(tmp_path, 1)
        assert name in str(refusal.value)


def test_nothing_is_left_but_what_ncnn_reads(exported):
    names = {file.name for file in exported("residual", "ncnn", "fp32").folder.iterdir()}
    assert names == {"model.param", "model.bin", "manifest.json", "load.py"}
