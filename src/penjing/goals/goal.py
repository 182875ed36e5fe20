"""The goal of a run, as text or as a value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from penjing.errors import GoalError
from penjing.goals.text import EXAMPLE, checked, clauses, exact, nearest, of_the_metric, pointed
from penjing.records.figures import FIGURES

DEFAULT_OBJECTIVE = "size_bytes"
_SLACK = 1e-9  # 0.93 - 0.92 is 0.010000000000000009: a limit must not fail by the last bits of a subtraction
TIMED = {name for name, figure in FIGURES.items() if figure.unit in ("ms", "/s")}
_DROP_FIELDS = {"drop": "max_drop", "relative_drop": "max_relative_drop"}


@dataclass(frozen=True)
class Limit:
    """A bound on one figure: ``Limit("latency_ms", "<=", 5.0)``. Shares are fractions: 1% is 0.01.

    Raises:
        GoalError: The figure, the comparison or the value makes no sense.
    """

    figure: str
    op: str
    value: float

    def __post_init__(self) -> None:
        _known(self.figure)
        if self.op not in ("<=", ">="):
            raise GoalError(
                "the comparison of a limit is unknown", code="comparison", got=repr(self.op), expected="<= or >="
            )
        object.__setattr__(self, "value", checked(self.figure, self.value))

    def text(self) -> str:
        """As written in a goal: ``drop<=1%``."""
        return f"{self.figure}{self.op}{exact(self.figure, self.value)}"

    def excess(self, value: float) -> float:
        """How far a figure is beyond the limit, in its own unit; 0 within it, or beyond it by a rounding error."""
        beyond = value - self.value if self.op == "<=" else self.value - value
        return beyond if beyond > _SLACK * max(1.0, abs(self.value)) else 0.0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal of a run: at most one objective, and limits.

    `drop` is the absolute change for the worse in the metric's own unit (1% is 0.01: from 0.93 to 0.92);
    `relative_drop` is that change divided by the source's metric.

    Attributes:
        minimize: The figure to make small, for example "latency_ms".
        maximize: The figure to make large: "throughput_per_s" or "metric".
        max_drop: Largest `drop`; 0.01 is 1%.
        max_relative_drop: Largest `relative_drop`; 0.01 is 1% of the source's metric.
        limits: Bounds on other figures.

    Without an objective, the smallest file that keeps the limits wins.

    Raises:
        GoalError: It names no known figure, contradicts itself, or asks for nothing.

    >>> Goal(minimize="latency_ms", max_drop=0.01).text()
    'drop<=1%, minimize latency_ms'
    """

    minimize: str | None = None
    maximize: str | None = None
    max_drop: float | None = None
    max_relative_drop: float | None = None
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        for figure, field in _DROP_FIELDS.items():
            if getattr(self, field) is not None:
                object.__setattr__(self, field, checked(figure, getattr(self, field)))
        limits: list[Limit] = []
        for limit in self.limits:
            field = _DROP_FIELDS.get(limit.figure, "") if limit.op == "<=" else ""
            taken = getattr(self, field) is not None if field else any(_same(limit, other) for other in limits)
            if taken:
                raise _twice(f"{limit.figure}{limit.op}")
            if field:  # it has a field of its own, so that equal goals are equal values
                object.__setattr__(self, field, limit.value)
            else:
                limits.append(limit)
        object.__setattr__(self, "limits", tuple(limits))
        _check_possible(self.all_limits())
        if self.minimize is not None and self.maximize is not None:
            raise _two_objectives(f"minimize {self.minimize} and maximize {self.maximize}")
        if self.minimize is not None:
            _check_objective("minimize", self.minimize)
        elif self.maximize is not None:
            _check_objective("maximize", self.maximize)
        elif not self.all_limits():
            raise GoalError(
                "the goal asks for nothing", code="empty", got="no clause", expected=f"for example {EXAMPLE}"
            )

    @classmethod
    def parse(cls, text: str) -> Goal:
        """A goal in words: ``"latency_ms<=5, drop<=1%, minimize size_bytes"``.

        Values take units: % for metric, drop and relative_drop; B, KB, KiB, MB, MiB, GB, GiB (and k, M, G) for bytes;
        k, M, G for parameters and macs; us, ms, s for latency; uJ, mJ, J for energy. Without one, a value is in the
        unit that its figure's name says, and drop is a fraction.

        Raises:
            GoalError: Points at the word that can't be read.

        >>> Goal.parse("drop<=0.5%, size_bytes<=2MB").max_drop
        0.005
        """
        objective: dict[str, str] = {}
        limits: list[Limit] = []
        for clause in clauses(text):
            try:
                if clause.op in ("minimize", "maximize"):
                    if objective:
                        raise _two_objectives(text[clause.start : clause.end])
                    _check_objective(clause.op, clause.figure)
                    objective[clause.op] = clause.figure
                else:
                    limit = Limit(clause.figure, clause.op, clause.value)
                    if any(_same(limit, other) for other in limits):
                        raise _twice(f"{limit.figure}{limit.op}")
                    _check_possible((*limits, limit))
                    limits.append(limit)
            except GoalError as error:
                raise pointed(text, clause.start, clause.end, error) from None
        return cls(minimize=objective.get("minimize"), maximize=objective.get("maximize"), limits=tuple(limits))

    def text(self) -> str:
        """The goal in words, in one fixed form; `parse` reads the same goal back."""
        words = [limit.text() for limit in self.all_limits()]
        words += [f"{verb} {figure}" for verb in ("minimize", "maximize") if (figure := getattr(self, verb))]
        return ", ".join(words)

    def all_limits(self) -> tuple[Limit, ...]:
        """Every limit, `max_drop` and `max_relative_drop` among them."""
        drops = tuple(
            Limit(figure, "<=", getattr(self, field))
            for figure, field in _DROP_FIELDS.items()
            if getattr(self, field) is not None
        )
        return self.limits + drops

    def objective(self) -> tuple[str, int]:
        """The figure to rank by, and 1 where smaller is better, -1 where larger is."""
        return (self.maximize, -1) if self.maximize is not None else (self.minimize or DEFAULT_OBJECTIVE, 1)


