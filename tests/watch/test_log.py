"""What a run tells a tracker, and what happens when the tracker breaks. No tracker's package is needed here."""

import math
import socket
import sys
import threading
import warnings
from pathlib import Path

import pytest

from penjing import watch
from penjing.errors import MissingDependency, OutputError, UsageError
from penjing.watch import tracker
from penjing.watch.log import Log, parameters
from tests.raises import raises_case

RUN = (
    {"kind": "stage", "name": "capture"},
    {"kind": "requested", "folder": "runs/first", "resumed": False, "source": "resnet20", "goal": "drop<=1%", "seed": 3,
     "runtimes": ["onnxruntime", "openvino"], "target": None, "data": {"calibration": "beef"},
     "recipe": [{"Finetune": {"epochs": 2, "teacher": None}}, {"quantize.Static": {"weight_bits": 4}}]},
    {"kind": "source", "name": "resnet20", "metric": 0.93, "metric_name": "accuracy"},
    {"kind": "training", "step": 1, "steps": 2, "loss": 0.7, "rate": 0.1, "terms": {"labels": 0.5}},
    {"kind": "training", "step": 2, "steps": 2, "loss": 0.4, "rate": 0.0, "terms": {}},
    {"kind": "trained", "curve": []},
    {"kind": "training", "step": 1, "steps": 1, "loss": math.nan, "rate": 0.1, "terms": {}},
    {"kind": "progress", "label": "calibrate", "done": 10, "total": 100},
    {"kind": "progress", "label": "calibrate", "done": 20, "total": 100},
    {"kind": "progress", "label": "calibrate", "done": 100, "total": 100},
    {"kind": "warning", "text": "few samples"},
    {"kind": "covered", "step": "CoordinateRounding", "layers": 3, "total": 4},
    {"kind": "candidate", "name": "openvino-int8", "metric": 0.92, "size_bytes": 100},
    {"kind": "figures", "name": "openvino-int8", "met": False, "reason": "drop 1 %", "metric": 0.92, "latency_ms": 0.5,
     "size_bytes": 100, "packed_bytes": 80, "drop": 0.01},
    {"kind": "figures", "name": "artifact", "met": False, "reason": "", "metric": 0.921, "latency_ms": 0.5},
    {"kind": "done", "met": False, "reason": "none meets it", "chosen": "openvino-int8"},
)  # fmt: skip


class Memory:
    """A tracker that keeps what it is told; `fails` names a method that raises."""

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []
        self.name, self.parameters, self.values, self.words, self.ended = "", {}, {}, {}, []

    def _called(self, method):
        self.calls.append(method)
        if method == self.fails:
            raise ConnectionError("the server went away")

    def start(self, name, parameters):
        self._called("start")
        self.name, self.parameters = name, dict(parameters)

    def numbers(self, values, step):
        self._called("numbers")
        for name, value in values.items():
            self.values.setdefault(name, []).append((step, value))

    def texts(self, values):
        self._called("texts")
        self.words |= values

    def end(self, failure):
        self._called("end")
        self.ended.append(failure)


def heard(events=RUN, **options):
    memory = Memory(**options)
    log = Log("memory", memory, tell=lambda text: memory.words.__setitem__("told", text))
    for event in events:
        log(event)
    return memory, log


def test_the_request_becomes_parameters_step_by_step():
    memory, _ = heard()
    assert memory.name == "first"
    assert memory.parameters == {
        "resumed": False,
        "source": "resnet20",
        "goal": "drop<=1%",
        "seed": 3,
        "runtimes": "onnxruntime, openvino",
        "data.calibration": "beef",
        "1 Finetune.epochs": 2,
        "2 quantize.Static.weight_bits": 4,
    }


