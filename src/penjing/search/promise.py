"""What a choice is worth for a goal: expected improvement of the objective, times the probability of its limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from penjing.goals.goal import Goal
from penjing.pipeline.building import INTEGER
from penjing.records import Candidate
from penjing.records.figures import FIGURES
from penjing.search.beliefs import FLOOR, Beliefs, Believed
from penjing.search.choice import Choice

BELOW = 0.2  # of a limit: drops below that are not told apart, as samples hardly do
_OF_METRIC = ("metric", "drop", "relative_drop")
_SIGNS = {"<=": 1, ">=": -1}


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a choice is worth in the artifact that it is best in.

    Attributes:
        choice: The choice.
        worth: Expected improvement of the objective's logarithm, times `meets`.
        meets: The probability that it keeps every limit.
        artifact: Runtime and precision: "openvino-int8".
        excess: How far beyond the limits it is expected to be, as `Aim.excess` counts it.
    """

    choice: Choice
    worth: float
    meets: float
    artifact: str
    excess: float


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A goal in the figures that beliefs speak of.

    Attributes:
        objective: The figure; `drop` for the metric.
        sign: 1 where smaller is better, -1 where larger is.
        limits: Figure, comparison and bound; drops relative to the metric.
        metric: Of the network that drops are against; None without one.
    """

    objective: str
    sign: int
    limits: tuple[tuple[str, str, float], ...]
    metric: float | None

    @classmethod
    def of(cls, goal: Goal, metric: float | None) -> Aim:
        """The goal of a user, with the metric of the network that drops are against."""
        figure, sign = goal.objective()
        limits = [_modelled(m.figure, m.op, m.value, metric) for m in goal.all_limits()]
        if figure in _OF_METRIC:
            figure, sign = "drop", 1
        return cls(objective=figure, sign=sign, limits=tuple(limits), metric=metric)

    @property
    def scale(self) -> float:
        """What drops are relative to."""
        return abs(self.metric or 0.0) or 1.0

    @property
    def floor(self) -> float:
        """The drop below which drops are not told apart."""
        limits = [bound for figure, op, bound in self.limits if figure == "drop" and op == "<="]
        return max(FLOOR, BELOW * min(limits, default=0.0))

    def excess(self, figures: Mapping[str, float]) -> float:
        """How far figures are beyond the limits: shares of the limits, added. One that is missing counts as within.

        A limit of 0 has no shares: there 1 counts as the whole, as when a goal looks for the nearest artifact.
        """
        limits = [limit for limit in self.limits if limit[0] in figures]
        shares = [(figures[f] - bound) / (abs(bound) or 1.0) * _SIGNS[op] for f, op, bound in limits]
        return sum(max(0.0, share) for share in shares)

    def value(self, candidate: Candidate) -> float | None:
        """The objective of a candidate that was measured, in the unit that beliefs have."""
        value = FIGURES[self.objective].of(candidate)
        return max(value / self.scale, self.floor) if value is not None and self.objective == "drop" else value


def _modelled(figure: str, op: str, value: float, metric: float | None) -> tuple[str, str, float]:
    scale = abs(metric or 0.0) or 1.0
    if figure == "metric":
        value = ((metric or 0.0) - value if op == ">=" else value - (metric or 0.0)) / scale
        return "drop", "<=", max(value, FLOOR)
    if figure in _OF_METRIC:
        return "drop", op, max(value / (scale if figure == "drop" else 1.0), FLOOR)
    return figure, op, value


def promises(beliefs: Beliefs, aim: Aim, choices: Iterable[Choice], best: float) -> list[Promise]:
    """Every choice of which something is known, the worthiest first; equals stay in their order.

    Args:
        beliefs: Of this search.
        aim: The goal.
        choices: That may be tried.
        best: The objective of the best artifact so far that meets the goal; where none does, the source's.
    """
    ranked = [promise(beliefs, aim, choice, best) for choice in choices]
    return sorted((p for p in ranked if p is not None), key=lambda p: -p.worth)


def promise(beliefs: Beliefs, aim: Aim, choice: Choice, best: float) -> Promise | None:
    """What one choice is worth; None where nothing is known of any artifact of it."""
    of_artifacts = []
    for artifact, seen in _artifacts(beliefs, choice):
        objective = beliefs.figure(aim.objective, seen, artifact)
        if objective is None:
            continue
        aimed = objective if aim.sign > 0 else Believed(-objective.mean, objective.sd)
        gain = aimed.improvement(best if aim.sign > 0 else 1 / best)
        meets = math.prod(_kept(beliefs, limit, seen, artifact) for limit in aim.limits)
        bounded = {name: b.value for name, _, _ in aim.limits if (b := beliefs.figure(name, seen, artifact))}
        of_artifacts.append(
            Promise(
                choice=choice,
                worth=gain * meets,
                meets=meets,
                artifact=artifact,
                excess=aim.excess(bounded),
            )
        )
    return max(of_artifacts, key=lambda p: (p.worth, -p.excess), default=None)


def expected(beliefs: Beliefs, aim: Aim, choice: Choice) -> dict[str, dict[str, float]]:
    """Medians of what every artifact of a choice will be, in their own units; `drop` in the metric's own unit."""
    return {artifact: beliefs.figures(seen, artifact, aim.scale) for artifact, seen in _artifacts(beliefs, choice)}


def _artifacts(beliefs: Beliefs, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """The artifacts that a choice gives, each with what of the choice is in it.

    Integers where it makes any, else floats; floats too as long as the figures of no integers are known.
    """
    integers = [a for a in beliefs.artifacts if any(a.endswith(f"-{word}") for word in INTEGER)]
    if choice.integers != "none" and integers:
        yield from ((artifact, choice) for artifact in integers)
    else:
        yield from ((artifact, as_floats(choice)) for artifact in beliefs.artifacts if artifact not in integers)


def _kept(beliefs: Beliefs, limit: tuple[str, str, float], choice: Choice, artifact: str) -> float:
    figure, op, value = limit
    believed = beliefs.figure(figure, choice, artifact)
    if believed is None:
        return 1.0  # nothing tells them apart in this figure
    below = believed.below(value)
    return below if op == "<=" else 1 - below


def as_floats(choice: Choice) -> Choice:
    """The choice as it is in an artifact in floating point: without its integers."""
    return replace(choice, integers="none", weight_bits=8)