def _known(figure: str) -> None:
    if figure not in FIGURES:
        expected = f"one of {', '.join(FIGURES)}"
        raise GoalError(
            "the goal names an unknown figure",
            code="unknown-figure",
            got=repr(figure),
            expected=expected,
            remedy=nearest(figure),
        )


def _check_objective(verb: str, figure: str) -> None:
    _known(figure)
    sensible = {"less": "minimize", "more": "maximize", "task": verb}[FIGURES[figure].better]
    if verb != sensible:
        raise GoalError(
            f"to {verb} {figure} would make the network worse",
            code="objective",
            got=f"{verb} {figure}",
            expected=f"{sensible} {figure}",
            remedy=f"write {sensible} {figure}",
        )


def _check_possible(limits: Sequence[Limit]) -> None:
    for most, least in itertools.product(limits, limits):
        if (most.figure, most.op, least.op) == (least.figure, "<=", ">=") and most.value < least.value:
            raise GoalError(
                f"two limits of {most.figure} exclude each other",
                code="contradiction",
                got=f"{least.text()}, {most.text()}",
                expected="values between both limits",
                remedy="remove one of them, or exchange their values",
            )


def _same(one: Limit, other: Limit) -> bool:
    return (one.figure, one.op) == (other.figure, other.op)


def _twice(what: str) -> GoalError:
    return GoalError(
        "a limit appears twice in the goal", code="twice", got=what, expected="each limit once", remedy="remove one"
    )


def _two_objectives(got: str) -> GoalError:
    return GoalError(
        "a goal has one objective",
        code="two-objectives",
        got=got,
        expected="one figure to minimize or maximize",
        remedy=f"bound the other figure instead, for example {EXAMPLE}",
    )


def named(goal: Goal) -> tuple[str, ...]:
    """The figures that a goal speaks of: the objective first."""
    return tuple(dict.fromkeys((goal.objective()[0], *(limit.figure for limit in goal.all_limits()))))


def needs_metric(goal: Goal) -> bool:
    """Whether judging this goal needs the task's metric."""
    return any(map(of_the_metric, named(goal)))


def needs_timing(goal: Goal) -> bool:
    """Whether judging this goal needs artifacts to be run against the clock, in processes of their own."""
    return any(name in TIMED or name in ("peak_memory_bytes", "energy_mj") for name in named(goal))


def needs_packing(goal: Goal) -> bool:
    """Whether judging this goal needs the packed size."""
    return "packed_bytes" in named(goal)
