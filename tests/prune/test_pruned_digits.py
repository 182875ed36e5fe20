"""A trained network, real digits: pruned, fine-tuned, quantized, exported, measured and rebuilt."""

import json

import pytest
import torch

import penjing as pj
from penjing.sources.source import open_source
from penjing.tasks.opening import open_task


@pytest.fixture(scope="module")
def result(tmp_path_factory, digits_source, digits_task):
    task = open_task(digits_task)
    recipe = pj.Recipe(pj.prune.Channels(macs=0.4), pj.Finetune(epochs=6, learning_rate=0.01), pj.quantize.Static())
    out = tmp_path_factory.mktemp("runs") / "pruned"
    goal = pj.Goal(minimize="size_bytes", max_drop=0.06)
    return pj.compress(digits_source, task, goal, recipe=recipe, out=out, seconds=0.05, threads=1)


def test_the_artifact_is_smaller_and_as_good(result):
    source, artifact = result.record.source, result.record.artifact
    assert result.met
    assert artifact.macs <= 0.4 * source.macs
    assert artifact.parameters < 0.6 * source.parameters
    assert artifact.metric > source.metric - 0.06


def test_every_candidate_is_pruned_and_agrees_with_torch(result):
    assert {c.runtime for c in result.record.candidates} == {"onnxruntime", "openvino"}
    assert len({c.measured.macs for c in result.record.candidates}) == 1
    for candidate in result.record.candidates:
        if candidate.precision == "fp32":
            assert all(p.largest < 1e-3 for p in candidate.parity if p.against == "planned")


def test_the_events_say_how_well_it_agrees_with_the_masked_network(result):
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    (pruned,) = [e for e in events if e["kind"] == "pruned"]
    assert pruned["disagreement"] < 1e-5


def test_the_checkpoint_rebuilds_it_from_the_factory(result, digits_source, digits_task):
    task = open_task(digits_task)
    module = open_source(digits_source, task=task).module
    draft = pj.load_checkpoint(result.folder, module, task)
    assert any(edit["edit"] == "slice" for edit in draft.edits)
    assert sum(p.numel() for p in draft.network.parameters()) < sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        assert draft.network(*task.call()[0]).shape == module(*task.call()[0]).shape
