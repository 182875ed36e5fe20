"""The goal of a run, as text or as a value, and how candidates are judged by it.

Judging reads records alone: nothing here needs torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penjing.errors import GoalError
from penjing.goals.text import EXAMPLE, checked, clauses, exact, nearest, of_the_metric, pointed
from penjing.records import Candidate, GoalLimit, GoalResult
from penjing.records.figures import FIGURES

DEFAULT_OBJECTIVE = "size_bytes"
_SLACK = 1e-9  # 0.93 - 0.92 is 0.010000000000000009: a limit must not fail by the last bits of a subtraction
_TIMED = {name for name, figure in FIGURES.items() if figure.unit in ("ms", "/s")}
_COUNTED = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_MULTIPLES = {"bytes": (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)), "count": _COUNTED, "MACs": _COUNTED}
_SUFFIXES = {"bytes": "B", "ms": "ms", "/s": "/s", "mJ": "mJ"}
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


# --- judging ----------------------------------------------------------------------------------------------------


def figures(candidate: Candidate) -> dict[str, float | None]:
    """Every figure that a goal can name, None where it was not measured (or is not a finite number).

    Latency is the median in milliseconds; drops are fractions.
    """
    return {name: figure.of(candidate) for name, figure in FIGURES.items()}


def named(goal: Goal) -> tuple[str, ...]:
    """The figures that a goal speaks of: the objective first."""
    return tuple(dict.fromkeys((goal.objective()[0], *(limit.figure for limit in goal.all_limits()))))


def needs_metric(goal: Goal) -> bool:
    """Whether judging this goal needs the task's metric."""
    return any(map(of_the_metric, named(goal)))


def needs_timing(goal: Goal) -> bool:
    """Whether judging this goal needs artifacts to be run against the clock, in processes of their own."""
    return any(name in _TIMED or name in ("peak_memory_bytes", "energy_mj") for name in named(goal))


def needs_packing(goal: Goal) -> bool:
    """Whether judging this goal needs the packed size."""
    return "packed_bytes" in named(goal)


def check(goal: Goal, candidate: Candidate) -> tuple[bool, str]:
    """Whether a candidate is within every limit and has the objective's figure, and the reason in words.

    The reason of a failure names every limit that fails, and only those: ``"drop 1.3 % is above 1 %"``. A candidate
    that was rejected meets no goal, whatever its figures are.
    """
    if candidate.rejection is not None:
        return False, f"rejected: {candidate.rejection.reason}"
    values = figures(candidate)
    met, failed = [], []
    for limit in goal.all_limits():
        value = values[limit.figure]
        if value is None:
            failed.append(f"{limit.figure} was not measured")
        elif limit.excess(value):
            mine, bound = _apart(limit.figure, value, limit.value)
            failed.append(f"{limit.figure} {mine} is {'above' if limit.op == '<=' else 'below'} {bound}")
        else:
            side = "within" if limit.op == "<=" else "at least"
            met.append(f"{limit.figure} {_words(limit.figure, value)} is {side} {_words(limit.figure, limit.value)}")
    objective, _ = goal.objective()
    latency = candidate.measured.latency_ms
    busy, asked = "", {objective, *(m.figure for m in goal.all_limits())}
    if latency is not None and not latency.steady and asked & _TIMED:
        busy = f"; busy machine, so its timing can't be trusted: {latency.doubt}"
    energy = candidate.measured.energy_mj
    if energy is not None and energy.method == "model" and "energy_mj" in asked:
        busy += "; energy is modelled, not measured"
    if values[objective] is None and f"{objective} was not measured" not in failed:
        failed.append(f"{objective} was not measured")
    if failed:
        return False, "; ".join(failed) + busy
    return True, ("; ".join(met) or f"{objective} {_words(objective, values[objective])}, without limits") + busy


