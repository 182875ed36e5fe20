"""Whole runs whose artifacts are wrong: what is rejected, why, and what becomes of the others."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing import records
from penjing.errors import SourceError, TaskError
from penjing.onnx_files import write as onnx_file
from penjing.pipeline import building
from penjing.pipeline.verify import verify
from penjing.quantize import Static
from penjing.recipes.recipe import Recipe
from penjing.runtimes import isolated
from tests.raises import raises_case

GOAL = "minimize size_bytes, drop<=100%"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x))))).flatten(1)


def data(samples, seed=0):
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def task(**more):
    return pj.Task(example=data(2), calibration=[data(16, seed) for seed in range(3)], **more)


def compressed(out, network=None, *, runtime="onnxruntime", recipe=None, of=None, **more):
    torch.manual_seed(0)
    network = network if network is not None else Net().eval()
    return pj.compress(
        network, of or task(), GOAL, runtime=runtime, recipe=Recipe(Static()) if recipe is None else recipe,
        out=out, seconds=0.01, threads=1, **more,
    )  # fmt: skip


@pytest.fixture
def lost(monkeypatch):
    """Call with a node's name: from then on the exporter gives other values for it, as exporters have done."""
    exported = onnx_file._exported

    def lose(name, only=lambda model: True, factor=None):
        import onnx
        from onnx import helper, numpy_helper

        def wrong(*arguments):
            model = onnx.load_from_string(exported(*arguments))
            node = next(n for n in model.graph.node if n.name == name)
            if only(model):
                (result,) = node.output
                node.output[0], node.name = f"{result}_before", ""
                if factor is None:
                    added = helper.make_node("Abs", [f"{result}_before"], [result], name=name)
                else:
                    model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
                    added = helper.make_node("Mul", [f"{result}_before", "factor"], [result], name=name)
                model.graph.node.insert(list(model.graph.node).index(node) + 1, added)
            return model.SerializeToString(deterministic=True)

        monkeypatch.setattr(onnx_file, "_exported", wrong)
        monkeypatch.setattr("penjing.onnx_files.export_cache.recall", lambda key: None)
        monkeypatch.setattr("penjing.onnx_files.export_cache.store", lambda key, data: None)  # not for the next test

    return lose


def integers(model):
    return any(n.op_type == "QuantizeLinear" for n in model.graph.node)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_wrong_integers_are_rejected_by_figure_limit_and_operator_and_the_rest_is_offered(tmp_path, lost, runtime):
    lost("b", integers)
    told = []
    result = compressed(tmp_path / "run", runtime=runtime, listeners=[told.append])
    record = result.record
    assert result.met and record.goal.chosen in {c.name for c in record.candidates}
    assert {c.precision for c in record.candidates} & {"int8", "int8-bf16"} == set()
    row = next(c for c in record.rejected if c.precision == "int8")
    assert row.rejection.limit_db == 30 and row.rejection.snr_db < 20 and row.rejection.against == "planned"
    assert row.rejection.operator == "b" and "the first operator that differs is b" in row.rejection.reason
    assert not row.met and row.reason == f"rejected: {row.rejection.reason}"
    assert row.name not in record.goal.pareto and row.measured.latency_ms is None
    (told_once,) = (text for text in record.warnings if " not offered: output: " in text)
    assert row.name in told_once.partition(" not offered")[0]
    assert [e["operator"] for e in told if e["kind"] == "rejected" and e["candidate"] == row.name] == ["b"]
    assert records.read(result.folder) == record
    assert row.rejection.operator in (result.folder / "report.html").read_text(encoding="utf-8")


def test_where_nothing_is_left_the_nearest_is_delivered_and_marked(tmp_path, lost, capsys):
    lost("a", factor=1.2)
    result = compressed(tmp_path / "run", recipe=Recipe())
    record = result.record
    assert record.candidates == () and not result.met
    assert {c.precision for c in record.rejected} == {"fp32", "fp16"}
    assert record.chosen.rejection is not None and record.chosen.measured.latency_ms is not None
    limits = {c.name: c.rejection.limit_db - c.rejection.snr_db for c in record.rejected}
    assert record.goal.chosen == min(limits, key=limits.get)
    assert "no candidate may be offered" in record.goal.reason and "rejected: " in record.goal.reason
    assert (result.artifact / "model.onnx").exists()
    checks = {c.figure: c for c in verify(result.folder, threads=1, seconds=0)}
    assert checks["limits of the parity"].holds is False and "rejected: " in checks["limits of the parity"].recorded
    from penjing.report import html, table, verdict

    assert verdict.of(record).title == "Rejected" and "Rejected" in html.render(record)
    from rich.console import Console

    Console(width=100).print(table.candidates(record))
    shown = " ".join(capsys.readouterr().out.split())
    assert "rejected: output:" in shown and "(60)" in shown


