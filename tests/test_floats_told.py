"""What stays in floating point is told: by `inspect` before a run, and by the record after it, in the same words."""

import functools
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import measure, runtimes
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.pipeline.inspection import inspect
from penjing.records import LayerRow
from penjing.report import table, verdict
from penjing.sources.source import open_source
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.outputs import flatten_outputs

both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        return self.head((x + self.b(x)).mean((2, 3)))


class Encoder(nn.Module):
    """Words, attention with a plain softmax, norms."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def heads(self, x):
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x + self.o(y))


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cells, self.head = cls(12, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Gpt(nn.Module):
    """Weights with the layout (in, out), as GPT-2 has them."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(16, 64) / 4), nn.Parameter(torch.randn(64))
        self.w2, self.b2 = nn.Parameter(torch.randn(64, 16) / 8), nn.Parameter(torch.randn(16))

    def forward(self, x):
        x = F.gelu(torch.addmm(self.b1, x.flatten(0, 1), self.w1))
        return torch.addmm(self.b2, x, self.w2).unflatten(0, (-1, 5))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = nn.Linear(16, 12), nn.Linear(16, 8), nn.Bilinear(12, 8, 6)

    def forward(self, x):
        return self.both(self.a(x), self.b(x))


class Similarities(nn.Module):
    """A product of two values, written as an einsum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.einsum("bnc,bmc->bnm", self.a(x), self.b(x)))


class LowRank(nn.Module):
    """A weight in two parts, and one product of three tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.down = nn.Linear(16, 16), nn.Parameter(torch.randn(4, 16) / 4)
        self.up = nn.Parameter(torch.randn(24, 4) / 2)

    def forward(self, x):
        return torch.einsum("bni,ri,or->bno", F.relu(self.a(x)), self.down, self.up)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 32), nn.Linear(32, 4)

    def forward(self, ids):
        return self.head(self.words(ids).mean(1))


def values(*shape):
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def ids(n):
    return torch.randint(0, 50, (n, 6), generator=torch.Generator().manual_seed(n))


ZOO = {
    "convolutions": (Convolutions, values(3, 8, 8)),
    "encoder": (Encoder, ids),
    "gru": (lambda: Recurrent(nn.GRU), values(7, 12)),
    "lstm": (lambda: Recurrent(nn.LSTM), values(7, 12)),
    "plain recurrent": (lambda: Recurrent(nn.RNN), values(7, 12)),
    "gpt": (Gpt, values(5, 16)),
    "bilinear": (Pairs, values(16)),
    "low rank": (LowRank, values(5, 16)),
    "similarities": (Similarities, values(5, 16)),
    "embedding": (Table, ids),
}


@functools.cache
def network(name):
    torch.manual_seed(0)
    build, data = ZOO[name]
    model = build().eval()
    task = pj.Task(example=data(2), calibration=[data(16 + i) for i in range(2)])
    return model, task


@functools.cache
def inspected(name):
    model, task = network(name)
    return inspect(open_source(model, task=task), task)


@functools.cache
def rows_of(name, runtime):
    return rows_of_network(*network(name), runtime)


def rows_of_network(model, task, runtime):
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    draft = pj.quantize.Static()(
        Draft(capture_network(model, *task.call(), task.dynamic)), Context(task=task, capabilities=capabilities)
    )
    structure = flatten_outputs(model(*task.call()[0]))[1]
    with tempfile.TemporaryDirectory() as aside:
        manifest = building.build(draft, runtime, "int8", task, structure, Path(aside))
        return building.executed_rows(draft.network, draft.plan, task.call(), manifest, Path(aside))[0]


@both
@pytest.mark.parametrize("name", ZOO)
def test_inspect_and_the_record_agree(name, runtime):
    rows = rows_of(name, runtime)
    told = inspected(name).floats[runtime]
    # What a runtime fused without a trace counts as it was planned.
    reasons = {r.name: r.reason for r in rows if r.macs and (r.executed or r.planned) != "int8"}
    assert reasons == {site: reason for site, reason in told.items() if site in {r.name for r in rows if r.macs}}


@both
@pytest.mark.parametrize("name", ZOO)
def test_whatever_has_parameters_and_stays_in_floating_point_has_a_reason(name, runtime):
    rows = rows_of(name, runtime)
    assert all(r.reason for r in rows if (r.macs or r.parameters) and r.executed != "int8" and r.stored != "int8")


@pytest.mark.parametrize(("name", "runtime"), [("gru", "onnxruntime"), ("gru", "openvino"), ("lstm", "onnxruntime")])
def test_the_share_in_floating_point_is_told_with_its_layer(name, runtime):
    rows = rows_of(name, runtime)
    macs, _ = building.float_shares(rows)
    (cells,) = (r for r in rows if r.kind == name)
    assert macs == cells.macs / sum(r.macs for r in rows) > 0.9
    told = building.float_doubts("x-int8", rows)
    assert any("multiply-accumulates" in text and cells.name in text and name in text for text in told)
    reason = f"{runtime} has no integer kernel for {name}"
    if (runtime, name) == ("onnxruntime", "lstm"):
        reason += " with ranges from calibration: quantize.Dynamic takes them at run time"
    assert cells.reason == inspected(name).floats[runtime][cells.name] == reason


