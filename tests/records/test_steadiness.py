"""Which timings can be trusted, on made-up ones."""

import numpy as np
import pytest

from penjing.records import Latency, from_dict
from penjing.records.steadiness import PATIENCE, SPREAD, TURNS, between, doubt, scatters, speedup, steady_rounds


def latency(*rounds, spread=0.05, median=None):
    median = float(np.median(rounds)) if median is None else median
    return Latency(median=median, p95=median, spread=spread, batch=1, threads=1, calls=99, rounds=tuple(rounds))


QUIET = latency(10.0, 10.1, 9.9, 10.0, 10.2, 10.0, 9.9), latency(2.0, 2.02, 2.0, 1.99, 2.01, 2.0, 2.0)


def test_what_slows_both_in_the_same_round_leaves_the_speedup_as_it_is():
    slow, fast = latency(10.0, 10.0, 20.0, 30.0, 10.0), latency(2.0, 2.0, 4.0, 6.0, 2.0)
    assert speedup(slow, fast) == 5.0 and between(slow, fast) == (5.0, 5.0)
    assert doubt(slow, fast) == ""
    # the medians taken apart say something else where they fall into different rounds
    assert speedup(latency(1.0, 4.0, 4.0), latency(1.0, 1.0, 4.0)) == 1.0


def test_a_quiet_machine_passes():
    assert doubt(*QUIET) == "" and speedup(*QUIET) == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize("ms", [0.004, 0.012, 0.02])
def test_the_jitter_of_microseconds_is_no_doubt(ms):
    rounds = ms * np.array([1.0, 1.1, 0.95, 1.05, 1.0, 0.97, 1.02])
    tiny = latency(*rounds, spread=0.45)
    assert scatters(tiny) == "" and doubt(latency(*(3 * rounds)), tiny) == ""
    assert scatters(latency(*(1000 * rounds), spread=0.45))


def test_calls_that_scatter_are_told_on_either_side():
    slow, fast = QUIET
    busy = latency(*slow.rounds, spread=SPREAD + 0.2)
    assert doubt(busy, fast) == "the middle half of the calls that it is compared with spans 60 % of their median"
    assert doubt(slow, latency(*fast.rounds, spread=0.63)) == "the middle half of its calls spans 63 % of their median"


def test_a_ratio_that_changes_between_turns_is_told():
    slow = latency(5.0, 9.0, 18.0, 27.0, 6.0, 12.0, 24.0)
    text = doubt(slow, latency(*[1.0] * 7))
    assert text == "its speed-up went from 7.5× to 21× between turns"
    edge = 1 + TURNS / 2.1
    assert doubt(latency(edge, edge, 1, 2 - edge, 2 - edge), latency(1, 1, 1, 1, 1)) == ""


def test_records_without_rounds_are_read_and_divided_by_their_medians():
    old = {"median": 9.0, "p95": 9.9, "spread": 0.1, "batch": 1, "threads": 1, "calls": 50}
    slow, fast = from_dict(Latency, old), from_dict(Latency, {**old, "median": 3.0})
    assert slow.steady and slow.rounds == ()
    assert (speedup(slow, fast), between(slow, fast), doubt(slow, fast)) == (3.0, (3.0, 3.0), "")
    assert speedup(slow, latency(1.0, 2.0)) == 6.0  # and of those that were not taken together


def test_the_rounds_with_the_fewest_doubts_are_kept_and_the_latest_of_several():
    slow, fast = QUIET
    busy = latency(*fast.rounds, spread=0.9)
    assert steady_rounds([[slow, busy, busy], [slow, fast, busy], [slow, busy, busy]]) == 1
    assert steady_rounds([[slow, busy], [slow, busy]]) == 1


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """`compare` on made-up milliseconds: a function of the target's name and the number of its turn."""
    from penjing.measure import latency as module

    def run(times, names=("source", "a"), **options):
        turns = []

        class Child:
            def __init__(self, name, *_, **__):
                self.name, self.turn = name, -1

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def ready(self):
                pass

            def peak(self):
                return 2, 1

            def run(self, *, seconds, max_calls, min_calls=1, skip=0):
                if skip:  # of a turn, and not of the warm-up
                    self.turn += 1
                    turns.append(self.name)
                return [times(self.name, self.turn)] * 3

        monkeypatch.setattr(module, "Child", Child)
        monkeypatch.setattr(module, "PAUSE_S", 0.0)
        targets = [module.Target(name, tmp_path, [np.zeros(1)], 1) for name in names]
        events = []
        timings = module.compare(targets, threads=1, events=lambda kind, **e: events.append(e), **options)
        assert events[-1]["done"] == events[-1]["total"] == len(turns)
        return timings, turns

    return run


def test_quiet_timings_take_the_rounds_that_were_asked_for(timed):
    timings, turns = timed(lambda name, turn: 10.0 if name == "source" else 2.0, rounds=5, patience=PATIENCE)
    assert len(turns) == 2 * 5
    assert timings["a"].latency.steady and timings["a"].latency.doubt == ""
    assert timings["a"].latency.rounds == (2.0,) * 5 and timings["a"].latency.calls == 15


def test_a_disturbance_that_passes_is_measured_through(timed):
    def times(name, turn):
        return 10.0 * (1 + turn) if name == "source" and turn < 4 else 10.0 if name == "source" else 2.0

    timings, turns = timed(times, rounds=5, patience=PATIENCE)
    assert 2 * 5 < len(turns) < 2 * 5 * PATIENCE
    assert timings["a"].latency.steady and timings["source"].latency.steady
    assert speedup(timings["source"].latency, timings["a"].latency) == 5.0


def test_one_that_does_not_pass_is_recorded_after_three_times_the_rounds(timed):
    def times(name, turn):
        return 10.0 * (1 + 0.1 * (turn % 5)) if name == "source" else 2.0 * (1 + 0.1 * ((turn + 2) % 5))

    timings, turns = timed(times, rounds=5, patience=PATIENCE)
    assert len(turns) == 2 * 5 * PATIENCE
    assert not timings["a"].latency.steady
    assert "between turns" in timings["a"].latency.doubt
    assert len(timings["a"].latency.rounds) == 5
    assert len(timed(times, rounds=5)[1]) == 2 * 5  # without patience
