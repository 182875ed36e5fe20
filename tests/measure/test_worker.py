import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from penjing.measure.worker import times_ms

SOURCE = Path(__file__).parents[2] / "src"


def converse(folder, text: str):
    """Run a worker on its own, say `text` to it, and return its exit code, answers and standard error."""
    np.savez(folder / "inputs.npz", np.ones((1, 8), np.float32))
    command = [sys.executable, "-m", "penjing.measure.worker", str(folder), str(folder / "inputs.npz")]
    command += ["--threads", "1", "--opener", "tiny_openers:noisy"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ["PYTHONPATH"]])}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_protocol_on_standard_input_and_output(openers, tray):
    requests = [{"cmd": "run", "seconds": 60, "max_calls": 4}, {"cmd": "peak"}, {"cmd": "stop"}, {"cmd": "peak"}]
    code, answers, stderr = converse(tray("a"), "".join(json.dumps(r) + "\n" for r in requests))
    assert code == 0
    ready, run, peak, stopped = answers
    assert ready["ready"] and ready["load_ms"] > 0
    assert len(run["times_ms"]) == 4 and all(0 < t < 1e9 for t in run["times_ms"])
    assert peak["peak_memory_bytes"] >= peak["baseline_bytes"] > 1_000_000
    assert stopped == {"stopped": True}
    assert "opening" in stderr and "native noise" in stderr


def test_end_of_input_ends_the_worker(openers, tray):
    code, answers, _ = converse(tray("a"), "")
    assert code == 0
    assert answers[0]["ready"] and answers[1:] == [{"stopped": True}]


def test_unknown_command_is_an_error(openers, tray):
    code, answers, _ = converse(tray("a"), '{"cmd": "dance"}\n')
    assert code == 1
    assert answers[-1]["error"]["kind"] == "UsageError" and answers[-1]["error"]["got"] == "dance"


def test_inputs_with_pickled_objects_are_refused(openers, tray):
    folder = tray("a")
    np.savez(folder / "objects.npz", np.array([{"run": "code"}], dtype=object))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "penjing.measure.worker", str(folder), str(folder / "objects.npz")]
    done = subprocess.run(
        [*command, "--threads", "1", "--opener", "tiny_openers:matmul"],
        input="",
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 1
    assert "allow_pickle" in json.loads(done.stdout)["error"]["what"]
    assert not (folder / "pid.txt").exists()


def test_turn_ends_by_calls_and_never_below_the_minimum():
    calls = []
    assert len(times_ms(lambda: calls.append(1), seconds=60, max_calls=5)) == 5
    assert len(times_ms(lambda: calls.append(1), seconds=0, max_calls=5, min_calls=3, skip=2)) == 3
    assert len(calls) == 5 + 3 + 2


def test_importing_measure_does_not_import_torch_or_a_runtime():
    program = "import sys, penjing.measure, penjing.measure.worker; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert "numpy" in done.stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "openvino"} & set(done.stdout.split())
