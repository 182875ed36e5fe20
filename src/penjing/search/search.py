"""The search: trials that take seconds first, then the worthiest choice again and again, until the budget is spent."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from penjing.errors import UsageError
from penjing.goals import judging as goals
from penjing.measure import time_limits
from penjing.pipeline import picking
from penjing.pipeline.compress import Result, pretrained_folder
from penjing.pipeline.order import Order
from penjing.pipeline.prepare import Prepared, prepare
from penjing.recipes.recipe import Recipe
from penjing.records import Record
from penjing.records.files import write_text
from penjing.records.folder import SEARCH, STUDY, RunFolder
from penjing.records.lock import locked
from penjing.records.search import SearchRow
from penjing.search import finish
from penjing.search.budget import Clock, OutOfTime, Paces, paces
from penjing.search.choice import Choice
from penjing.search.cluster import OnRay
from penjing.search.history import History, Trial
from penjing.search.probing import epoch_seconds
from penjing.search.promise import Aim, Promise, expected, promises
from penjing.search.space import space
from penjing.search.study import Study, check_study
from penjing.search.trial import Begun
from penjing.search.workers import Here, Workers
from penjing.tasks.task import calibration_calls
from penjing.train import cluster

FIRST_LOOKS = 0.3  # of the time: for trials without training
WORTH = 0.01  # an improvement below this share of the objective is none
LIKELY = 0.02  # a smaller probability of meeting the goal is none
NEARER = 0.05  # of the distance to limits that nothing keeps: what is expected to save less is not tried for it
PATIENCE = 2  # choices in a row that promise less: then the search has converged
SUGGESTED = 24  # choices that Optuna's sampler adds to those of the space
CHEAPER = 0.25  # the power of a trial's seconds that its worth is divided by
FIXED_S = 30.0  # seconds that all trials count more, so that those of a few seconds are not overrated


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a search ends, beside its convergence.

    Attributes:
        minutes: Until the artifact is there, within a fifth.
        trials: Number of trials.
        study: The URL of a database for the study; None keeps it in the run folder.
        cluster: Where trials run: "auto" starts Ray on this machine, else an address that `ray.init` takes; None is
            this process.

    Raises:
        UsageError: A number makes no sense.
    """

    minutes: float | None = None
    trials: int | None = None
    study: str | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError("a search takes some minutes", code="minutes", got=self.minutes, expected="above 0")
        if self.trials is not None and (isinstance(self.trials, bool) or self.trials < 1):
            raise UsageError("a search takes some trials", code="trials", got=self.trials, expected="1 or more")

    def check_reachable(self) -> None:
        """Raise what the study or the cluster would fail at, before anything is computed."""
        check_study(self.study)
        if self.cluster is not None:
            cluster.ray()
            cluster.answers(self.cluster)

    def exceeds(self, before: SearchRow) -> bool:
        """Whether it gives more minutes or trials than a search had that came to its end."""
        minutes = before.seconds / 60 if before.minutes is None else before.minutes
        trials = len(before.trials) if before.most is None else before.most
        return (self.minutes or 0) > minutes or (self.trials or 0) > trials


def search(order: Order, budget: Budget, out: Path | str, *, resume: bool, force: bool) -> Result:
    """Search for the artifact that meets a goal best.

    Args:
        order: The request; its recipe is not used.
        budget: When to stop.
        out: The run folder.
        resume: Go on with the search in `out`; finished trials are not repeated.
        force: Replace what is in `out`.

    Raises:
        PenjingError: The request, the data, the study or the folder do not fit; or every trial failed, with the first
            failure.
    """
    clock = Clock(budget.minutes)
    with locked(out):
        folder = RunFolder(out, resume=resume, force=force)
        try:
            opened_from = pretrained_folder(order)
            budget.check_reachable()
            asked = replace(order, recipe=Recipe(), searches=True)
            prepared = prepare(asked, folder)
            if isinstance(prepared, Record):
                before = prepared
                if before.search is None or not budget.exceeds(before.search):
                    return Result(before, folder.path, opened_from)
                folder.reopen()
                prepared = prepare(asked, folder)
                assert not isinstance(prepared, Record)
                folder.write_state("search-seconds", before.search.seconds)
            names = picking.picked(prepared)
            prepared = replace(prepared, order=replace(prepared.order, runtimes=names, auto=False))
            workers = Here(prepared, clock) if budget.cluster is None else OnRay(prepared, clock, budget.cluster)
            with workers:
                done = Search(prepared, budget, clock, workers).run()
            return Result(finish.deliver(prepared, done), folder.path, opened_from)
        finally:
            time_limits.expect_nothing()


