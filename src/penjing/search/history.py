"""What a search has tried, and what follows from it: the best so far, what fails, and what to believe of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from penjing.goals import judging as goals
from penjing.goals.goal import Goal
from penjing.pipeline.building import INTEGER
from penjing.records import Candidate
from penjing.records.search import SearchRow, TrialRow
from penjing.search.beliefs import USUAL_EPOCHS, Beliefs, Observation
from penjing.search.choice import Choice
from penjing.search.failures import Failures
from penjing.search.promise import Aim, as_floats
from penjing.search.trial import Begun, Outcome, read


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that ended.

    Attributes:
        number: Of the study.
        outcome: What it gave.
        begun: What was known when it began.
        folder: Where it lies.
    """

    number: int
    outcome: Outcome
    begun: Begun
    folder: Path

    @property
    def offered(self) -> tuple[Candidate, ...]:
        """Its artifacts but those that were rejected."""
        return tuple(c for c in self.outcome.candidates if c.rejection is None)

    @property
    def failure(self) -> str:
        """Why it gave nothing, in one line; "" where it did."""
        if self.offered or self.outcome.failure:
            return self.outcome.failure
        reasons = [f"{c.name} was rejected: {c.rejection.reason}" for c in self.outcome.candidates if c.rejection]
        return "; ".join(reasons) or "no artifact could be built"

    @classmethod
    def read(cls, folder: Path, number: int) -> Trial | None:
        """The trial in a folder; None where it has not ended."""
        outcome = read(folder)
        return None if outcome is None else cls(number=number, outcome=outcome, begun=Begun.read(folder), folder=folder)


class History:
    """Trials that ended, in the order of their numbers."""

    def __init__(self, goal: Goal, aim: Aim, usual: float = USUAL_EPOCHS) -> None:
        self.goal, self.aim, self.usual = goal, aim, usual
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        """One that ended."""
        self.trials = sorted([*self.trials, trial], key=lambda t: t.number)

    @property
    def best(self) -> float:
        """The objective of the best artifact that meets the goal; where none does, of the network as it is."""
        every = [c for t in self.trials for c in t.offered]
        meeting = [v for c in every if c.met and (v := self.aim.value(c))]
        plain = [v for c in (self.trials[0].outcome.candidates if self.trials else ()) if (v := self.aim.value(c))]
        values = meeting or plain or [1.0]
        return min(values) if self.aim.sign > 0 else max(values)

    @property
    def met(self) -> bool:
        """Whether an artifact meets the goal."""
        return any(c.met for t in self.trials for c in t.offered)

    @property
    def excess(self) -> float:
        """How far beyond the limits the nearest artifact is; 0 where one meets the goal."""
        if self.met:
            return 0.0
        return min((self.aim.excess(o.figures) for t in self.trials for o in self._observed(t)), default=0.0)

    def best_of(self, trial: Trial) -> Candidate | None:
        """The artifact of a trial that the goal would choose."""
        chosen = goals.choose(self.goal, trial.outcome.candidates).chosen
        return next((c for c in trial.outcome.candidates if c.name == chosen and c.rejection is None), None)

    def failures(self) -> Failures:
        """What failed: trials with an error, and those whose artifacts were all rejected."""
        failed = [t.outcome.choice for t in self.trials if not t.offered]
        return Failures(failed, [t.outcome.choice for t in self.trials if t.offered])

    def beliefs(self, running: Iterable[Choice] = ()) -> Beliefs:
        """What is to be expected; trials in progress count as if they gave what is expected of them."""
        known = Beliefs([o for t in self.trials for o in self._observed(t)], self.aim.floor, self.usual)
        imagined = [o for choice in running for o in known.imagined(choice)]
        return Beliefs([*known.observations, *imagined], self.aim.floor, self.usual) if imagined else known

    def _observed(self, trial: Trial) -> list[Observation]:
        """The artifacts of a trial; latencies as if the source took what it took in the first trial."""
        reference = next((t.outcome.source_ms for t in self.trials if t.outcome.source_ms), None)
        drift = reference / trial.outcome.source_ms if reference and trial.outcome.source_ms else 1.0
        rows = []
        for c in trial.outcome.candidates:
            if c.rejection is not None:
                continue
            figures = {name: value for name, value in goals.figures(c).items() if value is not None}
            if "latency_ms" in figures:
                figures["latency_ms"] *= drift
            if "drop" in figures:
                figures["drop"] /= self.aim.scale
            choice = trial.outcome.choice
            seen = choice if c.precision in INTEGER else as_floats(choice)
            rows.append(Observation(choice=seen, artifact=c.name, figures=figures))
        return rows

    def rows(self, stopped: str) -> SearchRow:
        """All trials as the record tells them."""
        return SearchRow(trials=tuple(map(self._row, self.trials)), objective=self.goal.objective()[0], stopped=stopped)

    def _row(self, trial: Trial) -> TrialRow:
        best, outcome = self.best_of(trial), trial.outcome
        return TrialRow(
            number=trial.number,
            words=outcome.choice.words(),
            recipe=outcome.recipe,
            training=outcome.choice.epochs > 0,
            began_s=round(trial.begun.began_s, 1),
            seconds=outcome.seconds,
            predicted=trial.begun.predicted.get(best.name, {}) if best else {},
            measured={n: v for n, v in goals.figures(best).items() if v is not None} if best else {},
            best=best.name if best else "",
            met=best is not None and best.met,
            failure=trial.failure,
        )
