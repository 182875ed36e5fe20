"""What a search has tried, and what follows from it: the best so far, what fails, and what to believe of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from penjing.goals import goal as goals
from penjing.goals.goal import Goal
from penjing.pipeline.building import INTEGER
from penjing.records import Candidate
from penjing.records.search import SearchRow, TrialRow
from penjing.search.beliefs import Beliefs, Observation
from penjing.search.choice import Choice
from penjing.search.promise import Wanted, as_floats
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

    @classmethod
    def read(cls, folder: Path, number: int) -> Trial | None:
        """The trial in a folder; None where it has not ended."""
        outcome = read(folder)
        return None if outcome is None else cls(number=number, outcome=outcome, begun=Begun.read(folder), folder=folder)


class History:
    """Trials that ended, in the order of their numbers."""

    def __init__(self, goal: Goal, wanted: Wanted) -> None:
        self.goal, self.wanted = goal, wanted
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        """One that ended."""
        self.trials = sorted([*self.trials, trial], key=lambda t: t.number)

    @property
    def best(self) -> float:
        """The objective of the best artifact that meets the goal; where none does, of the network as it is."""
        every = [c for t in self.trials for c in t.outcome.candidates if c.rejection is None]
        meeting = [v for c in every if c.met and (v := self.wanted.value(c))]
        plain = [v for c in (self.trials[0].outcome.candidates if self.trials else ()) if (v := self.wanted.value(c))]
        values = meeting or plain or [1.0]
        return min(values) if self.wanted.sign > 0 else max(values)

    def best_of(self, trial: Trial) -> Candidate | None:
        """The artifact of a trial that the goal would choose."""
        chosen = goals.choose(self.goal, trial.outcome.candidates).chosen
        return next((c for c in trial.outcome.candidates if c.name == chosen and c.rejection is None), None)

    def fails(self, choice: Choice) -> bool:
        """Whether a choice will fail as another did: one that removes as much or more of the same."""
        if not choice.structural:
            return False
        failed = [t.outcome.choice for t in self.trials if t.outcome.failure and t.outcome.choice.structural]
        worked = {_structure(t.outcome.choice) for t in self.trials if not t.outcome.failure}
        return any(
            other.technique == choice.technique and choice.keep <= other.keep and choice.blocks >= other.blocks
            for other in failed
            if _structure(other) not in worked
        )

    def beliefs(self, running: Iterable[Choice] = ()) -> Beliefs:
        """What is to be expected; trials in progress count as if they gave what is expected of them."""
        known = Beliefs([o for t in self.trials for o in self._observed(t)])
        imagined = [o for choice in running for o in known.imagined(choice)]
        return Beliefs([*known.observations, *imagined]) if imagined else known

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
                figures["drop"] /= self.wanted.scale
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
            predicted=trial.begun.predicted,
            measured={n: v for n, v in goals.figures(best).items() if v is not None} if best else {},
            best=best.name if best else "",
            met=best is not None and best.met,
            failure=outcome.failure,
        )


def _structure(choice: Choice) -> tuple[str, float, int]:
    return choice.technique, choice.keep, choice.blocks
