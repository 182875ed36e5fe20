"""A search from its goal to the artifact: what it tries, what it leaves, and how it goes on after an interruption."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from torch import nn

import penjing as pj
from penjing import records
from penjing.cli import searching
from penjing.errors import MissingDependency, OutputError, RecordError, UsageError
from penjing.search import study
from tests.raises import raises_case

OPTIONS = {"runtime": "onnxruntime", "threads": 1, "seconds": 0.05}
GOAL = "minimize size_bytes, drop<=20%"
TRIALS = 7


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ).eval()


def task():
    torch.manual_seed(1)
    x = torch.randn(96, 1, 8, 8)
    y = x.mean((2, 3)).flatten().gt(0).long()
    return pj.Task(
        example=x[:1],
        calibration=[x[:32], x[32:64]],
        train=[(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)],
        loss=nn.functional.cross_entropy,
    )


class Interrupted(BaseException):
    pass


def interrupting(kind, number):
    """A listener that ends the process's work at the event of that kind and number, as Ctrl-C would."""

    def listener(event):
        if event["kind"] == kind and event.get("number") == number:
            raise Interrupted

    return listener


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    events = []
    out = tmp_path_factory.mktemp("search") / "run"
    done = pj.compress(network(), task(), GOAL, trials=TRIALS, out=out, listeners=[events.append], **OPTIONS)
    return done, events


def test_the_record_tells_every_trial(result):
    search = result[0].record.search
    assert [row.number for row in search.trials] == list(range(TRIALS))
    assert search.trials[0].words == "as it is" and search.trials[0].recipe == []
    assert search.stopped == f"{TRIALS} trials are done"
    assert all(row.seconds > 0 and (row.measured or row.failure) for row in search.trials)
    assert all(row.predicted["size_bytes"] > 0 for row in search.trials[2:] if row.measured)


def test_the_chosen_artifact_is_the_best_of_all_trials(result):
    record = result[0].record
    chosen = record.search.trials[record.search.chosen]
    meeting = [row for row in record.search.trials if row.met]
    assert result[0].met and chosen.measured["size_bytes"] == min(row.measured["size_bytes"] for row in meeting)
    assert record.recipe == chosen.recipe
    assert record.artifact.size_bytes == chosen.measured["size_bytes"]
    assert record.chosen.name == f"{chosen.best}@{chosen.number}"


def test_it_becomes_smaller_than_integers_alone(result):
    rows = result[0].record.search.trials
    integers = next(row for row in rows if row.words == "INT8 rounded")
    assert result[0].record.artifact.size_bytes < integers.measured["size_bytes"]


