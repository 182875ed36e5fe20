"""Runs that are killed at random moments and resumed end in the same files, to the bit."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from penjing import records
from penjing.pipeline import intact
from penjing.records.lock import LOCK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that begin with everything imported"),
]

PARTS, KILLS = 10, 10  # a hundred
SEED = 24
OTHERS = ("report.html", "events.jsonl")  # they hold times

STABLE = """
import os, sys
import onnx, onnxruntime, onnxscript, torch
from torch import nn
import penjing as pj
import penjing.search.compress, penjing.onnx_files.write

def go(out):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).eval()
    x = torch.randn(64, 1, 8, 8)
    y = x.mean((2, 3)).flatten().gt(0).long()
    train = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    task = pj.Task(
        example=x[:1], calibration=[x[:32], x[32:]], train=train, loss=nn.functional.cross_entropy,
        evaluate=lambda predict: float((predict(x.numpy()).argmax(1) == y.numpy()).mean()),
    )
    recipe = pj.Recipe(
        pj.prune.Channels(macs=0.7), pj.Finetune(epochs=3, save_every_s=0.05), pj.quantize.Static(),
        pj.quantize.CoordinateRounding(),
    )
    options = {"runtime": "onnxruntime", "seconds": 0.05, "threads": 1, "resume": True}
    pj.compress(network, task, "minimize size_bytes", recipe=recipe, out=out, **options)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            go(line.strip())
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """``stable(folder, seconds)``: how a run ended that was killed after so many seconds; None lets it go on."""
    errors = (tmp_path_factory.mktemp("stable") / "errors.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", STABLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def run(folder, seconds):
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # it has ended before
                os.kill(pid, signal.SIGKILL)
        status = int(process.stdout.readline())
        errors.seek(0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, errors.read()[-3000:]
        return not os.WIFSIGNALED(status)

    yield run
    process.stdin.close()
    process.wait(60)


def files_of(folder):
    return {name: digest for name, digest in records.read(folder).files.items() if name not in OTHERS}


@pytest.fixture(scope="module")
def undisturbed(stable, tmp_path_factory):
    """The hashes of a run that nobody killed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    start = time.monotonic()
    assert stable(folder, None)
    return files_of(folder), time.monotonic() - start


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_runs_end_in_the_same_files(stable, undisturbed, tmp_path, part):
    whole, length = undisturbed
    draw = random.Random(SEED + part)
    kills, rounds = 0, 0
    while kills < KILLS:
        folder = tmp_path / str(rounds)
        rounds += 1
        for attempt in range(1000):
            # On a machine that has become busy, a run takes longer than the undisturbed one did.
            if stable(folder, draw.uniform(0.02, length / 2) * (1 + attempt / 20)):
                break
            kills += 1
        assert files_of(folder) == whole, f"after {kills} kills"
        differences = intact.differences(folder, records.read(folder))
        assert not (differences.missing or differences.changed or differences.strange)
        assert not (folder / LOCK).exists() and not (folder / "state").exists()
    print(f"{kills} kills in {rounds} runs of {length:.1f} s")
