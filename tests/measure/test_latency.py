import itertools
import json
import os
import re
import statistics

import numpy as np
import psutil
import pytest

from penjing.errors import MissingDependency, UsageError
from penjing.measure import latency
from penjing.measure.child import TargetError
from penjing.measure.latency import Target, Timing, compare, order, ratio
from penjing.measure.machine import processors
from penjing.records import Latency
from tests.raises import raises_case

pytestmark = pytest.mark.usefixtures("real_workers")
QUICK = {"threads": 1, "seconds": 0.02, "warmup_seconds": 0.0, "warmup_calls": 1}


def target(folder, *inputs, batch=2):
    return Target(folder.name, folder, list(inputs) or [np.ones((batch, 8), np.float32)], batch)


def turns(tmp_path):
    """The names in calls.log, calls in a row taken together."""
    return [name for name, _ in itertools.groupby((tmp_path / "calls.log").read_text().split())]


def test_order_gives_every_target_every_place():
    for count in (1, 2, 3, 4):
        rows = order(count, 2 * count)
        assert all(sorted(row) == list(range(count)) for row in rows)
        for place in range(count):
            seen = [row[place] for row in rows]
            assert all(seen.count(target) == 2 for target in range(count))
    assert order(2, 4) == [(0, 1), (1, 0), (1, 0), (0, 1)]


def test_targets_take_turns_in_processes_of_their_own(openers, tray, tmp_path):
    told = []
    targets = [target(tray(name)) for name in "abc"]
    timings = compare(
        targets, rounds=4, opener="tiny_openers:matmul", events=lambda kind, **v: told.append((kind, v)), **QUICK
    )
    schedule = ["abc"[i] for row in order(3, 4) for i in row]
    calls = list("abc") + schedule  # the warm-ups come first, each right after its worker has started
    assert turns(tmp_path) == [name for name, _ in itertools.groupby(calls)]
    assert [v["name"] for _, v in told] == schedule
    assert {kind for kind, _ in told} == {"progress"}
    assert [v["done"] for _, v in told] == list(range(1, 13)) and {v["total"] for _, v in told} == {12}
    assert list(timings) == ["a", "b", "c"]
    pids = {(tmp_path / name / "pid.txt").read_text() for name in "abc"}
    assert len(pids) == 3 and str(os.getpid()) not in pids
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_timing_holds_statistics_over_all_calls(openers, tray):
    timing = compare([target(tray("a"), batch=2)], rounds=3, opener="tiny_openers:matmul", **QUICK)["a"]
    latency = timing.latency
    assert (latency.batch, latency.threads) == (2, 1)
    assert latency.calls >= 9  # three rounds of at least three calls
    assert 0 < latency.median <= latency.p95
    assert latency.spread >= 0
    assert len(timing.rounds) == 3
    assert min(timing.rounds) <= latency.median <= max(timing.rounds)
    assert timing.peak_memory_bytes >= timing.baseline_bytes > 0


def test_slow_artifact_still_gets_three_calls_a_turn(openers, tray, tmp_path):
    compare([target(tray("a"))], rounds=2, opener="tiny_openers:matmul", **{**QUICK, "seconds": 0.0})
    # one warm-up, then per round one untimed and three timed calls
    assert (tmp_path / "calls.log").read_text().split() == ["a"] * (1 + 2 * (1 + 3))


def test_ratio_pairs_the_rounds():
    def timing(*rounds):
        latency = Latency(median=1, p95=1, spread=0, batch=1, threads=1, calls=3, rounds=rounds)
        return Timing(latency=latency, peak_memory_bytes=1, baseline_bytes=1, load_ms=1.0)

    # The machine halves its speed in the last round: the ratio of the rounds does not see it.
    assert ratio(timing(2.0, 2.0, 4.0), timing(1.0, 1.0, 2.0)) == 2.0
    assert ratio(timing(3.0, 1.0), timing(1.0, 1.0)) == statistics.median([3.0, 1.0])


def test_worker_gets_threads_processors_and_inputs(openers, tray, monkeypatch):
    monkeypatch.setattr(latency, "processors", processors)
    folder = tray("a")
    inputs = [np.arange(3, dtype=np.int64), np.array([[True]]), np.float32([[0.5, 1.5]])]
    compare([target(folder, *inputs)], rounds=1, opener="tiny_openers:world", **QUICK)
    world = json.loads((folder / "world.json").read_text())
    assert world["threads"] == 1
    assert (world["omp"], world["mkl"]) == ("1", "1")
    assert world["inputs"] == [["int64", [0, 1, 2]], ["bool", [[True]]], ["float32", [[0.5, 1.5]]]]
    assert world["torch"] is False
    if world["cpus"] is not None:
        assert world["cpus"] == [processors()[0]]


def test_more_than_ten_inputs_keep_their_order(openers, tray):
    folder = tray("a")
    compare([target(folder, *(np.array([i]) for i in range(12)))], rounds=1, opener="tiny_openers:world", **QUICK)
    world = json.loads((folder / "world.json").read_text())
    assert [value for _, (value,) in world["inputs"]] == list(range(12))


