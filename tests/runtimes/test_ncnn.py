"""ncnn: it answers as torch does, and what it has no layer for is named."""

import pytest
import torch
from torch import nn

from penjing import measure, runtimes
from penjing.errors import ArtifactError, ExportError
from penjing.runtimes import isolated
from tests.pairs import FLOAT_DB
from tests.raises import raises_case
from tests.tiny_networks import Case, export

ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

HALF_DB = 50


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


class WordsCase(Case):
    def inputs(self, samples, seed):
        return (torch.randint(0, 20, (samples, 7), generator=torch.Generator().manual_seed(seed)),)


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x).sort(1)[0]


@pytest.mark.parametrize("case", ["branches", "tokens", "two inputs"])
def test_it_answers_as_torch_at_every_batch(exported, case):
    artifact = exported(case, "ncnn", "fp32")
    assert min(worst_db(artifact, batch) for batch in (1, 3)) >= FLOAT_DB


def test_integers_go_in_and_samples_come_out_in_any_axis(tmp_path):
    artifact = export(WordsCase(Words, (), {}, ()), "ncnn", "fp32", tmp_path)
    assert artifact.manifest.programs[0].outputs[1].shape == (7, "batch", 6)
    assert min(worst_db(artifact, batch) for batch in (1, 3)) >= FLOAT_DB


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
