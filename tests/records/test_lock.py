import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from penjing.errors import OutputError
from penjing.records.folder import RunFolder
from penjing.records.lock import LOCK, locked
from tests.raises import raises_case

HOLD = """
import sys, time
from penjing.records.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder):
    """Another process that holds the folder."""
    command = [sys.executable, "-P", "-c", HOLD, str(folder), "[bold]\x1b[2J"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_by_whom_it_is_held_and_nothing_is_touched(tmp_path):
    process = holder(tmp_path / "run")
    try:
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        with raises_case(OutputError, "held") as caught, locked(tmp_path / "run"):
            pytest.fail("two hold it")
        assert f"process {process.pid} since 20" in caught.value.got and "\x1b" not in caught.value.got
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_a_killed_process_holds_nothing(tmp_path):
    process = holder(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK).exists()  # it could not tidy up
    with locked(tmp_path / "run"):
        RunFolder(tmp_path / "run").claim({})  # a lock is no run
    assert not (tmp_path / "run" / LOCK).exists()


def test_one_process_holds_it_once_and_waits_as_long_as_it_is_told(tmp_path):
    with locked(tmp_path), raises_case(OutputError, "held"), locked(tmp_path):
        pytest.fail("two hold it")
    process = holder(tmp_path)
    try:
        start = time.monotonic()
        with raises_case(OutputError, "held"), locked(tmp_path, wait_s=0.3):
            pytest.fail("two hold it")
        assert time.monotonic() - start >= 0.3
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):
        pass


def test_what_stayed_empty_goes_again(tmp_path):
    with locked(tmp_path / "runs" / "first"):
        assert (tmp_path / "runs" / "first" / LOCK).exists()
    assert not (tmp_path / "runs").exists()
    with locked(tmp_path / "runs" / "first"):
        (tmp_path / "runs" / "first" / "record.json").write_text("{}")
    assert [p.name for p in (tmp_path / "runs" / "first").iterdir()] == ["record.json"]


def test_what_can_not_be_held(tmp_path):
    (tmp_path / "file").write_text("")
    for path, code in ((tmp_path / "file", "file"), (tmp_path / "file" / "run", "unwritable")):
        with raises_case(OutputError, code), locked(path):
            pytest.fail("a file is held")
    if os.name == "posix":
        (tmp_path / LOCK).symlink_to(tmp_path / "file")  # writing through it would be writing elsewhere
        with raises_case(OutputError, "unwritable"), locked(tmp_path):
            pytest.fail("a link is held")


@pytest.mark.parametrize("text", [b"", b"[" * 5000, b"\xff\xfe", b'{"pid": "x"}', b'{"pid": 1e999}', b"[1]"])
def test_a_lock_file_that_says_nonsense(tmp_path, monkeypatch, text):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("penjing.records.lock._ORPHANS_S", 0.1)
    (tmp_path / LOCK).write_bytes(text)
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with raises_case(OutputError, "held"), locked(tmp_path):
            pytest.fail("two hold it")


ANSWER = """
import sys, time, torch
from penjing.distill.stored import CachedTeacher
torch.manual_seed(1)
teacher = torch.nn.Linear(6, 3)
answers = CachedTeacher(sys.argv[1], teacher)
x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 400, 4):
    answers(x[start : start + 4])
"""


def test_two_processes_that_store_answers_take_turns(tmp_path):
    import torch

    from penjing.distill.stored import CachedTeacher

    command = [sys.executable, "-P", "-c", ANSWER, str(tmp_path / "answers")]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(120) for process in pair] == [0, 0]
    torch.manual_seed(1)
    teacher = torch.nn.Linear(6, 3)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        np.testing.assert_allclose(
            CachedTeacher(tmp_path / "answers")(x).numpy(), teacher(x).numpy(), rtol=1e-5, atol=1e-6
        )