def test_the_run_folder_is_that_of_any_run(result, tmp_path):
    folder = result[0].folder
    assert {"artifact", "weights.safetensors", "edits.json", "plan.json", "load.py", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    assert records.read(folder) == result[0].record
    draft = pj.load_checkpoint(folder, network(), task())
    assert sum(p.numel() for p in draft.network.parameters()) == result[0].record.artifact.parameters
    assert not (folder / "state").exists()


def test_before_it_begins_it_says_what_it_will_try(result):
    (plan,) = [event for event in result[1] if event["kind"] == "search"]
    assert [row["words"] for row in plan["plan"][:2]] == ["as it is", "INT8 rounded"]
    assert all(row["expected_s"] >= 0 for row in plan["plan"])
    assert [event["number"] for event in result[1] if event["kind"] == "trial"] == list(range(TRIALS))


def test_a_finished_search_is_not_searched_again(result, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(result[0].folder, folder)
    events = []
    again = pj.compress(
        network(), task(), GOAL, trials=TRIALS, out=folder, resume=True, listeners=[events.append], **OPTIONS
    )
    assert again.record == result[0].record
    assert not [event for event in events if event["kind"] == "trial"]


def test_interrupted_again_and_again_it_goes_on_to_the_same_artifact(result, tmp_path):
    begun = 0
    for kind, number in (("trial", 1), ("tried", 3), ("trial", 5), ("never", TRIALS)):
        events = []
        listeners = [events.append, interrupting(kind, number)]
        with contextlib.nullcontext() if kind == "never" else pytest.raises(Interrupted):
            again = pj.compress(
                network(), task(), GOAL, trials=TRIALS, out=tmp_path, resume=begun > 0, listeners=listeners, **OPTIONS
            )
        assert min(event["number"] for event in events if event["kind"] == "trial") >= begun
        begun = number
    assert again.record.chosen.sha256 == result[0].record.chosen.sha256
    same = [(row.words, row.measured.get("size_bytes")) for row in again.record.search.trials]
    assert same == [(row.words, row.measured.get("size_bytes")) for row in result[0].record.search.trials]


def test_a_study_of_another_network_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    pj.compress(network(), task(), GOAL, trials=1, study=url, out=tmp_path / "one", **OPTIONS)
    other = network()
    other[3].weight.data.mul_(2)
    with raises_case(OutputError, "other-study"):
        pj.compress(other, task(), GOAL, trials=1, study=url, out=tmp_path / "two", **OPTIONS)


@pytest.mark.parametrize(
    ("url", "error", "word"),
    [
        ("sqlite:////nowhere/at/all.db", OutputError, "another --study"),
        ("study.db", OutputError, "sqlite:///study.db"),
        ("postgresql://u:se/cr@et@127.0.0.1:1/x", OutputError, "another --study"),
    ],
)
def test_a_study_that_can_not_be_opened_is_told_before_anything_is_computed(tmp_path, url, error, word):
    events = []
    with raises_case(error, "study") as caught:
        pj.compress(network(), task(), GOAL, trials=1, study=url, out=tmp_path, listeners=[events.append], **OPTIONS)
    assert word in caught.value.remedy and "se/cr" not in str(caught.value)
    assert not events


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(study, "_connect", lambda url: None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with raises_case(MissingDependency, "not-installed") as caught:
        study.check_study("postgresql://u:secret@host/x")
    assert "psycopg" in caught.value.remedy and "secret" not in str(caught.value)


def test_the_plan_tells_no_more_than_fits(tmp_path):
    events = []
    quick(tmp_path / "trials", trials=1, listeners=[events.append])
    (plan,) = [event["plan"] for event in events if event["kind"] == "search"]
    assert [row["words"] for row in plan] == ["as it is"]


def test_a_limit_that_nothing_keeps_is_approached(tmp_path):
    events = []
    done = pj.compress(
        network(), task(), "minimize size_bytes, macs<=0", trials=3, out=tmp_path, listeners=[events.append], **OPTIONS
    )
    assert not done.met and done.record.artifact.macs < done.record.source.macs
    (first, *_) = [line for event in events if event["kind"] == "tried" for line in searching.lines(event)]
    assert "macs 42.1 k" in first and "MACs" not in first


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"minutes": 0}, "minutes"),
        ({"minutes": float("nan")}, "minutes"),
        ({"trials": 0}, "trials"),
        ({"trials": 2, "recipe": pj.quantize.Static()}, "recipe"),
        ({"trials": 2, "exclude": ("0",)}, "recipe"),
        ({"study": "sqlite:///x.db"}, "no-budget"),
    ],
)
def test_budgets_that_make_no_sense(tmp_path, options, code):
    with raises_case(UsageError, code):
        pj.compress(network(), task(), GOAL, out=tmp_path / "run", **options, **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_broken_trial_is_told_and_the_search_goes_on(tmp_path, monkeypatch):
    from penjing.quantize import Static

    def broken(self, draft, context):
        raise RuntimeError("no ranges today")

    monkeypatch.setattr(Static, "__call__", broken)
    done = pj.compress(network(), task(), GOAL, trials=3, out=tmp_path, **OPTIONS)
    failed = [row for row in done.record.search.trials if row.failure]
    assert failed and all("no ranges today" in row.failure for row in failed)
    assert done.record.search.chosen == 0


def test_if_every_trial_fails_the_first_cause_is_told(tmp_path, monkeypatch):
    from penjing.search import trial

    def broken(prepared):
        raise RuntimeError("no file today")

    monkeypatch.setattr(trial, "build", broken)
    with raises_case(RecordError, "all-failed") as caught:
        pj.compress(network(), task(), GOAL, trials=2, out=tmp_path, **OPTIONS)
    assert "no file today" in caught.value.got


def test_a_goal_out_of_reach_leaves_the_nearest(tmp_path):
    done = pj.compress(network(), task(), "parameters<=1, drop<=20%", trials=7, out=tmp_path, **OPTIONS)
    *first, last = [row.measured["parameters"] for row in done.record.search.trials if row.measured]
    assert done.record.search.trials[-1].number == 6 and last < min(first)  # nearer than the first looks
    assert not done.met and "comes nearest" in done.record.goal.reason
    assert json.loads((tmp_path / "record.json").read_text())["search"]["chosen"] == done.record.search.chosen


def test_short_minutes_give_the_network_as_it_is(tmp_path):
    done = pj.compress(network(), task(), "minimize size_bytes", minutes=0.001, out=tmp_path, **OPTIONS)
    assert [row.words for row in done.record.search.trials] == ["as it is"]
    assert done.met and "minutes are over" in done.record.search.stopped


def quick(out, **options):
    """A search of a few trials without training."""
    return pj.compress(network(), task(), GOAL, **({"trials": 3, "out": out} | OPTIONS | options))


def test_a_search_that_ended_goes_on_when_it_is_given_more(tmp_path):
    first = quick(tmp_path, trials=2)
    events = []
    more = quick(tmp_path, trials=3, resume=True, listeners=[events.append])
    assert [event["number"] for event in events if event["kind"] == "trial"] == [2]
    assert more.record.search.trials[:2] == first.record.search.trials
    assert more.record.search.seconds > first.record.search.seconds
    assert records.read(tmp_path) == more.record
    assert quick(tmp_path, trials=3, resume=True).record == more.record


def test_a_trial_whose_files_are_damaged_is_carried_out_again(tmp_path):
    with pytest.raises(Interrupted):
        quick(tmp_path, trials=2, listeners=[interrupting("tried", 1)])
    for name in ("trial.json", "begun.json", "seconds.json"):
        (tmp_path / "search" / "trials" / "0001" / name).write_text('{"cho')
    events = []
    done = quick(tmp_path, trials=2, resume=True, listeners=[events.append])
    assert [event["number"] for event in events if event["kind"] == "trial"] == [1]
    assert any("trial 1" in event["text"] for event in events if event["kind"] == "warning")
    assert [row.words for row in done.record.search.trials] == ["as it is", "INT8 rounded"]


def test_runs_that_share_a_study_carry_out_their_own_trials(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(Interrupted):
        quick(tmp_path / "one", study=url, listeners=[interrupting("trial", 1)])
    two = quick(tmp_path / "two", trials=2, study=url)
    assert [row.number for row in two.record.search.trials] == [2, 3]
    one = quick(tmp_path / "one", trials=2, study=url, resume=True)
    assert [row.number for row in one.record.search.trials] == [0, 1]


def test_a_damaged_study_in_the_run_folder_names_the_way_out(tmp_path):
    with pytest.raises(Interrupted):
        quick(tmp_path, listeners=[interrupting("trial", 0)])
    (tmp_path / "search" / "study.db").write_bytes(b"SQLite format 3\0 and no more")
    with raises_case(OutputError, "study") as caught:
        quick(tmp_path, resume=True)
    assert "--force" in caught.value.remedy


def test_a_full_disk_is_told_by_its_first_cause(tmp_path, monkeypatch):

    def full(*args, **options):
        raise RuntimeError("something in the commit") from OSError("database or disk is full")

    monkeypatch.setattr(study._optuna(), "create_study", full)
    with raises_case(OutputError, "study") as caught:
        quick(tmp_path)
    assert "disk is full" in caught.value.got and "--resume" in caught.value.remedy


def test_a_study_that_was_looked_at_is_no_change_of_the_run(result, tmp_path):
    from penjing.pipeline import intact

    folder = tmp_path / "copy"
    shutil.copytree(result[0].folder, folder)
    with (folder / "search" / "study.db").open("ab") as file:
        file.write(b"more")
    differences = intact.differences(folder, result[0].record)
    assert not (differences.missing or differences.changed or differences.strange)
