"""Runs for another device than this machine: formats, runtimes, goals, and what the record says of its figures."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import penjing as pj
from penjing import cli, records, runtimes, targets
from penjing.errors import GoalError, MissingDependency, OutputError, PruningError, TargetError, UsageError
from penjing.measure import machine
from penjing.pipeline import targeting
from penjing.pipeline.inspection import inspect
from penjing.report import verdict
from penjing.sources.source import open_source
from tests.raises import raises_case


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(64, 99)).eval()


def task():
    torch.manual_seed(1)
    return pj.Task(example=torch.randn(1, 3, 8, 8), calibration=[torch.randn(8, 3, 8, 8)])


def compress(out, target="jetson-orin", **more):
    options = {"runtime": "onnxruntime", "seconds": 0.0, "threads": 1, "target": target} | more
    return pj.compress(network(), task(), out=out, recipe=pj.quantize.Static(), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return compress(tmp_path_factory.mktemp("runs") / "jetson")


class TestRun:
    def test_the_integers_are_those_of_the_device(self, run):
        assert {c.name for c in run.record.candidates} == {f"onnxruntime-{p}" for p in ("fp32", "fp16", "int8")}
        graph = onnx.load(run.folder / "candidates" / "onnxruntime-int8" / "model.onnx").graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        zeros = [stored[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
        assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)

    def test_the_record_names_the_device(self, run):
        target, profile = run.record.target, targets.load("jetson-orin")
        assert (target.name, target.sha256, target.memory_bytes) == ("jetson-orin", profile.sha256, 4 << 30)
        assert target.instruction_sets == profile.instruction_sets != run.record.machine.instruction_sets
        assert records.read(run.folder).target == target

    def test_no_speed_is_claimed(self, run):
        assert run.record.goal.text == "drop<=1%, minimize size_bytes"
        assert any("this machine and are not jetson-orin's" in text for text in run.record.warnings)
        headline = verdict.of(run.record).headline
        assert "faster" not in headline and "for jetson-orin, whose speed this machine can't tell" in headline

    def test_what_ran_here_says_nothing_of_what_runs_there(self, run):
        integer = next(c for c in run.record.candidates if c.precision == "int8")
        assert integer.float_macs_share == 0.0 and integer.doubts == ()
        assert all(row.executed is None for row in integer.layers)

    def test_it_is_resumed_for_the_same_device_alone(self, run):
        assert compress(run.folder, resume=True).record == run.record
        with raises_case(OutputError, "settings") as caught:
            compress(run.folder, target="pi5", resume=True)
        assert caught.value.got.startswith("target")


class TestRequest:
    @pytest.mark.parametrize("goal", ["minimize latency_ms", "drop<=1%, peak_memory_bytes<=1MB", "throughput_per_s>=9"])
    def test_a_goal_on_this_machines_figures_is_refused(self, goal, tmp_path):
        with raises_case(GoalError, "not-of-the-target") as caught:
            compress(tmp_path / "run", goal=goal)
        assert targeting.GOAL in caught.value.remedy

    def test_a_runtime_that_does_not_run_there_is_refused(self, tmp_path):
        with raises_case(UsageError, "not-of-the-target"):
            compress(tmp_path / "run", runtime="openvino")
        with raises_case(UsageError, "unknown-runtime"):
            compress(tmp_path / "run", runtime="tflite")

    def test_the_first_that_is_installed_is_taken(self, monkeypatch):
        pi = targets.load("pi4")
        monkeypatch.setattr(runtimes, "installed", lambda name: name == "onnxruntime")
        assert targeting.runtime_names(pi, None) == ("onnxruntime",)
        monkeypatch.setattr(runtimes, "installed", lambda name: False)
        with raises_case(MissingDependency, "not-installed"):
            targeting.runtime_names(pi, None)

    def test_a_search_by_latency_has_nothing_to_measure(self, tmp_path):
        with raises_case(PruningError, "no-runtime"):
            pj.compress(
                network(),
                task(),
                out=tmp_path / "run",
                recipe=pj.prune.Channels(latency=0.5),
                target="pi4",
                runtime="onnxruntime",
            )


class TestInspect:
    def test_floats_and_notes_are_the_devices(self):
        there = inspect(open_source(network(), task=task()), task(), target="x86-avx2")
        assert set(there.notes) == {"onnxruntime on x86-avx2", "openvino on x86-avx2"}
        assert all(any("7 bits" in note for note in notes) for notes in there.notes.values())

    def test_an_operator_that_the_device_lacks_stays_in_floating_point(self, tmp_path):
        text = (targets.reading.PROFILES / "pi4.yaml").read_text().replace("integer: any", "integer: [linear]")
        (tmp_path / "mine.yaml").write_text(text)
        there = inspect(open_source(network(), task=task()), task(), target=tmp_path / "mine.yaml")
        floats = there.floats["onnxruntime on pi4"]
        assert floats["0"] == "pi4 has no integer kernel for conv" and "5" not in floats
        assert there.floats["tvm on pi4"]["0"] == "tvm has no integer kernel for conv"

    def test_what_a_device_notes_is_said_once_for_all_its_runtimes(self, digits_source, capsys):
        assert cli.main(["inspect", digits_source, "--shape", "1,8,8", "--target", "pi4"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("the Cortex-A72 has no dot products") == 1 and "onnxruntime on pi4:" in out

    def test_a_device_whose_runtime_is_not_here_is_told_by_its_profile(self, monkeypatch):
        monkeypatch.setattr(runtimes, "installed", lambda name: False)
        there = inspect(open_source(network(), task=task()), task(), target="edge-tpu")
        assert set(there.floats) == {"any runtime on edge-tpu"}

    def test_without_a_target_it_is_this_machine(self):
        here = targeting.capabilities("onnxruntime", machine(1).instruction_sets, None)
        assert here == runtimes.get("onnxruntime").capabilities(machine(1).instruction_sets)


def test_a_record_without_a_target_reads_as_before(digits_run):
    assert digits_run.record.target is None
    assert json.loads((digits_run.folder / "record.json").read_text())["target"] is None


def test_a_runtime_of_a_profile_that_is_misspelled_is_named_with_the_nearest(tmp_path):
    text = (targets.reading.PROFILES / "pi4.yaml").read_text().replace("onnxruntime", "onnxruntim")
    (tmp_path / "mine.yaml").write_text(text)
    with raises_case(TargetError, "unknown-runtime") as refusal:
        targeting.as_target(tmp_path / "mine.yaml")
    assert refusal.value.got == "onnxruntim" and refusal.value.remedy == "did you mean onnxruntime?"
