"""What crashes or hangs costs a candidate, and the run goes on."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import PenjingError
from penjing.measure import time_limits
from penjing.runtimes import isolated
from tests.crashes import crash_at_next_request
from tests.raises import raises_case

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def run(out, evaluate, **options):
    task = pj.Task(example=INPUTS[:1], calibration=[INPUTS], evaluate=evaluate)
    recipe = pj.Recipe(pj.quantize.Static())
    return pj.compress(
        network(), task, "minimize size_bytes", runtime="onnxruntime", recipe=recipe, out=out, seconds=0.02, threads=1,
        **options,
    )  # fmt: skip


def names(result):
    return {c.name.removeprefix("onnxruntime-") for c in (*result.record.candidates, *result.record.rejected)}


def disturbed(disturb, at):
    """A metric that does something to the runtime's process before the call number `at` of an artifact."""
    calls = []

    def evaluate(predict):
        worker = isolated._workers.get("onnxruntime")
        if worker is not None and worker.open > len(worker.forgotten):  # an artifact, and not the source
            calls.append(1)
            if len(calls) == at:
                disturb(worker.process)
        return float(np.abs(predict(INPUTS.numpy())).mean())

    return evaluate


def crash(process):
    crash_at_next_request(process, signal.SIGFPE)


def test_a_crash_in_the_evaluation_costs_that_candidate(tmp_path):
    result = run(tmp_path / "run", disturbed(crash, at=2))
    assert names(result) == {"fp32", "int8"}
    (text,) = [w for w in result.record.warnings if "onnxruntime-fp16" in w]
    assert "could not be built" in text and "crashed" in text and "SIGFPE" in text


def test_a_process_that_stands_still_costs_that_candidate(tmp_path, monkeypatch):
    def stop(process):
        monkeypatch.setattr(time_limits, "BASE_S", 1.0)
        os.kill(process.pid, signal.SIGSTOP)

    def listener(event):
        if event["kind"] == "warning":
            monkeypatch.undo()

    result = run(tmp_path / "run", disturbed(stop, at=1), listeners=[listener])
    assert names(result) == {"fp16", "int8"}
    assert any("onnxruntime-fp32" in w and "did not answer" in w for w in result.record.warnings)


def test_an_artifact_that_can_not_be_timed_costs_that_candidate(tmp_path):
    def listener(event):
        if event["kind"] == "stage" and event["name"] == "measure latency":
            (tmp_path / "run" / "candidates" / "onnxruntime-fp16" / "model.onnx").write_bytes(b"no model")

    result = run(tmp_path / "run", disturbed(crash, at=0), listeners=[listener])
    assert names(result) == {"fp32", "int8"}
    assert any("onnxruntime-fp16 could not be timed" in w for w in result.record.warnings)


def test_a_run_without_any_candidate_left_says_why(tmp_path, monkeypatch):
    def always(predict):
        worker = isolated._workers.get("onnxruntime")
        if worker is not None and worker.open > len(worker.forgotten):
            crash(worker.process)
        return float(np.abs(predict(INPUTS.numpy())).mean())

    with raises_case(PenjingError, "crashed"):
        run(tmp_path / "run", always)
