"""The end of a search: its best artifacts are timed side by side, one is chosen, and it is delivered as of a run."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penjing.errors import PenjingError, RecordError
from penjing.goals import judging as goals
from penjing.goals.goal import needs_timing
from penjing.pipeline.delivery import deliver as deliver_all
from penjing.pipeline.judging import READS, final, judge, judged
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.timing import Timed, measure_all
from penjing.records import Candidate, Record
from penjing.records.folder import CANDIDATES, STATE, replacing
from penjing.records.search import SearchRow
from penjing.search.choice import Learning, recipe
from penjing.search.history import Trial
from penjing.search.trial import RUN

FINALISTS = 6  # artifacts that are timed side by side at most
START_S = 3.0  # of a process with a runtime
SLOWER = 1.15  # times as long as in the trials: then the machine is busy, and the finalists are timed again
AGAIN = 2


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search leaves to choose from.

    Attributes:
        trials: All that ended.
        rows: What the record tells of them.
        learning: How trainings went.
        spare_s: Seconds that the end may take beyond those that were kept back for it.
    """

    trials: tuple[Trial, ...]
    rows: SearchRow
    learning: Learning
    spare_s: float = math.inf


def expected_seconds(prepared: Prepared, trials: Sequence[Trial]) -> float:
    """Seconds that the end will take: finalists are timed, some read by `evaluate`, the chosen one is written."""
    artifacts = min(FINALISTS, sum(len(t.outcome.candidates) for t in trials)) + 1
    reads = READS if prepared.looked_at == "select" else 0
    reading = next((cost.wall_s for cost in prepared.run.costs if cost.name == "evaluate source"), 0.0)
    return 5.0 + artifacts * (prepared.order.bench.seconds + START_S) + reads * reading


def failed(trials: Sequence[Trial]) -> PenjingError:
    """The error of a search in which every trial failed: the first cause."""
    first = min(trials, key=lambda t: t.number)
    return RecordError(
        "every trial of the search failed",
        code="all-failed",
        got=f"trial {first.number} ({first.outcome.choice.words()}): {first.outcome.failure}",
        expected="a network that a runtime takes",
        remedy="penjing inspect --runtime all names the operators that runtimes lack",
    )


def deliver(prepared: Prepared, searched: Searched) -> Record:
    """Time the finalists side by side, choose, and deliver the chosen one with the whole search in its record."""
    run = prepared.run
    finalists = _finalists(prepared, searched.trials)
    if not {candidate.name for _, candidate in finalists} <= set(run.folder.read_state("latency") or ()):
        run.folder.write_state("latency", None)  # of an end that was interrupted, after which more was tried
    with run.costing("choose among the finalists"):
        for trial, candidate in finalists:
            _bring(prepared, trial, candidate)
        timed = _timed(prepared, [candidate for _, candidate in finalists], searched)
    _, verdict, _ = final(prepared, _judged(prepared, timed))
    trial = next(t for t, c in finalists if c.name == verdict.chosen)
    chosen = prepared_for(prepared, trial, searched)
    rows = replace(searched.rows, chosen=trial.number)
    return deliver_all(replace(chosen, search=rows), judge(chosen, timed))


def _timed(prepared: Prepared, candidates: list[Candidate], searched: Searched) -> Timed:
    """The finalists' timings; again where the source was slower than in the trials and time is left.

    A limit in milliseconds that trials kept would be missed for the machine's sake.
    """
    usual = [t.outcome.source_ms for t in searched.trials if t.outcome.source_ms]
    spare, start = searched.spare_s, time.monotonic()
    timed = measure_all(prepared, candidates)
    for _ in range(AGAIN if usual and needs_timing(prepared.order.goal) else 0):
        each = time.monotonic() - start
        if _source_ms(timed) <= SLOWER * statistics.median(usual) or each > spare:
            break
        start, spare = time.monotonic(), spare - each
        prepared.run.folder.write_state("latency", None)
        timed = min(timed, measure_all(prepared, candidates), key=_source_ms)
    return timed


def _source_ms(timed: Timed) -> float:
    return 0.0 if timed.source.latency_ms is None else timed.source.latency_ms.median


def _judged(prepared: Prepared, timed: Timed) -> list[Candidate]:
    metric = prepared.beside[prepared.looked_at]
    return [judged(c, prepared.order.goal, metric, prepared.run.task) for c in timed.candidates]


def _finalists(prepared: Prepared, trials: Sequence[Trial]) -> list[tuple[Trial, Candidate]]:
    """The Pareto set of all artifacts, those that meet the goal first; each under a name of its own."""
    goal = prepared.order.goal
    every = {f"{c.name}@{t.number}": (t, c) for t in trials for c in t.outcome.candidates}
    named = [replace(c, name=name, folder=f"{CANDIDATES}/{name}") for name, (_, c) in every.items()]
    offered = [c for c in named if c.rejection is None]
    best = goals.choose(goal, named).chosen
    front = [c for name in goals.pareto(goal, offered) for c in offered if c.name == name]
    front.sort(key=lambda c: (c.name != best, not c.met))
    first = front or [c for c in named if c.name == best]
    return [(every[c.name][0], c) for c in first[:FINALISTS]]


def _bring(prepared: Prepared, trial: Trial, candidate: Candidate) -> None:
    """Put a finalist's files, and what its data were, into the run."""
    run, own = prepared.run, candidate.name.rpartition("@")[0]
    place = run.folder.path / candidate.folder
    if not place.exists():
        with replacing(place) as aside:
            shutil.copytree(trial.folder / RUN / CANDIDATES / own, aside, dirs_exist_ok=True, copy_function=_linked)
    shown = trial.folder / RUN / STATE / f"shown-{own}.json"
    if shown.exists():
        shutil.copyfile(shown, run.folder.path / STATE / f"shown-{candidate.name}.json")


def _linked(file: str, other: str) -> None:
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def prepared_for(prepared: Prepared, trial: Trial, searched: Searched) -> Prepared:
    """The run with the chosen trial's recipe, and with the drafts that its steps left."""
    steps = recipe(trial.outcome.choice, searched.learning)
    state = prepared.run.folder.path / STATE
    for left in sorted((trial.folder / RUN / STATE).iterdir()):
        if left.is_dir() and not (state / left.name).exists():
            shutil.copytree(left, state / left.name)
    order = replace(prepared.order, recipe=steps)
    return replace(prepared, order=order, recipe=steps, recipe_data=trial.outcome.recipe)
