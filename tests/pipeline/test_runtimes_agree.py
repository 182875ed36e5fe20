"""INT8 artifacts of one network in several runtimes are compared with each other."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

import penjing as pj
from penjing import records
from penjing.pipeline import between, evidence
from penjing.quantize import Static
from penjing.recipes.recipe import Recipe
from penjing.report import between as in_words
from penjing.report import html, table
from tests.tiny_networks import Residual

TWO = ("onnxruntime", "openvino")
SLOW = pytest.mark.slow
FOUR = (*TWO, "litert", "executorch")


def run(task, out, runtimes):
    torch.manual_seed(0)
    return pj.compress(
        Residual().eval(), task, "minimize size_bytes, drop<=100%", runtime=runtimes, recipe=Recipe(Static()),
        out=out, seconds=0.01, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    inputs = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return pj.Task(example=inputs[0][:2], calibration=inputs)


@pytest.fixture(scope="module", params=[pytest.param(TWO, id="two"), pytest.param(FOUR, id="four", marks=SLOW)])
def result(request, task, tmp_path_factory):
    if request.param == FOUR:
        pytest.importorskip("litert_torch")
        pytest.importorskip("executorch")
    return run(task, tmp_path_factory.mktemp("between") / "run", request.param)


def test_every_pair_of_runtimes_stays_within_its_bound(result):
    record = result.record
    names = [c.name for c in record.candidates if c.precision == "int8"]
    assert len(names) in (len(TWO), len(FOUR))
    pairs = [{pair.first, pair.second} for pair in record.pairs]
    assert len(pairs) == len(names) * (len(names) - 1) / 2
    assert all({a, b} in pairs for a in names for b in names if a != b)
    for pair in record.pairs:
        assert pair.holds and pair.agreement > 0.8
        for row in pair.rows:
            assert row.snr_db > row.limit_db > 10
            assert row.limit_db < 24  # two times 30 dB, where the plans are the same
    assert not any("further apart" in text for text in record.warnings)


def test_record_and_report_name_the_pair_that_differs_most(result):
    record = records.read(result.folder)
    assert record.pairs == result.record.pairs
    worst = min(record.pairs, key=lambda pair: pair.worst.snr_db)
    line = in_words.line(record)
    assert line.startswith(f"INT8 across runtimes: {worst.first} and {worst.second} differ")
    assert len(record.pairs) == 1 or "differ most of 6 pairs" in line
    text = html.render(record).replace("\N{NO-BREAK SPACE}", " ")
    assert line in text and text.count("INT8 across") == 1


def test_the_table_says_it_too(result):
    console = Console(width=200, file=io.StringIO())
    console.print(table.candidates(result.record))
    assert in_words.line(result.record) in " ".join(console.file.getvalue().split())


def test_a_pair_of_a_damaged_record_has_no_line(result):
    damaged = dataclasses.replace(result.record.pairs[0], rows=())
    record = dataclasses.replace(result.record, pairs=(damaged,))
    assert in_words.line(record) == "" and "INT8 across runtimes" not in html.render(record)


def test_one_runtime_is_not_compared_with_itself(result):
    alone = dataclasses.replace(result.record, pairs=())
    assert in_words.line(alone) == "" and "INT8 across runtimes" not in html.render(alone)


def test_a_pair_beyond_its_bound_is_told_by_name(task, tmp_path, monkeypatch):
    plan = np.random.default_rng(0).standard_normal((32, 5))
    answers = {"onnxruntime": (plan, plan), "openvino": (plan, plan * 1.1)}
    monkeypatch.setattr(evidence, "integer_answers", lambda folder, name: tuple([x] for x in answers[name]))
    monkeypatch.setattr(evidence, "originals", lambda folder: [plan])
    result = run(task, tmp_path / "run", TWO)
    [pair] = result.record.pairs
    assert not pair.holds and pair.worst.snr_db == pytest.approx(20)
    told = [text for text in result.record.warnings if "further apart" in text]
    assert len(told) == 1 and told[0].startswith("onnxruntime-int8 and openvino-int8 are further apart than")
    assert "20.0 dB is below the limit of 24 dB" in told[0]


def test_answers_of_artifacts_that_are_not_offered_are_left_out(result):
    rejected = [dataclasses.replace(c, rejection=records.Rejection(reason="no")) for c in result.record.candidates]
    assert between.pairs(None, rejected) == ()