def pareto(goal: Goal, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Names of the candidates that no other beats in the goal's figures (objective and limits), best first.

    One beats another when it is at least as good in all of these figures and better in one. A figure that was not
    measured counts as the worst.
    """
    axes = {(limit.figure, 1 if limit.op == "<=" else -1) for limit in goal.all_limits()} | {goal.objective()}
    rows = {}
    for position, candidate in enumerate(candidates):
        values = figures(candidate)
        rows[position] = [_cost(values[figure], sign) for figure, sign in sorted(axes)]

    def beats(one: int, other: int) -> bool:
        pairs = list(zip(rows[one], rows[other], strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    front = [c for i, c in enumerate(candidates) if not any(beats(j, i) for j in rows)]
    return tuple(c.name for c in sorted(front, key=_order(goal)))


def choose(goal: Goal, candidates: Sequence[Candidate]) -> GoalResult:
    """The best candidate that meets the goal; where none does, the nearest, with the reason; always the Pareto set.

    The best has the best objective, unrounded; equal ones are told apart by the smaller file, then by name. The
    nearest goes least beyond the limits, each excess taken as a share of its limit and all of them added. Rejected
    candidates are not among them; where there is no other, the one that comes nearest to what was planned is chosen,
    and the goal is not met.
    """
    offered = [c for c in candidates if c.rejection is None]
    meeting = [c for c in offered if check(goal, c)[0]]
    front = pareto(goal, offered)
    if meeting:
        best = min(meeting, key=_order(goal))
        reason = f"{best.name}: {check(goal, best)[1]}"
        return _result(goal, met=True, reason=reason, chosen=best.name, pareto=front)
    if not candidates:
        return _result(goal, met=False, reason="no candidate could be built", chosen=None)
    order = _order(goal)
    if not offered:
        near = min(candidates, key=lambda c: (_missing(c), order(c)))
        reason = f"no candidate may be offered; {near.name} comes nearest and is {check(goal, near)[1]}"
        return _result(goal, met=False, reason=reason, chosen=near.name)
    near = min(offered, key=lambda c: (_violation(goal, c), order(c)))
    reason = f"no candidate meets the goal; {near.name} comes nearest: {check(goal, near)[1]}{_by_how_much(goal, near)}"
    return _result(goal, met=False, reason=reason, chosen=near.name, pareto=front)


def _result(goal: Goal, **judged: Any) -> GoalResult:
    limits = tuple(GoalLimit(figure=m.figure, op=m.op, value=m.value, text=m.text()) for m in goal.all_limits())
    return GoalResult(text=goal.text(), limits=limits, **judged)


def _missing(candidate: Candidate) -> float:
    """How many decibels a rejected candidate stays below its limit."""
    rejection = candidate.rejection
    if rejection is None or rejection.snr_db is None or rejection.limit_db is None:
        return math.inf
    return rejection.limit_db - rejection.snr_db


def _order(goal: Goal) -> Callable[[Candidate], tuple[float, float, str]]:
    figure, sign = goal.objective()

    def key(candidate: Candidate) -> tuple[float, float, str]:
        values = figures(candidate)
        return _cost(values[figure], sign), _cost(values["size_bytes"], 1), candidate.name

    return key


def _cost(value: float | None, sign: int) -> float:
    return math.inf if value is None else sign * value


def _violation(goal: Goal, candidate: Candidate) -> float:
    values = figures(candidate)
    total = 0.0
    for limit in goal.all_limits():
        value = values[limit.figure]
        # a limit of 0 has no share: then 1% of a drop or metric, and 1 of everything else, count as the whole limit
        whole = abs(limit.value) or (0.01 if of_the_metric(limit.figure) else 1.0)
        total += math.inf if value is None else limit.excess(value) / whole
    return total


def _by_how_much(goal: Goal, candidate: Candidate) -> str:
    values = figures(candidate)
    parts = []
    for limit in goal.all_limits():
        value = values[limit.figure]
        if value is not None and (beyond := limit.excess(value)):
            parts.append(f"{limit.figure} by {_words(limit.figure, beyond)}")
    return f" (missed: {', '.join(parts)})" if parts else ""


def _apart(figure: str, value: float, limit: float) -> tuple[str, str]:
    """Both in words, with as many digits as it takes to tell them apart."""
    for digits in range(3, 18):
        words = _words(figure, value, digits), _words(figure, limit, digits)
        if words[0] != words[1]:
            break
    return words


def _words(figure: str, value: float | None, digits: int = 3) -> str:
    """A figure for people: shares in percent, bytes in decimal multiples."""
    if value is None:
        return "not measured"
    unit = FIGURES[figure].unit
    if unit == "%":
        return f"{_plain(value * 100, digits)} %"
    for prefix, size in _MULTIPLES.get(unit, ()):
        if abs(value) >= size:
            return f"{_plain(value / size, digits)} {prefix}"
    return f"{_plain(value, digits)} {_SUFFIXES.get(unit, '')}".rstrip()


def _plain(value: float, digits: int) -> str:
    """`digits` significant digits without an exponent; no digit before the point is lost."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