class Search:
    """A search in progress."""

    def __init__(self, prepared: Prepared, budget: Budget, clock: Clock, workers: Workers) -> None:
        self.prepared, self.budget, self.clock, self.workers = prepared, budget, clock, workers
        self.events, self.goal = prepared.run.events, prepared.order.goal
        self.space = space(prepared)
        self.aim = Aim.of(self.goal, prepared.beside[prepared.looked_at])
        self.history = History(self.goal, self.aim, self.space.usual_epochs)
        self.folder = prepared.run.folder.path / SEARCH
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        asked = {
            "weights": prepared.run.folder.read_state("request")["weights"],
            "goal": self.goal.text(),
            "runtimes": list(prepared.order.runtimes),
            "data": prepared.data,
            "seed": prepared.order.seed,
        }
        url = budget.study or f"sqlite:///{(self.folder / STUDY).absolute()}"
        own = budget.study is None
        self.study = Study(url, asked, self._axes(), self.space, prepared.order.seed, run=self._identity(), own=own)
        self.running: dict[int, Choice] = {}
        self.plan: list[Choice] = []
        self.poor, self.epoch_s = 0, -1.0

    def run(self) -> finish.Searched:
        """Go round until the budget is spent."""
        self.plan = self._first_looks()
        try:
            self._take_up()
            self._tell_plan()
            stopped = self._rounds()
        except OutOfTime:
            stopped = f"the {self.budget.minutes:g} minutes are over; a trial was broken off"
        trials = self.history.trials
        if not any(trial.outcome.candidates for trial in trials):
            raise finish.failed(trials)
        rows = replace(self.history.rows(stopped), notes=self.space.notes, study=self.study.shown_url)
        rows = replace(rows, seconds=round(self.clock.spent, 1), minutes=self.budget.minutes)
        rows = replace(rows, most=self.budget.trials)
        spare = self.clock.spare
        return finish.Searched(trials=tuple(trials), rows=rows, learning=self.space.learning, spare_s=spare)

    def _rounds(self) -> str:
        while True:
            stopped = ""
            while not stopped and len(self.running) < self.workers.count:
                choice, stopped = self._next()
                if choice is not None:
                    self._begin(self.study.begin(choice), choice)
            if not self.running:
                return stopped
            self._took(self.workers.wait())

    def _axes(self) -> list[tuple[str, int]]:
        axes = [self.goal.objective(), *((m.figure, 1 if m.op == "<=" else -1) for m in self.goal.all_limits())]
        return list(dict(axes).items())

    def _take_up(self) -> None:
        """Take up what an interrupted search had; its unfinished trials go on first."""
        damaged = []
        for number, choice in self.study.ended():
            if (trial := Trial.read(self._place(number), number)) is not None:
                self._add(trial)
            else:
                self.prepared.run.warn(f"what trial {number} gave can't be read; it is carried out again")
                damaged.append((number, choice))
        self.clock.before = self.prepared.run.folder.read_state("search-seconds") or 0.0
        for number, choice in [*damaged, *self.study.begun()]:
            if len(self.running) >= self.workers.count:
                self._took(self.workers.wait())
            self._begin(number, choice)

    def _identity(self) -> str:
        """Of this search among those of a study that several share."""
        path = self.folder / "run"
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        return path.read_text()

    def _first_looks(self) -> list[Choice]:
        """The network as it is, its integers, a few structures without training, and integers of few bits."""
        first = [Choice(), Choice(integers="rounded" if "rounded" in self.space.integers else "none")]
        few = [replace(first[1], weight_bits=bits) for bits in self.space.weight_bits[1:]]
        packed = any(figure == "packed_bytes" for figure, _ in self._axes())  # runtimes store them in 8 bits
        return list(dict.fromkeys([*first, *(few if packed else []), *self.space.structures()]))

    def _tell_plan(self) -> None:
        """What is tried first, and how long each takes, before it begins."""
        pace = self._paces()
        plan = [{"words": c.words(), "expected_s": round(pace.seconds(c))} for c in self._affordable_looks(pace)]
        trained = next((c for c in self.space if c.epochs), None)
        self.events(
            "search", plan=plan, study=self.study.shown_url, notes=list(self.space.notes),
            epoch_s=round(pace.epoch, 1) if trained is not None else None,
        )  # fmt: skip

    def _affordable_looks(self, pace: Paces) -> list[Choice]:
        """The first looks that were not begun and fit into the budget, as far as that is known."""
        begun, looks, end = self._begun(), list[Choice](), self.clock.spent
        over = self.clock.spent + self.clock.left
        for place, choice in enumerate(self.plan):
            fits = place == 0 or (end < over if place == 1 else end + pace.seconds(choice) <= self._late)
            if choice in begun or not fits:
                continue
            if self.budget.trials is not None and len(begun) + len(looks) >= self.budget.trials:
                break
            looks.append(choice)
            end += pace.seconds(choice)
        return looks

    @property
    def _late(self) -> float:
        """Seconds from the beginning after which no more first looks end."""
        return FIRST_LOOKS * 60 * (self.clock.minutes or math.inf)

    def _next(self) -> tuple[Choice | None, str]:
        """The next choice, or why there is none."""
        if self.budget.trials is not None and len(self._begun()) >= self.budget.trials:
            return None, f"{self.budget.trials} trials are done"
        if self.clock.left <= 0 and self._has_begun():
            return None, f"the {self.budget.minutes:g} minutes are over"
        begun = self._begun()
        first = self.plan[:2]
        for choice in first:
            if choice not in begun:
                return choice, ""
        if any(choice in self.running.values() for choice in first):
            return None, "the first trials are not over"
        looks, failures = self._paces(), self.history.failures()
        for choice in self.plan[2:]:
            if (
                choice not in begun
                and not failures.expects(choice)
                and self.clock.spent + looks.seconds(choice) <= self._late
            ):
                return choice, ""
        return self._worthiest(begun)

    def _worthiest(self, begun: set[Choice]) -> tuple[Choice | None, str]:
        """The choice that promises most, or why nothing more is tried."""
        pace = self._paces()
        every = dict.fromkeys([*self.space, *self.study.suggested(SUGGESTED)])
        failures = self.history.failures()
        choices = [c for c in every if c not in begun and not failures.expects(c)]
        affordable = [c for c in choices if pace.seconds(c) <= self.clock.left]
        if not affordable:
            return None, "no choice that is left fits into the time" if choices else "every choice was tried"
        ranked = promises(self.history.beliefs(self.running.values()), self.aim, affordable, self.history.best)
        if not ranked:
            return None, "nothing is known that could be improved"
        best = max(ranked, key=lambda p: self._value(p) / (FIXED_S + pace.seconds(p.choice)) ** CHEAPER)
        if not self.history.met and self._value(best) >= LIKELY:
            return best.choice, ""
        near, beyond = min(ranked, key=lambda p: p.excess), self.history.excess
        if ranked[0].worth < WORTH and math.log((1 + beyond) / (1 + near.excess)) > NEARER:
            return near.choice, ""  # the goal is out of reach: at least nearer to it
        self.poor = self.poor + 1 if ranked[0].worth < WORTH else 0
        if self.poor >= PATIENCE:
            return None, f"converged: no choice promises more than {WORTH:.0%} of the objective"
        return best.choice, ""

    def _value(self, promised: Promise) -> float:
        """What a trial is wanted for: an artifact that meets the goal, and then a better one."""
        return promised.worth if self.history.met else promised.meets

    def _has_begun(self) -> bool:
        """Whether there is an artifact, or one is being made: short minutes give the network as it is."""
        return self.clock.has_result or bool(self.running) or len(self.history.trials) >= PATIENCE

    def _begun(self) -> set[Choice]:
        return {trial.outcome.choice for trial in self.history.trials} | set(self.running.values())

    def _begin(self, number: int, choice: Choice) -> None:
        """Begin a trial, or go on with one that was interrupted."""
        place = self._place(number)
        known = self.history.beliefs(self.running.values())
        Begun(began_s=self.clock.spent, predicted=expected(known, self.aim, choice)).write(place)
        left = None if self.clock.minutes is None else max(0, round(self.clock.left))
        seconds = round(self._paces().seconds(choice))
        self.events("trial", number=number, words=choice.words(), expected_s=seconds, left_s=left)
        self.running[number] = choice
        self.workers.submit(number, choice, self.space.learning, place)

    def _took(self, number: int) -> None:
        """Take in a trial that ended."""
        trial = Trial.read(self._place(number), number)
        assert trial is not None  # the workers wait for that file
        self._add(trial)
        del self.running[number]
        self.clock.reserve = max(self.clock.reserve, finish.expected_seconds(self.prepared, self.history.trials))
        best, outcome = self.history.best_of(trial), trial.outcome
        figures = goals.figures(best) if best is not None else None
        notes = {"seconds": outcome.seconds, "artifact": best.name if best else "", "failure": trial.failure}
        self.study.end(number, figures, notes)
        self.prepared.run.folder.write_state("search-seconds", self.clock.spent)
        self.events(
            "tried", number=number, words=outcome.choice.words(), met=best is not None and best.met,
            figures={n: v for n, v in (figures or {}).items() if v is not None},
            predicted=trial.begun.predicted.get(best.name, {}) if best is not None else {},
            failure=trial.failure, seconds=outcome.seconds, asked=[figure for figure, _ in self._axes()],
        )  # fmt: skip

    def _add(self, trial: Trial) -> None:
        self.history.add(trial)
        self.clock.has_result |= bool(trial.offered)

    def _place(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def _paces(self) -> Paces:
        if self.epoch_s < 0:
            self.epoch_s = self._probed() if self.space.epochs else 0.0
        ended = [(t.outcome.choice, t.outcome.seconds) for t in self.history.trials if not t.outcome.failure]
        return paces(ended, self.epoch_s)

    def _probed(self) -> float:
        """Seconds of a pass over the data that trains; kept, so that a resumed search plans alike."""
        folder = self.prepared.run.folder
        if (stored := folder.read_state("epoch-seconds")) is not None:
            return float(stored)
        task = self.prepared.run.task
        labels = self.space.learning.labels
        data = task.train if labels else list(calibration_calls(task))
        seconds = epoch_seconds(self.prepared.run.network, data or (), labels)
        folder.write_state("epoch-seconds", seconds)
        return seconds