def test_trainings_become_curves_of_their_own():
    memory, _ = heard()
    assert memory.values["training 1/loss"] == [(1, 0.7), (2, 0.4)]
    assert memory.values["training 1/labels"] == [(1, 0.5)]
    assert "training 2/loss" not in memory.values  # which was no number
    assert memory.values["training 2/rate"] == [(1, 0.1)]


def test_progress_is_thinned_and_comes_to_its_end():
    memory, _ = heard()
    assert memory.values["progress/calibrate"] == [(10, 0.1), (100, 1.0)]


def test_every_candidates_figures_stand_under_its_name_and_the_artifacts_bare():
    memory, _ = heard()
    assert memory.values["source/accuracy"] == [(0, 0.93)]
    assert memory.values["openvino-int8/latency_ms"] == [(0, 0.5)]
    assert memory.values["openvino-int8/packed_bytes"] == [(0, 80.0)]
    assert memory.values["openvino-int8/drop"] == [(0, 0.01)]
    assert memory.values["metric"] == [(0, 0.921)] and memory.values["latency_ms"] == [(0, 0.5)]
    assert memory.words["openvino-int8/reason"] == "drop 1 %"


def test_trials_of_a_search_are_points_of_a_curve_and_their_insides_have_names_of_their_own():
    inside = {"trial": 4}
    events = [
        {"kind": "trial", "number": 4, "words": "half the channels", "expected_s": 9, "left_s": None},
        {"kind": "stage", "name": "build"} | inside,
        {"kind": "training", "step": 1, "loss": 0.3, "rate": 0.1, "terms": {}} | inside,
        {"kind": "trained"} | inside,
        {"kind": "candidate", "name": "openvino-int8", "metric": 0.9, "size_bytes": 50} | inside,
        {"kind": "tried", "number": 4, "words": "half the channels", "figures": {"latency_ms": 0.2}, "seconds": 7.5},
        {"kind": "tried", "number": 5, "words": "as it is", "figures": {}, "failure": "no kernel", "seconds": 1},
    ]
    memory, _ = heard([RUN[1], *events, *RUN[3:]])
    assert memory.values["trials/latency_ms"] == [(4, 0.2)] and memory.values["trials/seconds"] == [(4, 7.5), (5, 1.0)]
    assert memory.values["trial 4/training 1/loss"] == [(1, 0.3)]
    assert memory.values["trial 4/openvino-int8/size_bytes"] == [(0, 50.0)]
    assert memory.words["trial 4"] == "half the channels" and memory.words["trial 5"] == "as it is: no kernel"
    assert "stage" not in memory.words and memory.values["training 1/loss"] == [(1, 0.7), (2, 0.4)]


def test_the_verdict_paths_and_warnings_are_texts_and_the_run_ends_once():
    memory, log = heard()
    assert memory.words["met"] == "no" and memory.words["chosen"] == "openvino-int8"
    assert memory.words["artifact"] == str(Path("runs/first/artifact").absolute())
    assert memory.words["record.json"].endswith("record.json") and memory.words["warning 1"] == "few samples"
    assert memory.words["folder"].endswith("/runs/first") and "told" not in memory.words
    log.close()
    log({"kind": "warning", "text": "late"})
    assert memory.ended == [None] and "warning 2" not in memory.words


def test_a_run_that_breaks_off_is_ended_with_the_reason():
    memory = Memory()
    with pytest.raises(KeyError), Log("memory", memory) as log:
        for event in RUN[:4]:
            log(event)
        raise KeyError("a layer")
    assert memory.ended == ["KeyError: 'a layer'"]


def test_a_run_that_is_stopped_by_hand_is_ended_too():
    memory = Memory()
    with pytest.raises(KeyboardInterrupt), Log("memory", memory):
        raise KeyboardInterrupt
    assert memory.ended == ["KeyboardInterrupt"]


def test_a_run_that_was_finished_before_begins_nothing():
    memory, log = heard(RUN[:1])
    assert memory.calls == []
    log.close()
    assert memory.ended == ["the run did not come to its end"]