class Projected(Recurrent):
    def __init__(self):
        super().__init__(nn.LSTM)
        self.cells, self.head = nn.LSTM(12, 24, batch_first=True, proj_size=6), nn.Linear(6, 4)


def test_a_layer_that_is_written_out_is_not_told_as_one():
    model = Projected().eval()
    task = pj.Task(example=torch.randn(2, 7, 12))
    told = inspect(open_source(model, task=task), task).floats["onnxruntime"]
    assert not any("lstm" in site or "quantize.Dynamic" in reason for site, reason in told.items())


@both
@pytest.mark.parametrize("name", ["convolutions", "plain recurrent", "gpt", "low rank", "similarities", "embedding"])
def test_nothing_is_told_where_all_is_integer(name, runtime):
    assert building.float_doubts("x-int8", rows_of(name, runtime)) == ()


@both
def test_a_table_is_told_to_be_stored_in_integers_and_looked_up(runtime):
    rows = rows_of("embedding", runtime)
    (table,) = (r for r in rows if r.kind == "embedding")
    assert (table.planned, table.stored) == ("int8", "int8")
    assert table.executed == "int8" or table.reason == building.LOOKED_UP
    assert building.float_shares(rows)[1] < 0.01


def test_shares_of_products_and_of_bytes_are_apart():
    rows = (
        LayerRow(name="a", kind="linear", macs=90, weight_bytes=10, planned="int8", executed="int8", stored="int8"),
        LayerRow(name="b", kind="linear", macs=10, weight_bytes=30, executed="fp32", reason="why"),
    )
    assert building.float_shares(rows) == (0.1, 0.75)
    (told,) = building.float_doubts("x", rows)
    assert told == "x: 75% of the bytes of its parameters stay in floating point (b: why)"


class Placed(Encoder):
    """Norms in front of linear layers, and a table of places that is cut to the length of the text."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(400, 32))

    def forward(self, ids):
        x = self.norm(self.words(ids) + self.places[: ids.shape[1]])
        return self.o(self.norm(x + self.q(x)))


@both
def test_why_bytes_stay_in_floats_is_told_of_what_is_stored_and_not_of_kernels(runtime):
    model = Placed().eval()
    ids = torch.randint(0, 50, (8, 9), generator=torch.Generator().manual_seed(0))
    axes = {0: {0: "batch", 1: "length"}}
    rows = rows_of_network(model, pj.Task(example=ids[:2], calibration=[ids], dynamic=axes), runtime)
    (told,) = building.float_doubts("x-int8", rows)
    assert "bytes of its parameters" in told and "only weights of convolutions, linear" in told
    norms = [row.reason or "" for row in rows if row.kind == "layer_norm"]
    assert norms and not any("although its inputs are integers" in reason for reason in norms)


class Sums(nn.Module):
    """Nothing that is multiplied by a stored weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return (x * self.scale).cumsum(-1)


@pytest.mark.filterwarnings("ignore")
def test_an_artifact_without_an_integer_operator_is_not_called_int8(tmp_path):
    task = pj.Task(example=torch.randn(2, 8), calibration=[torch.randn(16, 8)])
    result = pj.compress(Sums(), task, "minimize size_bytes, drop<=100%", seconds=0.01, threads=1, out=tmp_path / "run")
    assert {c.precision for c in result.record.candidates} <= {"fp32", "fp16", "bf16"}
    assert [w for w in result.record.warnings if "no integer operator" in w]


@pytest.mark.filterwarnings("ignore")
def test_a_record_holds_the_shares_and_table_and_verdict_show_them(tmp_path):
    model, task = network("gru")
    result = pj.compress(model, task, "drop<=100%, minimize size_bytes", seconds=0.01, threads=1, out=tmp_path / "run")
    record = pj.records.read(tmp_path / "run") if hasattr(pj, "records") else result.record
    integer = [c for c in record.candidates if c.precision == "int8"]
    assert integer
    assert all(c.float_macs_share > 0.9 and 0 <= c.float_bytes_share <= 1 for c in integer)
    assert all(c.float_macs_share is None for c in record.candidates if c.precision == "fp32")
    assert [w for w in record.warnings if "stay in floating point" in w and "gru" in w]
    caption = str(table.candidates(record).caption)
    assert all(f"{c.name}: {c.float_macs_share:.0%} of the multiply-accumulates" in caption for c in integer)
    if record.chosen in integer:
        assert any("in floating point" in text for text in verdict.changes(record))


def test_a_runtime_that_is_asked_tells_its_floats_beside_those_that_are_considered(monkeypatch):
    monkeypatch.setattr("penjing.pipeline.inspection.refused", lambda *_: ())
    for name in ("ai_edge_litert", "litert_torch", "tvm"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    model, task = network("lstm")
    asked = inspect(open_source(model, task=task), task, asked=["litert", "tvm"])
    assert list(asked.floats) == [*inspected("lstm").floats, "litert", "tvm"]
    assert [r for s, r in asked.floats["litert"].items() if "cells" in s] == ["litert has no integer kernel for lstm"]
    # TVM has no INT8 at all: nothing is said of the islands in such an artifact
    assert {f.runtime for f in asked.diagnosis.findings if f.kind == "float-island"} <= {*asked.floats} - {"tvm"}
