"""The end of a search on a machine whose speed changes."""

from types import SimpleNamespace

import pytest

from penjing.goals.goal import Goal
from penjing.pipeline.timing import Timed
from penjing.records import Latency, Measured
from penjing.search import finish
from penjing.search.choice import Choice, Learning
from penjing.search.history import Trial
from penjing.search.trial import Begun, Outcome


def timed(ms):
    """Finalists that were timed while the source took so long."""
    latency = Latency(median=ms, p95=ms, spread=0.0, batch=1, threads=1, calls=1)
    return Timed(source=Measured(latency_ms=latency), candidates=(), floors={})


def ended(monkeypatch, source_ms, *, goal="latency_ms<=1", spare_s=60.0):
    """The source's latency that the end of a search goes by, and how often it timed the finalists."""
    every = iter([timed(ms) for ms in source_ms])
    count = []

    def measured(prepared, candidates):
        count.append(candidates)
        return next(every)

    monkeypatch.setattr(finish, "measure_all", measured)
    forgotten = []
    folder = SimpleNamespace(write_state=lambda name, value: forgotten.append((name, value)))
    prepared = SimpleNamespace(order=SimpleNamespace(goal=Goal.parse(goal)), run=SimpleNamespace(folder=folder))
    outcome = Outcome(choice=Choice(), recipe=[], seconds=1.0, source_ms=1.0)
    trial = Trial(number=0, outcome=outcome, begun=Begun(), folder=None)
    searched = finish.Searched(trials=(trial,), rows=None, learning=Learning(labels=True), spare_s=spare_s)
    result = finish._timed(prepared, [], searched)
    assert forgotten == [("latency", None)] * (len(count) - 1)  # else the stored timing would be read
    return result.source.latency_ms.median, len(count)


@pytest.mark.parametrize(
    ("source_ms", "expected"),
    [((1.1,), (1.1, 1)), ((1.6, 1.0), (1.0, 2)), ((1.6, 1.8, 1.5, 1.0), (1.5, 3))],
    ids=["as in the trials", "slower at first", "slower throughout"],
)
def test_finalists_are_timed_again_where_the_machine_was_slower_than_in_the_trials(monkeypatch, source_ms, expected):
    assert ended(monkeypatch, source_ms) == expected


def test_they_are_not_timed_again_without_time_or_where_the_goal_has_none(monkeypatch):
    assert ended(monkeypatch, (1.6, 1.0), spare_s=-1.0) == (1.6, 1)
    assert ended(monkeypatch, (1.6, 1.0), goal="minimize size_bytes") == (1.6, 1)