@pytest.mark.parametrize("method", ["start", "numbers", "texts", "end"])
def test_a_log_that_breaks_is_told_once_and_left_alone(method):
    memory, log = heard(fails=method)
    told = memory.words["told"]
    assert told == "the log memory broke, and the run goes on without it: ConnectionError: the server went away"
    assert memory.calls.count(method) == 1
    log.close()
    assert memory.calls.count("end") == (method == "end")


def test_without_anyone_to_tell_it_warns_as_python_does():
    log = Log("memory", Memory(fails="start"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log(RUN[1])
        log(RUN[2])
    assert [str(warning.message).partition(",")[0] for warning in caught] == ["the log memory broke"]
    assert caught[0].category is UserWarning


def test_a_keyboard_interrupt_is_not_swallowed():
    class Stopped(Memory):
        def numbers(self, values, step):
            raise KeyboardInterrupt

    log = Log("memory", Stopped())
    with pytest.raises(KeyboardInterrupt):
        for event in RUN:
            log(event)


def test_a_broken_log_is_told_to_the_other_listeners(monkeypatch):
    monkeypatch.setattr(watch.log, "open_log", lambda where, tell: Log(where, Memory(fails="start"), tell))
    events = []
    with watch.logging("mlflow:x", [events.append]) as listeners:
        for event in RUN[:3]:
            for listener in listeners:
                listener(event)
    assert [event["text"] for event in events if event["kind"] == "warning"] == [
        "the log mlflow:x broke, and the run goes on without it: ConnectionError: the server went away"
    ]


def test_parameters_of_nothing_are_nothing():
    assert parameters({"kind": "requested", "folder": "x", "recipe": []}) == {}


@pytest.mark.parametrize("where", ["", "mlflow", "mlflow:", "comet:project", ":x", "MLFLOW:x"])
def test_what_is_no_log_is_refused_with_examples(where):
    with raises_case(UsageError, "log") as caught:
        watch.open_log(where)
    assert "tensorboard:runs/tb" in caught.value.expected


@pytest.mark.parametrize(
    ("where", "package"),
    [("mlflow:sqlite:///x.db", "mlflow.tracking"), ("tensorboard:x", "tensorboard"), ("wandb:x", "wandb")],
)
def test_a_missing_package_is_named_with_its_command(where, package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with raises_case(MissingDependency, "not-installed") as caught:
        watch.open_log(where)
    assert caught.value.remedy == f"pip install 'penjing[{where.partition(':')[0]}]'"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_or_does_not_answer_is_told_in_time(monkeypatch):
    monkeypatch.setattr(tracker, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(OSError, match="timed out|no answer"):
            tracker.check_server(f"http://127.0.0.1:{silent.getsockname()[1]}")
        address = silent.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        tracker.check_server(f"http://127.0.0.1:{address}")
    with pytest.raises(OSError, match="unknown url type"):
        tracker.check_server("no address")


def test_what_takes_too_long_is_left_to_itself():
    assert tracker.within(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        tracker.within(5, lambda: {}["x"])
    with pytest.raises(TimeoutError, match="no answer within 0.05 s"):
        tracker.within(0.05, threading.Event().wait)


def test_a_place_that_can_not_be_written_to_is_an_error_before_the_run():
    error = tracker.unreachable("http://x", ConnectionError("refused\nmore"), "start it")
    assert isinstance(error, OutputError) and error.got == "http://x: ConnectionError: refused"


def test_environment_variables_are_the_users_again_afterwards(monkeypatch):
    import os

    monkeypatch.setenv("PENJING_A", "theirs")
    with tracker.environment({"PENJING_A": "ours", "PENJING_B": "ours"}):
        assert (os.environ["PENJING_A"], os.environ["PENJING_B"]) == ("theirs", "ours")
    assert os.environ["PENJING_A"] == "theirs" and "PENJING_B" not in os.environ
