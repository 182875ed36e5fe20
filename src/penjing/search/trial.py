"""One trial: a choice carried out from the recipe to measured artifacts, in a run folder of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from penjing.errors import RecordError
from penjing.goals.goal import needs_timing
from penjing.pipeline.building import INTEGER
from penjing.pipeline.candidates import build
from penjing.pipeline.judging import judged
from penjing.pipeline.prepare import Prepared, again
from penjing.pipeline.run import ends_run
from penjing.pipeline.timing import Timed, measure_all
from penjing.recipes.recipe import Recipe
from penjing.records import Candidate, from_dict, to_json
from penjing.records.files import write_text
from penjing.records.folder import RunFolder
from penjing.records.lock import locked
from penjing.records.reading import json_file
from penjing.search.choice import Choice

RUN, OUTCOME, BEGUN, SPENT = "run", "trial.json", "begun.json", "seconds.json"
_Read = TypeVar("_Read")
SECONDS = 0.3  # of timing for each artifact; the best ones are timed again at the end, side by side


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        choice: What was tried.
        recipe: Its steps as plain data.
        candidates: Its artifacts with all figures, rejected ones among them; none where it failed.
        seconds: That it took.
        failure: Why it gave nothing, in one line; "" where it did.
        source_ms: The source's latency beside them; None where nothing was timed.
    """

    choice: Choice
    recipe: list[dict[str, Any]]
    candidates: tuple[Candidate, ...] = ()
    seconds: float
    failure: str = ""
    source_ms: float | None = None
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What was known when a trial began.

    Attributes:
        began_s: Seconds from the beginning of the search.
        predicted: Figures that were expected of every artifact, by its name and theirs.
    """

    began_s: float = 0.0
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Keep it in the trial's folder, unless it was begun before."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / BEGUN).exists():
            write_text(folder / BEGUN, to_json(self))

    @classmethod
    def read(cls, folder: Path) -> Begun:
        """Of the trial in a folder."""
        return _stored(folder / BEGUN, lambda data: from_dict(cls, data)) or cls()


def carry_out(prepared: Prepared, choice: Choice, recipe: Recipe, folder: Path) -> Outcome:
    """Carry a trial out, or read how it ended; one that was interrupted goes on where it was.

    What a recipe, an exporter or a runtime fails at is the outcome of the trial. What would fail in every trial (the
    disk, the folder) is raised.
    """
    if (stored := read(folder)) is not None:
        return stored
    start, spent = time.monotonic(), _spent(folder)
    try:
        with locked(folder / RUN):
            mine = again(prepared, recipe, RunFolder(folder / RUN, resume=True), seconds=SECONDS)
            precisions = _precisions(prepared, choice)
            mine = replace(mine, order=replace(mine.order, precisions=precisions))
            try:
                candidates = build(mine)
                timed = _timed(mine, candidates)
            finally:
                write_text(folder / SPENT, json.dumps(spent + time.monotonic() - start))
        metric = prepared.beside[prepared.looked_at]
        done = Outcome(
            choice=choice,
            recipe=mine.recipe_data,
            candidates=tuple(judged(c, prepared.order.goal, metric, mine.run.task) for c in timed.candidates),
            seconds=round(spent + time.monotonic() - start, 3),
            source_ms=None if timed.source.latency_ms is None else timed.source.latency_ms.median,
            warnings=tuple(mine.run.warnings),
        )
    except Exception as error:  # steps, exporters and runtimes have exceptions of their own
        if ends_run(error):
            raise
        failure = " ".join(str(error).split())[:600] or type(error).__name__
        done = Outcome(
            choice=choice, recipe=recipe.to_data(), seconds=round(time.monotonic() - start, 3), failure=failure
        )
    write_text(folder / OUTCOME, to_json(done))
    return done


def _timed(prepared: Prepared, candidates: tuple[Candidate, ...]) -> Timed:
    """The candidates with their latencies, where the goal asks for any; the finalists are timed in every case."""
    if needs_timing(prepared.order.goal):
        return measure_all(prepared, candidates, with_floors=False)
    return Timed(source=prepared.source, candidates=candidates, floors={})


def give_up(folder: Path, choice: Choice, recipe: Recipe, failure: str) -> None:
    """Write that a trial failed which nobody could carry out."""
    done = Outcome(choice=choice, recipe=recipe.to_data(), seconds=_spent(folder), failure=failure[:600])
    write_text(folder / OUTCOME, to_json(done))


def read(folder: Path) -> Outcome | None:
    """How the trial in a folder ended; None where it has not, or where that can't be read."""
    return _stored(folder / OUTCOME, lambda data: from_dict(Outcome, data))


def _precisions(prepared: Prepared, choice: Choice) -> tuple[str, ...]:
    """Those that a choice is about: integers where it makes any."""
    names = prepared.order.runtimes
    every = dict.fromkeys(p for name in names for p in prepared.run.capabilities(name).precisions)
    return tuple(p for p in every if (p in INTEGER) == (choice.integers != "none"))


def _spent(folder: Path) -> float:
    """Seconds that an interrupted trial took before."""
    return _stored(folder / SPENT, float) or 0.0


def _stored(path: Path, opened: Callable[[Any], _Read]) -> _Read | None:
    """What a file of a trial holds; None where it is missing or damaged: a trial can always be carried out again."""
    try:
        return opened(json_file(path, finite=False))
    except (FileNotFoundError, ValueError, TypeError, RecordError):
        return None
