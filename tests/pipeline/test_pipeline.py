"""The one way through, stage by stage: what is built once, kept for a resume, and measured on the artifact."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import measure, records, runtimes
from penjing.errors import TaskError
from penjing.network.capture import capture_network
from penjing.pipeline import building, evidence
from penjing.pipeline.candidates import candidate
from penjing.pipeline.drafts import draft
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.prepare import source_figures, store_source
from penjing.pipeline.run import Run, Variant
from penjing.pipeline.timing import latencies, timed
from penjing.quantize import Static
from penjing.recipes.recipe import Recipe
from penjing.records.events import Events
from penjing.records.folder import EVIDENCE, RunFolder
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.tasks.task import Task
from tests.raises import raises_case


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(x) + x).mean((2, 3)))


@pytest.fixture
def told():
    return []


@pytest.fixture
def run(tmp_path, told):
    """A run that was claimed and has done nothing yet."""
    torch.manual_seed(0)
    task = Task(example=torch.zeros(1, 3, 8, 8), calibration=[torch.randn(20, 3, 8, 8) for _ in range(2)])
    return started(tmp_path / "run", task, told)


def started(path, task, told, build=Net):
    folder = RunFolder(path, resume=True)
    folder.claim({})
    torch.manual_seed(1)
    return Run(
        network=capture_network(build().eval(), *task.call(), task.dynamic),
        task=task,
        folder=folder,
        events=Events(listeners=(told.append,)),
        seed=0,
        device="cpu",
        threads=1,
        batch=1,
        seconds=0.02,
        instruction_sets=measure.machine(1).instruction_sets,
    )


def again(run, told):
    """The same run in another process: nothing in memory, the same folder."""
    return started(run.folder.path, run.task, told)


@dataclass(frozen=True)
class Counting:
    """A step that notes where it ran, and scales a weight so that its trace can be seen."""

    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    ran: tuple[list, ...]
    factor: float = 0.5
    stage: str = "structure"

    def __call__(self, draft, context):
        self.ran[0].append(context.capabilities.runtime if context.capabilities else None)
        draft = draft.copy()
        with torch.no_grad():
            draft.network.get_submodule("a").weight.mul_(self.factor)
        return draft


class TestSource:
    def test_it_is_stored_with_its_answers_to_real_samples(self, run):
        manifest, structure = store_source(run)
        assert structure == {"kind": "tensor"}
        assert manifest.runtime == "torch"
        with np.load(run.folder.path / EVIDENCE, allow_pickle=False) as data:
            stored = dict(data)
        assert stored["input_000"].shape == (evidence.SAMPLES, 3, 8, 8)
        batches = [batch.numpy() for batch in run.task.calibration]
        np.testing.assert_array_equal(stored["input_000"][:20], batches[0])
        with torch.no_grad():
            expected = run.network(torch.from_numpy(stored["input_000"])).numpy()
        np.testing.assert_array_equal(stored["source_000"], expected)
        session = isolated.open_artifact(run.folder.path / "source", 1)
        np.testing.assert_allclose(session.run([stored["input_000"]])[0], expected, rtol=0, atol=1e-6)

    def test_evidence_that_a_crash_left_out_is_written_by_the_next_attempt(self, run, told):
        store_source(run)
        whole = (run.folder.path / EVIDENCE).read_bytes()
        model = (run.folder.path / "source" / "model.pt2").stat().st_mtime_ns
        (run.folder.path / EVIDENCE).unlink()
        store_source(again(run, told))
        assert (run.folder.path / EVIDENCE).read_bytes() == whole
        assert (run.folder.path / "source" / "model.pt2").stat().st_mtime_ns == model

    def test_its_figures(self, run):
        store_source(run)
        figures, rows = source_figures(run)
        parameters = 8 * 3 * 9 + 8 + 8 * 8 * 9 + 8 + 8 * 4 + 4
        assert figures.parameters == parameters
        assert figures.size_bytes == 4 * parameters
        assert figures.macs == 64 * 8 * 3 * 9 + 64 * 8 * 8 * 9 + 32
        assert {row.name for row in rows} >= {"a", "b", "head", "/add#0"}
        assert 0 < figures.packed_bytes


class TestDraft:
    def test_steps_before_the_first_that_depends_on_the_runtime_run_once(self, run):
        ran = []
        recipe = Recipe(Counting((ran,)), Static(samples=16), Counting((ran,), factor=2.0, stage="train integers"))
        first = draft(run, recipe, Variant("onnxruntime", "int8"))
        second = draft(run, recipe, Variant("openvino", "int8"))
        assert ran == [None, "onnxruntime", "openvino"]
        assert draft(run, recipe, Variant("openvino", "int8-bf16")) is second
        assert ran == [None, "onnxruntime", "openvino"]
        torch.testing.assert_close(first.network.get_submodule("a").weight, run.network.get_submodule("a").weight)
        assert [cost.name for cost in run.costs] == [
            "Counting", "Static for onnxruntime", "Counting for onnxruntime", "Static for openvino",
            "Counting for openvino",
        ]  # fmt: skip

    def test_a_float_variant_takes_only_what_is_not_made_for_integers(self, run):
        ran = []
        recipe = Recipe(Counting((ran,)), Static(samples=16), Counting((ran,), stage="train integers"))
        bf16 = draft(run, recipe, Variant("openvino", "bf16"))
        assert ran == [None] and not bf16.plan
        torch.testing.assert_close(bf16.network.get_submodule("a").weight, run.network.get_submodule("a").weight / 2)

    def test_what_a_killed_run_has_done_is_read_back_to_the_bit(self, run, told):
        ran = []
        recipe = Recipe(Counting((ran,)), Static(samples=16))
        before = draft(run, recipe, Variant("onnxruntime", "int8"))
        after = draft(again(run, told), recipe, Variant("onnxruntime", "int8"))
        assert ran == [None]
        assert [e["step"] for e in told if e["kind"] == "resumed"] == ["Counting", "Static"]
        assert after.plan == before.plan and after.edits == before.edits
        for name, tensor in before.network.state_dict().items():
            assert torch.equal(after.network.state_dict()[name], tensor)

    def test_the_source_is_left_as_it_was(self, run):
        before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
        draft(run, Recipe(Counting(([],)), Static(samples=16)), Variant("openvino", "int8"))
        assert all(torch.equal(before[name], tensor) for name, tensor in run.network.state_dict().items())


class TestCandidate:
    def test_it_is_measured_in_its_own_runtime(self, run):
        _, structure = store_source(run)
        seen = []

        def metric(predict):
            seen.append(predict(np.zeros((3, 3, 8, 8), np.float64)))
            return 0.75

        record = candidate(run, Recipe(Static(samples=16)), Variant("openvino", "int8"), structure, metric)
        assert (record.name, record.folder) == ("openvino-int8", "candidates/openvino-int8")
        assert record.measured.metric == 0.75
        assert record.measured.latency_ms is None  # that is measured side by side with the others
        session = isolated.open_artifact(run.folder.path / record.folder, 1)
        (expected,) = session.run([np.zeros((3, 3, 8, 8), np.float32)])
        np.testing.assert_array_equal(seen[0], expected)
        manifest = read_manifest(run.folder.path / record.folder)
        folder = run.folder.path / record.folder
        assert record.measured.size_bytes == sum((folder / name).stat().st_size for name in manifest.files())
        assert record.sha256 == {name: measure.sha256(folder / name) for name in manifest.files()}
        assert record.integer_operators == {"conv": 2, "linear": 1, "add": 1, "avg_pool": 1}
        planned, source = record.parity
        assert planned.largest < source.largest

    def test_it_is_kept_for_a_resume(self, run, told):
        _, structure = store_source(run)
        recipe, variant = Recipe(), Variant("onnxruntime", "fp32")
        blank = np.zeros((1, 3, 8, 8), np.float32)
        record = candidate(run, recipe, variant, structure, lambda predict: predict(blank).shape[1] / 8)
        assert record.measured.metric == 0.5

        def never(predict):
            raise AssertionError("it was measured before")

        assert candidate(again(run, told), recipe, variant, structure, never) == record
        assert records.from_dict(records.Candidate, json.loads(records.to_json(record))) == record

    def test_a_failure_leaves_no_half_artifact_and_the_next_attempt_works(self, run, monkeypatch):
        _, structure = store_source(run)
        variant = Variant("onnxruntime", "fp32")
        with monkeypatch.context() as patch:
            patch.setattr(building, "write_loader", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                candidate(run, Recipe(), variant, structure, None)
        assert list((run.folder.path / "candidates").iterdir()) == []
        assert candidate(run, Recipe(), variant, structure, None).measured.metric is None

    def test_answers_that_are_not_finite_are_a_reason_to_reject(self, run, monkeypatch):
        _, structure = store_source(run)

        def broken(draft, context):
            draft = draft.copy()
            with torch.no_grad():
                draft.network.get_submodule("head").bias.fill_(float("nan"))
            return draft

        monkeypatch.setattr(Counting, "__call__", lambda self, draft, context: broken(draft, context))
        recipe, variant = Recipe(Counting(([],))), Variant("onnxruntime", "fp32")
        record = candidate(run, recipe, variant, structure, lambda predict: float("nan"))
        assert "NaN" in record.rejection.reason and record.measured.metric is None


def test_latencies_of_source_and_candidates_are_taken_once(run, told):
    manifest, structure = store_source(run)
    run.batch = 3
    record = candidate(run, Recipe(), Variant("onnxruntime", "fp32"), structure, None)
    timings = latencies(run, manifest, [record])
    assert list(timings) == ["source", "onnxruntime-fp32"]
    for timing in timings.values():
        assert (timing.latency.batch, timing.latency.threads) == (3, 1)
        row = timed(record.measured, timing)
        assert row.size_bytes == record.measured.size_bytes
        assert row.throughput_per_s == pytest.approx(3000 / timing.latency.median)
        assert row.peak_memory_bytes == timing.peak_memory_bytes
    # Decisions that came from timings are replayed: a resumed run sees the same figures.
    assert latencies(again(run, told), manifest, [record]) == timings


class TestCalls:
    def test_a_call_has_as_many_real_samples_as_were_asked_for(self, run):
        data = run.task.calibration[0]
        for batch in (1, 20, 33):
            (x,), named = evidence.one_call(run.task, batch)
            assert named == {} and x.shape == (batch, 3, 8, 8)
            assert torch.equal(x[: min(batch, 20)], data[:batch])
        assert torch.equal(evidence.one_call(run.task, 33)[0][0][20:], data[:13])  # from the start again

    def test_without_calibration_data_it_is_the_example(self):
        task = Task(example={"x": torch.ones(1, 4), "y": torch.ones(1, 2)})
        args, named = evidence.one_call(task, 3)
        assert args == () and named["x"].shape == (3, 4) and named["y"].shape == (3, 2)

    def test_a_fixed_batch_stays_as_it_is(self):
        task = Task(example=torch.ones(2, 4), dynamic={})
        assert evidence.one_call(task, 7)[0][0].shape == (2, 4)
        assert evidence.batch_size(task, 7) == 2
        assert evidence.batch_size(Task(example=torch.ones(2, 4)), 7) == 7


class TestMetric:
    def test_a_number_of_any_kind_will_do(self):
        predict = np.negative
        assert metric_of(lambda p: p(np.float32(-0.5)), predict, "the source") == 0.5
        assert metric_of(lambda p: torch.tensor(p(-0.25)), predict, "the source") == 0.25

    @pytest.mark.parametrize("value", [None, "good", float("inf"), [0.1, 0.2], {}])
    def test_what_is_no_finite_number_is_refused(self, value):
        with raises_case(TaskError, "not-finite") as caught:
            metric_of(lambda p: value, abs, "openvino-int8")
        assert "openvino-int8" in caught.value.what

    def test_one_that_never_looks_at_the_network_is_refused(self):
        with raises_case(TaskError, "unread") as caught:
            metric_of(lambda p: 0.93, abs, "openvino-int8")
        assert "openvino-int8" in caught.value.what

    def test_an_error_names_its_line(self):
        def evaluate(predict):
            return predict(1)["accuracy"]  # this line

        with raises_case(TaskError, "raised") as caught:
            metric_of(evaluate, abs, "the source")
        assert re.search(r"test_pipeline\.py:\d+ in evaluate: .*# this line", caught.value.got)


def test_a_network_with_named_inputs_and_several_outputs_goes_all_the_way(tmp_path, told):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, left, right):
            h = F.relu(self.a(left) + self.b(right))
            return {"sum": h, "parts": (h.mean(1), left * 2)}

    data = {"right": torch.randn(9, 3), "left": torch.randn(9, 4)}
    task = Task(example={k: v[:2] for k, v in data.items()}, calibration=[data])
    run = started(tmp_path / "run", task, told, Two)
    _, structure = store_source(run)
    for variant in (Variant("onnxruntime", "int8"), Variant("openvino", "int8")):
        seen = {}

        def metric(predict, seen=seen):
            seen.update(predict(**{name: x.numpy() for name, x in data.items()}))
            return 1.0

        record = candidate(run, Recipe(Static()), variant, structure, metric)
        with torch.no_grad():
            expected = run.network(**data)
        assert list(seen) == ["sum", "parts"] and isinstance(seen["parts"], tuple)
        np.testing.assert_allclose(seen["sum"], expected["sum"].numpy(), rtol=0, atol=0.1)
        np.testing.assert_allclose(seen["parts"][1], expected["parts"][1].numpy(), rtol=0, atol=0.1)
        assert record.parity[1].snr_db > 25
        assert record.integer_operators == {"linear": 2, "add": 1}


def test_build_freezes_integers_only_for_integer_precisions(run, tmp_path):
    _, structure = store_source(run)
    quantized = draft(run, Recipe(Static(samples=16)), Variant("onnxruntime", "int8"))
    for precision in ("fp32", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        manifest = building.build(quantized, "onnxruntime", precision, run.task, structure, folder)
        assert manifest == read_manifest(folder)
        data = (folder / "model.onnx").read_bytes()
        assert (b"QuantizeLinear" in data) == (precision == "int8")


def test_a_fixed_batch_and_values_that_are_zero_everywhere_go_all_the_way(tmp_path, told):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x) - 100))

    data = torch.randn(8, 3, 6, 6)
    task = Task(example=data[:4], calibration=[data[:4], data[4:]], dynamic={})
    run = started(tmp_path / "run", task, told, Dead)
    _, structure = store_source(run)
    for runtime in runtimes.DEPLOYED:
        record = candidate(run, Recipe(Static()), Variant(runtime, "int8"), structure, None)
        assert record.integer_operators == {"conv": 2}
        assert record.parity[1].snr_db > 25 and record.parity[1].samples == 4
        ports = read_manifest(run.folder.path / record.folder).programs[0].inputs
        assert [tuple(port.shape) for port in ports] == [(4, 3, 6, 6)]
