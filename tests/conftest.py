"""A small network for scikit-learn's digits, trained once, and a finished run of it: what several tests look at."""

import gc
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")  # a busy machine takes seconds for an example, and is not what tests look at

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_finish(session):
    """What was imported stays: the collector leaves it alone, which is an eighth of the time that tests take."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


NETWORK = '''
"""A residual network of two convolutions for 8×8 digits."""
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(self.body(x) + x), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained():
    network = Net()
    network.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return network
'''


@pytest.fixture(scope="session", autouse=True)
def forks():
    """Workers are forks; `real_workers` undoes that."""
    from tests.forked_workers import forked_workers

    with forked_workers():
        yield


@pytest.fixture(scope="session", autouse=True)
def without_waits():
    """Files are not awaited until the disk has them, timed workers stay on no processor, and timings make no pauses.

    All three matter to a run that may end in a power cut or that is timed with care. Tests are neither, and several
    parts of them run at once: on one processor their workers would wait for each other. Processes of runtimes stay
    until the tests end, for importing some of the runtimes takes seconds.
    """
    from penjing.measure import latency, series
    from penjing.runtimes import isolated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, "IDLE_S", 3600.0)
        patch.setenv("PENJING_TVM_SECONDS", "0")  # by default it tunes for two minutes where its cache is empty
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(latency, "PAUSE_S", 0.0)
        for module in (latency, series):
            patch.setattr(module, "processors", tuple)
        yield


@pytest.fixture
def real_workers(monkeypatch):
    """Workers are started as they are outside tests."""
    from penjing.measure import processes
    from tests.forked_workers import start_worker

    monkeypatch.setattr(processes, "start_worker", start_worker)


@pytest.fixture(scope="session")
def digits_task():
    """``examples/digits/task.py:task`` on the command line."""
    pytest.importorskip("sklearn")
    return str(REPOSITORY / "examples" / "digits" / "task.py") + ":task"


@pytest.fixture(scope="session")
def digits_source(tmp_path_factory, digits_task):
    """A SOURCE: ``net.py:trained`` in a folder of its own, with weights that were trained for seconds."""
    import torch
    from safetensors.torch import save_file

    from examples.digits.network import train
    from penjing.tasks.opening import open_task
    from penjing.tasks.usercode import load_named

    folder = tmp_path_factory.mktemp("digits")
    (folder / "net.py").write_text(NETWORK, encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = load_named(str(folder / "net.py"), "Net", error=AssertionError, role="source")()
        train(network, open_task(digits_task), epochs=12, rate=0.03)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return f"{folder / 'net.py'}:trained"


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, digits_source, digits_task):
    """The result of a whole run over both runtimes; it is read by many tests and changed by none."""
    import penjing as pj
    from penjing.tasks.opening import open_task

    out = tmp_path_factory.mktemp("runs") / "finished"
    events = []
    result = pj.compress(
        digits_source, open_task(digits_task), "minimize size_bytes, drop<=2%", out=out, seconds=0.1, threads=1,
        listeners=[events.append],
    )  # fmt: skip
    assert events
    return result


@pytest.fixture
def digits_copy(tmp_path, digits_run):
    """A copy of the finished run, to be tampered with."""
    return Path(shutil.copytree(digits_run.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(case, runtime, precision)``: an artifact of a tiny network, made once for all tests."""
    artifacts = {}

    def get(case, runtime, precision):
        key = (case, runtime, precision)
        if key not in artifacts:
            from tests.tiny_networks import CASES, export

            artifacts[key] = export(CASES[case], runtime, precision, tmp_path_factory.mktemp("artifact"))
        return artifacts[key]

    return get
