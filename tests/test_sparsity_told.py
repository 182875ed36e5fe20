"""A run whose recipe made zeros says what they gained: measured beside the same file with other numbers there."""

import html
import json

import numpy as np
import onnx
import pytest
import torch

import penjing as pj
from penjing import records
from penjing.network.capture import capture_network
from penjing.pipeline.zeros import filled
from penjing.records import Candidate, Measured, Zeros
from penjing.records.folder import ARTIFACT
from penjing.report import verdict
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
    )


def task():
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Task(example=x[:2], calibration=[x])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    recipe = pj.Recipe(pj.prune.Magnitude(sparsity=0.75), pj.quantize.Static())
    out = tmp_path_factory.mktemp("runs") / "sparse"
    options = {"runtime": "onnxruntime", "seconds": 0.05, "threads": 1, "out": out}
    return pj.compress(network(), task(), "minimize size_bytes", recipe=recipe, **options)


def zeros_of(path):
    """Zeros in the stored weights of an ONNX file, those of more than one axis."""
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if len(t.dims) > 1]
    return sum(int((w == 0).sum()) for w in weights), sum(w.size for w in weights)


def test_the_record_counts_the_zeros_that_the_file_has(result):
    zeros = result.record.zeros
    assert zeros.weights == 8 * 27 + 288 * 10
    assert zeros.count == int(0.75 * zeros.weights)
    (file,) = (result.folder / ARTIFACT).glob("*.onnx")
    count, weights = zeros_of(file)
    assert weights == zeros.weights
    assert count >= zeros.count  # integers near zero are rounded to it


def test_what_they_gained_is_measured_and_told(result):
    record = result.record
    zeros = record.zeros
    assert 0 < zeros.low <= zeros.speedup <= zeros.high
    told = verdict.idle_zeros(zeros, record.chosen)
    assert not told or told in record.warnings
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert [e["text"] for e in events if e["kind"] == "warning"] == list(record.warnings)
    assert any(step.name == f"measure zeros of {record.goal.chosen}" for step in record.steps)
    page = " ".join(html.unescape((result.folder / "report.html").read_text(encoding="utf-8")).split())
    for text in record.warnings:
        assert " ".join(text.split()) in page
    assert records.read(result.folder) == record


def test_a_recipe_without_zeros_has_nothing_to_measure(digits_run):
    assert digits_run.record.zeros is None and digits_run.record.warnings == ()


def candidate(size=1000, packed=400):
    measured = Measured(size_bytes=size, packed_bytes=packed)
    return Candidate(name="c", runtime="openvino", precision="fp32", folder="c", measured=measured)


def test_the_words_carry_the_measured_figures():
    words = verdict.idle_zeros(Zeros(count=60, weights=80, speedup=1.02, low=0.98, high=1.03), candidate())
    for figure in ("75.0 %", "60 of 80", "openvino computes zeros like other numbers", "1.02×", "0.98× to 1.03×"):
        assert figure in words
    assert "400 B packed" in words and "prune.Channels" in words
    slower = verdict.idle_zeros(Zeros(count=60, weights=80, speedup=0.9, low=0.8, high=1.0), candidate(packed=900))
    assert "0.90×" in slower and "packed" not in slower.split("What gains")[1]


@pytest.mark.parametrize(("speedup", "low", "told"), [(1.3, 1.2, ""), (1.04, 1.03, "like other"), (1.3, 0.9, "noise")])
def test_a_gain_that_was_seen_is_no_complaint(speedup, low, told):
    words = verdict.idle_zeros(Zeros(count=1, weights=2, speedup=speedup, low=low, high=2.0), candidate())
    assert told in words and bool(words) == bool(told)


def test_the_twin_has_other_numbers_where_the_zeros_were_and_nothing_else():
    captured = capture_network(network(), *task().call())
    pruned = pj.prune.Magnitude(sparsity=0.6)(Draft(captured), Context(task=task(), source=captured))
    before = {name: p.detach().clone() for name, p in pruned.network.named_parameters()}
    replica = filled(pruned, seed=0).network
    for name, parameter in replica.named_parameters():
        was, now = before[name].numpy(), parameter.detach().numpy()
        if name not in pruned.sparse:
            assert np.array_equal(was, now)
            continue
        assert (now != 0).all() and np.array_equal(now[was != 0], was[was != 0])
        assert np.abs(now).max() == np.abs(was).max()  # so the integers of a plan fit
        assert {-1.0, 1.0} == set(np.sign(now[was == 0]))
    assert all(torch.equal(p, before[name]) for name, p in pruned.network.named_parameters())
    empty = Draft(captured, edits=pruned.edits)
    for name in pruned.sparse:
        empty.network.get_parameter(name).data.zero_()
    assert all((filled(empty, 0).network.get_parameter(name).abs() == 1).all() for name in pruned.sparse)