def test_peak_memory_is_the_workers_own(openers, tray):
    held = np.ones(300 << 20, np.uint8)  # a child must not inherit the peak of its parent
    small, large = tray("small", megabytes="1"), tray("large", megabytes="201")
    timings = compare([target(small), target(large)], rounds=1, opener="tiny_openers:hungry", **QUICK)
    assert timings["large"].peak_memory_bytes - timings["small"].peak_memory_bytes >= 199_000_000
    assert timings["small"].peak_memory_bytes < held.nbytes
    assert timings["large"].peak_memory_bytes - timings["large"].baseline_bytes >= 199_000_000


def test_what_a_runtime_prints_does_not_break_the_protocol(openers, tray):
    timing = compare([target(tray("a"))], rounds=2, opener="tiny_openers:noisy", **QUICK)["a"]
    assert 0 < timing.latency.median < 1e9


@pytest.mark.parametrize(
    ("opener", "words"),
    [
        ("abort_on_open", "the kernel of layer 7 is angry"),
        ("abort_later", "stack smashed in call 12"),
        ("leave", "exit code 7"),
        ("raises", "this runtime wants 3 inputs, not 1"),
    ],
)
def test_failing_runtime_is_an_artifact_error_with_its_last_words(openers, tray, opener, words):
    with raises_case(TargetError, "failed" if opener == "raises" else "crashed") as caught:
        compare([target(tray("poor"))], rounds=7, opener=f"tiny_openers:{opener}", **QUICK)
    assert words in caught.value.got
    assert "'poor'" in caught.value.what
    assert caught.value.remedy


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_worker_that_stands_still_is_ended_and_named(openers, tray, monkeypatch):
    monkeypatch.setattr("penjing.measure.latency.time_limits.call_s", lambda inputs: 0.2)
    with raises_case(TargetError, "hung") as caught:
        compare([target(tray("poor"))], opener="tiny_openers:stops", **QUICK)
    assert caught.value.target == "poor"


def test_error_of_penjing_in_the_worker_keeps_its_kind_and_remedy(openers, tray):
    with raises_case(MissingDependency, "not-installed") as caught:
        compare([target(tray("poor"))], opener="tiny_openers:missing", **QUICK)
    assert caught.value.what.startswith("poor: ") and caught.value.remedy == "pip install fancyrt"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_workers_end_with_an_interrupted_comparison(openers, tray, tmp_path, kind):
    def interrupt(event, **values):
        if values["done"] == 2:
            raise kind

    with pytest.raises(kind):
        compare([target(tray(n)) for n in "ab"], rounds=50, opener="tiny_openers:matmul", events=interrupt, **QUICK)
    for name in "ab":
        assert not psutil.pid_exists(int((tmp_path / name / "pid.txt").read_text()))


def test_other_workers_end_when_one_can_not_open(openers, tray, tmp_path):
    good, bad = tray("good"), tray("bad")
    (bad / "matrix.npy").unlink()
    with raises_case(TargetError, "failed") as caught:
        compare([target(good), target(bad)], opener="tiny_openers:matmul", **QUICK)
    assert caught.value.target == "bad" and "FileNotFoundError" in caught.value.got
    assert not psutil.pid_exists(int((good / "pid.txt").read_text()))


def test_bad_requests_are_refused_before_a_worker_starts(openers, tray, tmp_path):
    a = target(tray("a"))
    for bad, code in (([], "targets"), ([a, a], "targets"), ([target(tmp_path / "a", np.array([object()]))], "dtype")):
        with raises_case(UsageError, code):
            compare(bad, opener="tiny_openers:matmul", **QUICK)
    for numbers in ({"threads": 0}, {"rounds": 0}, {"seconds": -1.0}):
        with raises_case(UsageError, "too-small"):
            compare([a], opener="tiny_openers:matmul", **{**QUICK, **numbers})
    assert not (tmp_path / "a" / "pid.txt").exists()


def test_onnxruntime_session_in_a_worker(openers, tmp_path):
    helper = pytest.importorskip("onnx.helper")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shapes = {"x": ("batch", 16), "w": (16, 16), "y": ("batch", 16)}
    info = {k: helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v) for k, v in shapes.items()}
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [info["x"], info["w"]], [info["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(4, 16)).astype(np.float32), rng.normal(size=(16, 16)).astype(np.float32)]
    timing = compare([Target("ort", tmp_path, inputs, 4)], rounds=2, opener="tiny_openers:onnx", **QUICK)["ort"]
    assert timing.latency.batch == 4
    assert timing.peak_memory_bytes > timing.baseline_bytes  # the runtime's own code is in memory now
    assert timing.load_ms > 0
    # The same session, with an input that it can't take: its own words arrive.
    with raises_case(TargetError, "failed") as caught:
        compare([Target("ort", tmp_path, [inputs[0], inputs[1][:3]], 4)], opener="tiny_openers:onnx", **QUICK)
    assert re.search("INVALID_ARGUMENT|InvalidArgument", caught.value.got)
