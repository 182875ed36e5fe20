"""How candidates are judged by a goal: whether each meets it, the Pareto set, and the one that is chosen.

Judging reads records alone: nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from penjing.goals.goal import TIMED, Goal
from penjing.goals.text import of_the_metric
from penjing.records import Candidate, GoalLimit, GoalResult
from penjing.records.figures import FIGURES

_COUNTED = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_MULTIPLES = {"bytes": (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)), "count": _COUNTED, "MACs": _COUNTED}
_SUFFIXES = {"bytes": "B", "ms": "ms", "/s": "/s", "mJ": "mJ"}


def figures(candidate: Candidate) -> dict[str, float | None]:
    """Every figure that a goal can name, None where it was not measured (or is not a finite number).

    Latency is the median in milliseconds; drops are fractions.
    """
    return {name: figure.of(candidate) for name, figure in FIGURES.items()}


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
    if latency is not None and not latency.steady and asked & TIMED:
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
