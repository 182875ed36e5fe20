"""A runtime that does not run on this machine: its artifacts are built and compared, not timed, and never offered."""

import json
from dataclasses import replace

import pytest

from penjing import runtimes
from penjing.pipeline.quick import quantize_to
from penjing.recipes.recipe import Recipe
from penjing.records.manifest import read_manifest
from penjing.search.compress import compress

MOON = runtimes.Place(name="the moon", here=lambda: False)


@pytest.fixture
def elsewhere(monkeypatch):
    """ONNX Runtime as if it ran on the moon."""
    spec = replace(runtimes.SPECS["onnxruntime"], place=MOON, stand_in="a telescope")
    monkeypatch.setitem(runtimes.SPECS, "onnxruntime", spec)
    return runtimes.absent("onnxruntime")


def test_why_is_told_in_words(elsewhere):
    assert elsewhere == (
        "onnxruntime runs on the moon alone: it is not timed here, and its answers are those of a telescope"
    )
    assert runtimes.absent("openvino") == ""


def test_penjing_runtimes_says_so(elsewhere, capsys):
    from penjing.cli.commands import main

    assert main(["runtimes", "--json"]) == 0
    rows = {row["runtime"]: row for row in json.loads(capsys.readouterr().out)["runtimes"]}
    assert elsewhere in rows["onnxruntime"]["notes"] and elsewhere not in rows["openvino"]["notes"]


def test_an_artifact_that_was_not_run_where_it_runs_meets_no_goal(elsewhere, digits_source, digits_task, tmp_path):
    result = compress(
        digits_source, digits_task, "minimize size_bytes, drop<=100%", runtime="onnxruntime", recipe=Recipe(),
        out=tmp_path / "run", threads=1, seconds=0.01,
    )  # fmt: skip
    record = result.record
    assert not result.met and not record.candidates
    assert elsewhere in record.goal.reason
    assert len(record.rejected) == 2
    for candidate in record.rejected:
        assert candidate.rejection.reason == elsewhere
        assert candidate.measured.latency_ms is None and candidate.measured.size_bytes > 0
        assert candidate.parity[0].snr_db > 60
        assert read_manifest(result.folder / candidate.folder).runtime == "onnxruntime"
    assert record.source.latency_ms.median > 0


def test_a_file_of_the_quick_way_says_so_and_counts_what_was_planned(elsewhere, digits_source, digits_task, tmp_path):
    done = quantize_to(digits_source, digits_task, tmp_path / "small.onnx", fast=True, threads=1)
    assert done.absent == elsewhere and elsewhere in done.lines()[1]
    assert done.integer_operators == {"conv": 2, "linear": 1, "add": 1, "avg_pool": 1} and done.float_operators == {}
    assert any(line.startswith("planned: in integers: 1 add") for line in done.lines())
