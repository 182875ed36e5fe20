"""From a goal to an artifact with its evidence: whole runs on scikit-learn's digits in the real runtimes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import penjing as pj
from penjing import records, runtimes
from penjing.errors import (
    CalibrationError,
    MissingDependency,
    OutputError,
    RecipeError,
    SourceError,
    TaskError,
    TrainingError,
    UsageError,
)
from penjing.records.folder import ARTIFACT, CANDIDATES
from penjing.records.manifest import read_manifest
from penjing.report import verdict
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.sources.source import open_source
from penjing.surgery import insert
from penjing.tasks.opening import open_task
from penjing.watch import Log
from tests.raises import raises_case
from tests.watch.test_log import Memory


@pytest.fixture(scope="module")
def task(digits_task):
    return open_task(digits_task)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def by_name(record):
    return {candidate.name: candidate for candidate in record.candidates}


class TestRecord:
    def test_it_holds_all_that_was_measured(self, digits_run, task):
        record = digits_run.record
        assert record.goal.text == "drop<=2%, minimize size_bytes"
        assert (record.name, record.task, record.metric_name) == ("trained", "digits", "accuracy")
        assert record.machine.threads == 1 and record.machine.processor and record.machine.memory_bytes > 2**20
        assert {"torch", "onnxruntime", "openvino", "numpy"} <= set(record.versions)
        assert len(record.data["calibration"]) == 64
        assert record.warnings == ()
        rows = [record.source, record.artifact, *(c.measured for c in record.candidates)]
        for row in rows:
            values = dataclasses.asdict(row)
            assert not [name for name in values if values[name] is None and name != "energy_mj"]
            assert 0 < row.latency_ms.median <= row.latency_ms.p95
            assert (row.latency_ms.batch, row.latency_ms.threads) == (1, 1)
            assert row.throughput_per_s == pytest.approx(1000 / row.latency_ms.median)
            assert row.peak_memory_bytes > 2**20
        assert all(0.9 < row.metric <= 1 for row in rows)
        assert record.source.macs == 64 * 9 * 32 + 64 * 9 * 32 * 32 + 32 * 10
        for name in ("export source", "evaluate source", "measure latency", "Static for openvino"):
            step = next(step for step in record.steps if step.name == name)
            assert step.wall_s > 0 and step.peak_memory_bytes > 2**20

    def test_every_runtime_has_a_float_and_an_integer_candidate_with_its_row(self, digits_run):
        candidates = by_name(digits_run.record)
        for runtime in runtimes.DEPLOYED:
            for precision in ("fp32", "int8"):
                candidate = candidates[f"{runtime}-{precision}"]
                assert (candidate.runtime, candidate.precision) == (runtime, precision)
                manifest = read_manifest(digits_run.folder / candidate.folder)
                assert set(candidate.sha256) == set(manifest.files())

    def test_integers_are_counted_in_the_runtimes_graph_and_nothing_stays_float(self, digits_run):
        for candidate in digits_run.record.candidates:
            if candidate.precision.startswith("int8"):
                assert candidate.integer_operators == {"conv": 2, "linear": 1, "add": 1, "avg_pool": 1}
                assert candidate.float_operators == {}
            else:
                assert candidate.integer_operators == {}
            layers = {row.name: row for row in candidate.layers}
            assert {"stem", "body", "head", "/add#0"} <= set(layers)
            assert not [row.name for row in layers.values() if row.reason]

    def test_integer_weights_are_smaller(self, digits_run):
        candidates = by_name(digits_run.record)
        for runtime in runtimes.DEPLOYED:
            sizes = [candidates[f"{runtime}-{p}"].measured.size_bytes for p in ("int8", "fp32")]
            assert sizes[0] != sizes[1]
            layers = [{row.name: row for row in candidates[f"{runtime}-{p}"].layers}["body"] for p in ("int8", "fp32")]
            assert layers[0].weight_bytes < layers[1].weight_bytes / 2
            assert (layers[0].planned, layers[0].executed) == ("int8", "int8")
            assert layers[1].executed == "fp32"

    def test_parity_is_close_to_the_planned_network_and_near_the_source(self, digits_run):
        for candidate in digits_run.record.candidates:
            planned, source = candidate.parity
            assert (planned.against, source.against) == ("planned", "source")
            assert planned.samples == source.samples == 32
            if "bf16" not in candidate.precision:
                assert planned.snr_db > 40
            if candidate.precision == "fp32":
                assert source.largest < 1e-3
            assert source.snr_db > 20
            assert source.agreement > 0.9

    def test_it_reads_back_to_an_equal_record(self, digits_run):
        assert records.read(digits_run.folder) == digits_run.record
        text = (digits_run.folder / "record.json").read_text(encoding="utf-8")
        assert records.to_json(digits_run.record) == text

    def test_the_best_that_meets_the_goal_was_chosen(self, digits_run):
        record = digits_run.record
        assert digits_run.met and record.goal.met
        meeting = [c for c in record.candidates if c.drop <= 0.02]
        assert all(c.met for c in meeting)
        assert record.chosen.measured.size_bytes == min(c.measured.size_bytes for c in meeting)
        assert record.goal.chosen in record.goal.pareto
        assert "within" in record.goal.reason

    def test_the_verdict_reads_evaluate_and_the_choice_select(self, digits_run, task):
        record = digits_run.record
        session = isolated.open_artifact(digits_run.artifact, 1)
        predict = predictor(session, read_manifest(digits_run.artifact))
        assert record.artifact.metric == task.evaluate(predict)
        assert record.chosen.measured.metric == task.select(predict)
        assert record.chosen.drop == record.baseline - record.chosen.measured.metric


class TestFolder:
    def test_it_holds_what_the_user_is_promised(self, digits_run):
        names = {path.name for path in digits_run.folder.iterdir()}
        assert names == {
            "artifact", "candidates", "source", "evidence.npz", "load.py", "weights.safetensors", "edits.json",
            "plan.json", "record.json", "events.jsonl", "report.html",
        }  # fmt: skip

    def test_the_artifact_is_the_chosen_candidate(self, digits_run):
        chosen = files(digits_run.folder / digits_run.record.chosen.folder)
        assert files(digits_run.artifact) == chosen

    def test_the_report_is_one_file_about_this_run(self, digits_run):
        text = (digits_run.folder / "report.html").read_text(encoding="utf-8")
        assert digits_run.record.goal.chosen in text and "body" in text
        assert 'src="http' not in text and "<link" not in text

    def test_events_tell_the_course_of_the_run(self, digits_run):
        lines = (digits_run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        assert [e["name"] for e in events if e["kind"] == "candidate"] == [c.name for c in digits_run.record.candidates]
        assert [e["metric"] for e in events if e["kind"] == "source"] == [digits_run.record.source.metric]
        assert events[-1]["kind"] == "done" and events[-1]["met"] is True
        done = [e for e in events if e["kind"] == "progress" and e["label"] == "latency"][-1]
        assert done["done"] == done["total"]

    def test_events_tell_what_was_asked_for_and_every_figure(self, digits_run):
        lines = (digits_run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        (requested,) = [e for e in map(json.loads, lines) if e["kind"] == "requested"]
        assert requested["goal"] == digits_run.record.goal.text and requested["recipe"] == digits_run.record.recipe
        figures = {e["name"]: e for e in map(json.loads, lines) if e["kind"] == "figures"}
        for name, candidate in by_name(digits_run.record).items():
            assert figures[name]["latency_ms"] == candidate.measured.latency_ms.median
            assert (figures[name]["drop"], figures[name]["met"]) == (candidate.drop, candidate.met)
        assert figures["artifact"]["packed_bytes"] == digits_run.record.artifact.packed_bytes

    def test_a_log_that_hears_the_run_has_its_parameters_and_figures(self, digits_run):
        memory = Memory()
        log = Log("memory", memory)
        for line in (digits_run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
            log(json.loads(line))
        assert memory.name == digits_run.folder.name and memory.parameters["seed"] == digits_run.record.seed
        assert memory.values["metric"] == [(0, digits_run.record.artifact.metric)] and memory.ended == [None]
        assert {f"{name}/latency_ms" for name in by_name(digits_run.record)} <= set(memory.values)
        assert memory.words["chosen"] == digits_run.record.goal.chosen

    def test_the_checkpoint_reloads_to_the_same_bits(self, digits_run, digits_source, task):
        model = open_source(digits_source).module
        draft = pj.load_checkpoint(digits_run.folder, model, task)
        quantized = insert(draft.network, draft.plan)
        again = pj.load_checkpoint(digits_run.folder, model, task)
        with torch.no_grad():
            mine, theirs = quantized(task.calibration[0]), insert(again.network, again.plan)(task.calibration[0])
        assert torch.equal(mine, theirs)
        session = isolated.open_artifact(digits_run.artifact, 1)
        (answers,) = session.run([task.calibration[0].numpy()])
        assert np.abs(answers - mine.numpy()).max() < 0.02 * np.ptp(answers)


def test_a_log_hears_a_run_from_its_start_and_is_closed_where_it_breaks_off(task, tmp_path, monkeypatch):
    memories = []

    def opened(where, tell):
        memories.append(Memory())
        return Log(where, memories[-1], tell)

    monkeypatch.setattr("penjing.watch.log.open_log", opened)
    with raises_case(SourceError, "missing"):
        pj.compress("none.py:trained", task, log=["mlflow:x", "wandb:y"], out=tmp_path / "run", runtime="onnxruntime")
    ended = [failure for memory in memories for failure in memory.ended]
    assert len(ended) == 2 and all(failure.startswith("SourceError: ") for failure in ended)


def test_a_log_that_is_none_is_refused_before_anything_is_done(task, tmp_path):
    with raises_case(UsageError, "log"):
        pj.compress(torch.nn.Identity(), task, log="comet:x", out=tmp_path / "run", runtime="onnxruntime")
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_a_goal_out_of_reach_leaves_no_empty_hands_and_the_same_seed_the_same_bits(
    digits_run, digits_source, task, tmp_path
):
    goal = "latency_ms<=0.0000001, minimize size_bytes"
    recipe = pj.Recipe(pj.quantize.Static(outliers="mitigate"), pj.quantize.CoordinateRounding())
    model = open_source(digits_source).module
    result = pj.run(
        recipe, model, task, runtime="onnxruntime", goal=goal, out=tmp_path / "run", seconds=0.05, threads=1
    )
    record = result.record
    assert record.recipe == recipe.to_data() == digits_run.record.recipe  # which is the default
    assert {c.runtime for c in record.candidates} == {"onnxruntime"}
    assert not result.met and not record.goal.met
    assert record.chosen is not None and record.artifact is not None
    assert "latency_ms" in record.goal.reason and "nearest" in record.goal.reason
    assert set(record.goal.pareto) <= set(by_name(record)) and record.goal.pareto
    assert not any(c.met for c in record.candidates)
    assert all("latency_ms" in c.reason for c in record.candidates)
    assert isolated.open_artifact(result.artifact, 1).run([np.zeros((3, 1, 8, 8), np.float32)])[0].shape == (3, 10)
    # Same source, data and seed as the finished run: whatever was asked for, the files are the same.
    for name in ("onnxruntime-fp32", "onnxruntime-int8"):
        assert files(result.folder / CANDIDATES / name) == files(digits_run.folder / CANDIDATES / name)
        mine, theirs = by_name(record)[name], by_name(digits_run.record)[name]
        assert mine.parity == theirs.parity and mine.sha256 == theirs.sha256
    assert record.data == digits_run.record.data
    assert str(result) == f"{record.goal.reason}; {verdict.of(record).headline} ({result.folder})"


def test_without_a_metric_agreement_with_the_source_is_measured_and_what_is_excluded_stays_float(
    digits_source, task, tmp_path
):
    quiet = pj.Task(example=task.example, calibration=task.calibration, name="unlabelled")
    result = pj.compress(
        digits_source, quiet, "drop<=5%, minimize size_bytes", runtime="onnxruntime", exclude=["body"],
        out=tmp_path / "run", seconds=0.05, threads=1, batch=4,
    )  # fmt: skip
    record = result.record
    assert record.metric_name == "agreement with the source"
    assert record.source.metric == 1.0
    assert 0.8 < record.artifact.metric <= 1.0
    candidate = by_name(record)["onnxruntime-int8"]
    rows = {row.name: row for row in candidate.layers}
    assert rows["body"].reason == "excluded by 'body'"
    assert (rows["body"].planned, rows["body"].executed) == ("fp32", "fp32")
    assert candidate.float_operators == {"conv": 1}
    assert candidate.integer_operators["conv"] == 1 and candidate.integer_operators["linear"] == 1
    assert record.recipe[0]["quantize.Static"]["exclude"] == ["body"]
    for row in (record.source, record.artifact):
        assert row.latency_ms.batch == 4
        assert row.throughput_per_s == pytest.approx(4000 / row.latency_ms.median)


def test_apply_gives_a_trainable_module_and_leaves_the_model_alone(digits_source, task):
    model = open_source(digits_source).module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = pj.apply(pj.Recipe(pj.quantize.Static()), model, task)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    images = task.calibration[0]
    with torch.no_grad():
        model.eval()
        assert not torch.equal(small(images), model(images))
        assert (small(images).argmax(1) == model(images).argmax(1)).float().mean() > 0.9
    assert isinstance(small, torch.nn.Module)
    assert torch.equal(small(images), pj.apply(pj.Recipe(pj.quantize.Static()), model, task)(images))
    plain = pj.apply(pj.Recipe(), model, task)
    torch.testing.assert_close(plain(images), model(images))


class TestRefusals:
    """Nothing may be written for a request that makes no sense."""

    def refusal(self, tmp_path, kind, code, model, task, *more, **options):
        with raises_case(kind, code) as caught:
            pj.compress(model, task, *more, out=tmp_path / "run", threads=1, **options)
        assert not (tmp_path / "run").exists()
        assert caught.value.what and caught.value.got and caught.value.expected and caught.value.remedy
        return caught.value

    def test_a_goal_that_speaks_of_a_metric_that_nothing_gives(self, tmp_path, digits_source, task):
        bare = pj.Task(example=task.example)
        error = self.refusal(tmp_path, TaskError, "no-metric", digits_source, bare, "drop<=1%, minimize size_bytes")
        assert "evaluate" in error.remedy

    @pytest.mark.parametrize("goal", ["minimize packed_bytes", "minimize latency_ms, packed_bytes<=1MB"])
    def test_a_goal_on_the_packed_size_where_nothing_packs(self, tmp_path, digits_source, task, goal, monkeypatch):
        monkeypatch.setattr("penjing.numerics.compiled.available", lambda: False)
        error = self.refusal(tmp_path, MissingDependency, "not-installed", digits_source, task, goal)
        assert "penjing[pack]" in error.remedy

    @pytest.mark.parametrize("example", [(torch.ones(2, 4), True), ([torch.ones(2, 4)],), {"x": torch.ones(2), "k": 3}])
    def test_inputs_that_are_no_tensors(self, tmp_path, example):
        bare = pj.Task(example=example)
        error = self.refusal(tmp_path, TaskError, "not-a-tensor", torch.nn.Identity(), bare, "minimize size_bytes")
        assert "wrap the network" in error.remedy

    def test_quantization_without_calibration_data(self, tmp_path, digits_source, task):
        bare = pj.Task(example=task.example)
        error = self.refusal(tmp_path, CalibrationError, "no-calibration", digits_source, bare, "minimize size_bytes")
        assert error.got == "Task.calibration is None"

    def test_a_pattern_that_fits_no_operator(self, tmp_path, digits_source, task):
        error = self.refusal(
            tmp_path, RecipeError, "no-match", digits_source, task, "minimize size_bytes", exclude=["boddy"]
        )
        assert "body" in error.expected

    def test_a_device_that_is_not_there(self, tmp_path, digits_source, task):
        for device in ("gpu", "cuda:99"):
            error = self.refusal(
                tmp_path, UsageError, "device", digits_source, task, "minimize size_bytes", device=device
            )
            assert device in error.got

    @pytest.mark.parametrize(
        "step", [pj.Finetune(), pj.prune.Iterative(step=pj.prune.Channels(macs=0.5), finetune=pj.Finetune())]
    )
    def test_a_training_without_data(self, tmp_path, digits_source, task, step):
        bare = dataclasses.replace(task, train=None)
        recipe = pj.Recipe(pj.prune.Magnitude(sparsity=0.5), step)
        self.refusal(tmp_path, TaskError, "no-training-data", digits_source, bare, "minimize size_bytes", recipe=recipe)
        with raises_case(TaskError, "no-training-data"):
            pj.apply(recipe, open_source(digits_source).module, bare)

    @pytest.mark.parametrize(("pair", "whose"), [(("stem", "setm"), "teacher"), (("setm", "stem"), "student")])
    def test_a_feature_that_does_not_exist(self, tmp_path, digits_source, task, pair, whose):
        learns = pj.Finetune(distill=pj.distill.Hints(features=(pair,)))
        recipe = pj.Recipe(pj.Finetune(), learns)
        error = self.refusal(
            tmp_path, RecipeError, "no-layer", digits_source, task, "minimize size_bytes", recipe=recipe
        )
        assert f"the {whose}" in error.what and error.got == "setm" and "stem" in error.remedy

    def test_what_is_no_recipe(self, digits_source, task):
        for wrong in ("joint", 3):
            with raises_case(RecipeError, "file-name" if wrong == "joint" else "not-a-step") as caught:
                pj.apply(wrong, open_source(digits_source).module, task)
            assert str(caught.value.got) == repr(wrong) and caught.value.expected

    def test_calibration_data_with_an_infinity_at_its_very_end(self, tmp_path, digits_source, task):
        late = [*task.calibration, task.calibration[0] / 0]
        broken = dataclasses.replace(task, calibration=late)
        error = self.refusal(tmp_path, CalibrationError, "not-finite", digits_source, broken, "minimize size_bytes")
        assert f"batch {len(late) - 1}" in error.what


@pytest.mark.parametrize(
    ("evaluate", "code"),
    [
        (lambda predict: predict("nonsense"), "raised"),
        (lambda predict: None, "not-finite"),
        (lambda predict: float("nan"), "not-finite"),
        (lambda predict: 1 / 0, "raised"),
    ],
)
def test_a_metric_that_fails_is_told_before_anything_costly(tmp_path, digits_source, task, evaluate, code):
    broken = dataclasses.replace(task, select=None, evaluate=evaluate)
    with raises_case(TaskError, code) as caught:
        pj.compress(digits_source, broken, "minimize size_bytes", out=tmp_path / "run", threads=1)
    assert caught.value.remedy
    assert not (tmp_path / "run" / ARTIFACT).exists()
    assert not (tmp_path / "run" / CANDIDATES).exists()


def test_a_finished_run_is_given_back_and_not_run_again(digits_copy, digits_source, task):
    before = {path: path.stat().st_mtime_ns for path in digits_copy.rglob("*") if path.is_file()}
    goal = "drop<=2%, minimize size_bytes"
    again = pj.compress(digits_source, task, goal, out=digits_copy, resume=True, threads=1)
    assert again.record == records.read(digits_copy)
    assert {path: path.stat().st_mtime_ns for path in digits_copy.rglob("*") if path.is_file()} == before
    with raises_case(OutputError, "settings") as caught:
        pj.compress(digits_source, task, "drop<=3%", out=digits_copy, resume=True, threads=1)
    assert caught.value.got.startswith("goal")
    with raises_case(OutputError, "settings") as caught:
        pj.compress(digits_source, task, goal, out=digits_copy, resume=True, threads=1, seed=4)
    assert caught.value.got == "seed = 4"
    fewer = dataclasses.replace(task, calibration=task.calibration[:2])
    with raises_case(OutputError, "settings") as caught:
        pj.compress(digits_source, fewer, goal, out=digits_copy, resume=True, threads=1)
    assert caught.value.got.startswith("data")
    assert {path: path.stat().st_mtime_ns for path in digits_copy.rglob("*") if path.is_file()} == before


def test_a_training_that_all_candidates_need_fails_once_and_by_its_own_name(tmp_path, digits_source, task):
    x, y = task.calibration[0], torch.zeros(len(task.calibration[0])).long()
    seen = []

    def loss(output, target):
        seen.append(1)
        return torch.nn.functional.cross_entropy(output, target) * (math.nan if len(seen) == 3 else 1.0)

    broken = dataclasses.replace(task, train=[(x, y)] * 4, loss=loss)
    recipe = pj.Recipe(pj.Finetune(epochs=1))
    with raises_case(TrainingError, "loss-not-finite") as caught:
        pj.compress(digits_source, broken, "minimize size_bytes", recipe=recipe, out=tmp_path / "run", threads=1)
    assert "step 2" in caught.value.what
    assert len(seen) == 3


def test_a_run_goes_on_with_the_training_data_and_the_loss_that_it_was_asked_for(tmp_path, digits_source, task):
    x, y = task.calibration[0], torch.zeros(len(task.calibration[0])).long()

    def stops(output, target):
        raise KeyboardInterrupt

    first = dataclasses.replace(task, train=[(x, y)], loss=stops)
    asked = {"goal": "minimize size_bytes", "recipe": pj.Recipe(pj.Finetune()), "threads": 1, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        pj.compress(digits_source, first, **asked)
    with raises_case(OutputError, "settings") as caught:
        pj.compress(digits_source, dataclasses.replace(first, train=[(x, y + 1)]), resume=True, **asked)
    assert caught.value.got.startswith("data.train = ")
    other = dataclasses.replace(first, loss=torch.nn.functional.cross_entropy)
    with raises_case(OutputError, "settings") as caught:
        pj.compress(digits_source, other, resume=True, **asked)
    assert caught.value.got == "loss = torch.nn.functional.cross_entropy"
    with pytest.raises(KeyboardInterrupt):
        pj.compress(digits_source, first, resume=True, **asked)


def test_what_the_plan_holds_that_nobody_asked_for_is_told(tmp_path):
    """Weights of 6 bits that the runtime stores in 8, with the size; a remedy against outlier channels."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
    with torch.no_grad():
        network[0].weight[:, 3] /= 300.0
    data = [torch.randn(16, 64) * torch.where(torch.arange(64) == 3, 300.0, 1.0) for _ in range(3)]
    task = pj.Task(example=data[0][:2], calibration=data)
    goal, options = "minimize size_bytes, drop<=100%", {"runtime": "onnxruntime", "seconds": 0.01, "threads": 1}
    told = pj.compress(network, task, goal, out=tmp_path / "default", **options).record
    assert told.goal.chosen == "onnxruntime-int8"
    assert any("outlier channels" in text and "dB instead of" in text for text in told.warnings)
    recipe = pj.Recipe(pj.quantize.Static(weight_bits=6))
    narrow = pj.compress(network, task, goal, recipe=recipe, out=tmp_path / "narrow", **options).record
    assert narrow.goal.chosen == "onnxruntime-int8"
    (line,) = [text for text in narrow.warnings if "weights of 6 bits in 8" in text]
    assert "on disk" in line and "packed" in line