def test_the_command_ends_with_3_where_nothing_is_left(tmp_path, lost, monkeypatch, capsys):
    from penjing import cli
    from penjing.cli import commands

    lost("a")
    (tmp_path / "net.py").write_text(
        "import torch, penjing as pj\nfrom torch import nn\n"
        "torch.manual_seed(0)\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Conv2d(3, 4, 3)\n"
        "    def forward(self, x):\n        return self.a(x).flatten(1)\n"
        "task = pj.Task(example=torch.randn(2, 3, 8, 8), calibration=[torch.randn(16, 3, 8, 8) for _ in range(3)])\n",
        encoding="utf-8",
    )
    code = cli.main(
        ["compress", f"{tmp_path / 'net.py'}:Net", "--task", f"{tmp_path / 'net.py'}:task", "--runtime", "onnxruntime",
         "--goal", GOAL, "--out", str(tmp_path / "run"), "--seconds", "0.01", "--threads", "1", "--json"]
    )  # fmt: skip
    assert code == commands.NOT_MET
    record = json.loads(capsys.readouterr().out)
    assert record["candidates"] == [] and record["rejected"][0]["rejection"]["operator"] == "a"


def test_a_resumed_run_rejects_the_same_without_looking_again(tmp_path, lost, monkeypatch):
    lost("b", integers)
    with monkeypatch.context() as stopped:
        stopped.setattr("penjing.pipeline.timing.latencies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compressed(tmp_path / "run")
    monkeypatch.setattr("penjing.pipeline.candidates.located", lambda *_: pytest.fail("it was looked for before"))
    record = compressed(tmp_path / "run", resume=True).record
    assert [c.rejection.operator for c in record.rejected] == ["b"]
    assert any("is not offered" in text for text in record.warnings)


class Detector(nn.Module):
    """Boxes in pixels beside scores below 1, in one output."""

    def __init__(self):
        super().__init__()
        self.body, self.boxes, self.scores = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        h = F.relu(self.body(x))
        boxes, scores = self.boxes(h).flatten(2) * 300 + 200, self.scores(h).flatten(2).sigmoid()
        return torch.cat([boxes, scores], 1).transpose(1, 2)


def test_scores_that_are_wrong_do_not_hide_behind_boxes(tmp_path, lost):
    lost("scores")
    record = compressed(tmp_path / "run", Detector().eval(), recipe=Recipe()).record
    row = next(c for c in record.rejected if c.precision == "fp32")
    assert row.rejection.output.endswith("columns 4-5 of the last axis") and row.rejection.operator == "scores"
    planned = row.parity[0]
    assert planned.snr_db > 60 and planned.worst.snr_db < 30  # together they look fine


class TestWhatIsNotFinite:
    def test_an_artifact_that_answers_nan_is_rejected_by_that_reason(self, tmp_path, lost):
        lost("c", lambda model: not integers(model), factor=np.nan)

        def evaluate(predict):
            return float(predict(data(8).numpy()).mean())

        record = compressed(tmp_path / "run", of=task(evaluate=evaluate)).record
        assert [c.precision for c in record.rejected] == ["fp32", "fp16"]
        for row in record.rejected:
            assert "NaN" in row.rejection.reason and row.rejection.snr_db is None
            assert row.rejection.operator == "c" and row.measured.metric is None  # of NaN there is none
        assert [c.precision for c in record.candidates] == ["int8"]  # and the others have theirs
        assert all(c.measured.metric is not None for c in record.candidates)

    def test_nan_in_the_source_is_an_error_that_names_output_and_samples(self, tmp_path):
        class Roots(nn.Module):
            def forward(self, x):
                return {"fine": x.mean((1, 2, 3)), "roots": (x.mean((1, 2, 3)) + 10).sqrt()}

        batch = data(32)
        batch[20:23] -= 100  # behind the few samples that are looked at before anything else
        of = pj.Task(example=data(2), calibration=[batch, data(32, 1)])
        with raises_case(TaskError, "not-finite") as caught:
            compressed(tmp_path / "run", Roots().eval(), recipe=Recipe(), of=of)
        assert "roots" in caught.value.what and "3 of 32 samples" in caught.value.got

    def test_infinities_that_are_meant_stay(self, tmp_path):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(8, 4)

            def forward(self, x):
                return self.a(x).masked_fill(torch.tensor([False, True, False, False]), float("-inf"))

        x = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        of = pj.Task(example=x[0][:2], calibration=x)
        record = compressed(tmp_path / "run", Masked().eval(), of=of).record
        assert record.rejected == () and {c.precision for c in record.candidates} == {"fp32", "fp16", "int8"}

    def test_a_weight_that_is_nan_is_not_passed_on_by_pruning(self):
        network = Net().eval()
        with torch.no_grad():
            network.b.weight[3, 2, 1, 1] = float("nan")
        with raises_case(SourceError, "weight-not-finite") as caught:
            pj.apply(Recipe(pj.prune.Channels(channels=0.5)), network, task())
        assert "b.weight" in caught.value.what


@dataclasses.dataclass(frozen=True)
class Fails:
    """A step of integers that raises what no one expects."""

    stage: ClassVar[str] = "quantize"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    error: Exception

    def __call__(self, draft, context):
        raise self.error


class TestWhatACandidateLosesAlone:
    @pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), TypeError("no"), TaskError("no")])
    def test_a_step_for_integers_loses_integers(self, tmp_path, error, monkeypatch):
        monkeypatch.setattr(Static, "__call__", Fails(error).__call__)
        record = compressed(tmp_path / "run").record
        assert {c.precision for c in record.candidates} == {"fp32", "fp16"}
        assert any("onnxruntime-int8 could not be built" in text and "no" in text for text in record.warnings)

    def test_a_step_that_prepares_integers_loses_integers(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pj.quantize.CrossLayerEqualization, "__call__", Fails(ValueError("uneven")).__call__)
        recipe = Recipe(pj.quantize.CrossLayerEqualization(), Static())
        record = compressed(tmp_path / "run", recipe=recipe).record
        assert {c.precision for c in record.candidates} == {"fp32", "fp16"}
        assert any("uneven" in text for text in record.warnings)

    def test_a_step_that_all_need_fails_once_by_its_own_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pj.prune.Channels, "__call__", Fails(ValueError("no such channels")).__call__)
        with pytest.raises(ValueError, match="no such channels"):
            compressed(tmp_path / "run", recipe=Recipe(pj.prune.Channels(channels=0.5), Static()))

    def test_where_nothing_can_be_built_the_first_failure_is_raised(self, tmp_path, monkeypatch):
        failures = iter(["first", "second", "third"])

        def fails(*arguments):
            raise ValueError(next(failures))

        built = building.build
        monkeypatch.setattr(building, "build", lambda *a: fails() if a[1] == "onnxruntime" else built(*a))

        with pytest.raises(ValueError, match="first"):
            compressed(tmp_path / "run")

    def test_a_metric_that_raises_on_the_source_ends_the_run(self, tmp_path):
        def evaluate(predict):
            raise KeyError("labels")

        with raises_case(TaskError, "raised") as caught:
            compressed(tmp_path / "run", of=task(evaluate=evaluate))
        assert isinstance(caught.value.__cause__, KeyError) and "the source" in caught.value.what


def test_a_batch_of_another_size_is_answered_in_the_same_session(tmp_path):
    """One weight in two convolutions: OpenVINO's integers were right until the batch changed."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.m = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

        def forward(self, x):
            return self.m(torch.relu(self.e(x))) + F.conv2d(x, self.e.weight, padding=1)

    torch.manual_seed(0)
    network = Tied().eval()
    result = compressed(tmp_path / "run", network, runtime="openvino")
    assert any(c.precision == "fp32" for c in result.record.candidates)
    for c in result.record.candidates:
        session = isolated.open_artifact(result.folder / c.folder, 1)
        for size in (1, 2, 3, 32):
            x = data(size, 9)
            (answers,) = session.run([x.numpy()])
            with torch.no_grad():
                expected = network(x).numpy()
            assert 10 * np.log10((expected**2).mean() / ((expected - answers) ** 2).mean()) > 20, (c.name, size)
