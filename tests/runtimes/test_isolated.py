import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from penjing import runtimes
from penjing.errors import ArtifactError, TaskError
from penjing.measure import time_limits
from penjing.measure.processes import Process
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from tests.crashes import crash_at_next_request
from tests.raises import raises_case

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals"),
    pytest.mark.usefixtures("real_workers"),
]


@pytest.fixture(params=runtimes.DEPLOYED)
def artifact(request, exported):
    """The folder of a small network, and a batch for it."""
    folder = exported("residual", request.param, "fp32").folder
    return folder, [np.random.default_rng(0).normal(size=(3, 3, 12, 12)).astype(np.float32)]


def pid(session):
    return session.worker.process.pid


def test_the_answers_are_those_of_the_runtime_in_this_process_to_the_bit(artifact):
    folder, inputs = artifact
    apart, here = isolated.open_artifact(folder, 1), runtimes.open_artifact(folder, 1)
    for one, two in zip(apart.run(inputs), here.run(inputs), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    manifest = read_manifest(folder)
    assert isolated.executed(folder, manifest) == runtimes.executed(folder, manifest)


def test_what_can_not_be_sent_is_refused_before_anything_is(artifact):
    folder, inputs = artifact
    session = isolated.open_artifact(folder, 1)
    begun = pid(session)
    for wrong in (inputs[0].astype(object), inputs[0].astype("U8"), inputs[0][:, :2]):
        with pytest.raises(TaskError):
            session.run([wrong])
    assert session.run(inputs)[0].shape[0] == 3 and pid(session) == begun


def test_a_process_whose_request_was_broken_off_is_replaced_at_the_next(artifact, monkeypatch):
    folder, inputs = artifact
    session = isolated.open_artifact(folder, 1)
    begun = pid(session)
    with monkeypatch.context() as patch:
        patch.setattr("penjing.measure.processes.send", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.run(inputs)
    assert session.run(inputs)[0].shape[0] == 3 and pid(session) != begun


def test_one_process_serves_all_artifacts_of_a_runtime(artifact):
    folder, inputs = artifact
    one, two = isolated.open_artifact(folder, 1), isolated.open_artifact(folder, 1)
    assert pid(one) == pid(two) != os.getpid()
    del one
    assert two.run(inputs)[0].shape[0] == 3


def test_a_process_that_was_begun_is_the_one_that_opens_and_ends_when_nothing_is_asked(artifact, monkeypatch):
    folder, inputs = artifact
    runtime = read_manifest(folder).runtime
    if runtime in isolated._workers:
        isolated._workers[runtime].close()
    monkeypatch.setattr(isolated, "IDLE_S", 3.0)
    isolated.begin(runtime)
    begun = isolated._workers[runtime].process
    session = isolated.open_artifact(folder, 1)
    assert pid(session) == begun.pid and session.run(inputs)[0].shape[0] == 3
    del session
    isolated.begin(runtime)
    assert isolated._workers[runtime].process is begun
    begun._exit_watch.join(30)
    assert not begun.alive


@pytest.mark.parametrize("name", ["SIGFPE", "SIGSEGV", "SIGKILL"])
def test_a_crash_is_an_error_that_names_the_signal_and_the_next_call_works(artifact, name):
    folder, inputs = artifact
    session = isolated.open_artifact(folder, 1)
    before = session.run(inputs)
    crash_at_next_request(session.worker.process, getattr(signal, name))
    with raises_case(ArtifactError, "crashed") as caught:
        session.run(inputs)
    assert name in str(caught.value.got)
    for one, two in zip(session.run(inputs), before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_process_that_stands_still_is_ended_after_its_limit(artifact, monkeypatch):
    folder, inputs = artifact
    session = isolated.open_artifact(folder, 1)
    stopped = pid(session)
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(time_limits, "BASE_S", 0.2)
    monkeypatch.setattr(time_limits, "UNKNOWN_S", 0.3)
    with raises_case(ArtifactError, "hung") as caught:
        session.run(inputs)
    assert "nothing within 0 s" in str(caught.value.got)
    assert not psutil.pid_exists(stopped)


def test_a_request_that_fails_is_an_error_and_ends_nothing(artifact):
    folder, inputs = artifact
    session = isolated.open_artifact(folder, 1)
    alive = pid(session)
    with raises_case(ArtifactError, "failed"):
        session.worker.ask({"cmd": "run", "handle": session.handle + 1}, inputs, limit_s=60)
    assert session.run(inputs)[0].shape[0] == 3 and pid(session) == alive


def test_the_limit_grows_with_the_work(monkeypatch, tmp_path):
    small, large = [np.zeros((1, 10))], [np.zeros((100, 10))]
    time_limits.expect(2.0, 10)
    try:
        assert time_limits.call_s(small) == time_limits.BASE_S + time_limits.FACTOR * 2.0
        assert time_limits.call_s(large) == time_limits.BASE_S + time_limits.FACTOR * 200.0
        before = time_limits.opening_s(tmp_path)
        (tmp_path / "model.bin").write_bytes(bytes(time_limits.BYTES_PER_S * 3))
        assert time_limits.opening_s(tmp_path) == before + 3
    finally:
        time_limits.expect_nothing()


PARENT = """
import sys, time
import numpy as np
from penjing.runtimes import isolated
session = isolated.open_artifact(sys.argv[1], 1)
print(session.worker.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_parent(artifact, stop):
    command = [sys.executable, "-P", "-c", PARENT, str(artifact[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.send_signal(stop)
    for _ in range(100):
        if not psutil.pid_exists(child):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(child)


def test_nothing_is_imported_from_the_current_folder(artifact, tmp_path, monkeypatch):
    for name in ("json", "numpy", "psutil", "onnx", "penjing"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", ""), ""]))
    process = Process("a test", "penjing.runtimes.worker", ["onnxruntime"])
    try:
        request = {"cmd": "open", "folder": str(artifact[0]), "threads": 1}
        assert process.ask(request, limit_s=120)[0] == {"handle": 0}
    finally:
        process.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key, value",
    [("CACHE_DIR", "{here}"), ("INFERENCE_PRECISION_HINT", "{here}"), ("session.load_model_format", "ORT")],
)
def test_a_setting_of_a_manifest_reaches_a_runtime_only_by_name(artifact, tmp_path, key, value):
    import json
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(artifact[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"][key] = value.format(here=tmp_path / "cache")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for opened in (runtimes.open_artifact, isolated.open_artifact):
        with raises_case(ArtifactError, "setting") as caught:
            opened(folder, 1)
        assert caught.value.got.startswith(f"{key} = ")
    assert not (tmp_path / "cache").exists()


def test_a_message_arrives_as_it_was_sent():
    import io

    from penjing.measure.processes import receive, send

    arrays = [
        np.float32(1.5).reshape(()),
        np.zeros((0, 3), np.int64),
        np.arange(6, dtype=np.uint8).reshape(2, 3).T,
        np.array([True, False]),
        np.array([1 + 2j]),
    ]
    stream = io.BytesIO()
    send(stream, {"cmd": "run"}, arrays)
    stream.seek(0)
    message, received = receive(stream)
    assert message == {"cmd": "run"}
    for one, two in zip(arrays, received, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        np.testing.assert_array_equal(one, two)
    assert receive(stream) is None


FORKS = """
import os, signal, sys, time
from penjing.measure.processes import channel, receive, send
requests, answers = channel()
while (asked := receive(requests)) is not None:
    if asked[0]["cmd"] == "fork":
        child = os.fork()
        if not child:
            time.sleep(600)
        send(answers, {"child": child})
    elif asked[0]["cmd"] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    else:
        time.sleep(600)
"""


@pytest.mark.parametrize("end", ["die", "hang", "close"])
def test_what_a_library_forked_ends_too_and_keeps_nobody_waiting(tmp_path, monkeypatch, end):
    (tmp_path / "forks.py").write_text(FORKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    process = Process("a test", "forks")
    try:
        child = process.ask({"cmd": "fork"}, limit_s=60)[0]["child"]
        assert psutil.pid_exists(child)
        if end != "close":
            with raises_case(ArtifactError, "crashed" if end == "die" else "hung"):
                process.ask({"cmd": end}, limit_s=60 if end == "die" else 0.5)
    finally:
        process.close(asking=False)
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("it goes on")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_a_number_that_may_be_somebody_elses_by_now_gets_no_signal(monkeypatch):
    process = Process("a test", "penjing.runtimes.worker", ["onnxruntime"])
    os.kill(process.pid, signal.SIGKILL)
    process.close()
    signalled = []
    monkeypatch.setattr(os, "killpg", lambda group, _: signalled.append(group))
    assert not process.alive
    process.close()
    process.close(asking=False)
    assert signalled == []
