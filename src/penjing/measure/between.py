"""How far apart two artifacts are that stand for one network in two runtimes, and how far apart they may be.

Runtimes take different formats, so that artifacts of one network have plans of their own, p and q, and compute a and b.
Parity holds each to its plan: |a - p| ≤ 10^(-L/20)·|p|, with L decibels the limit of its precision. By the triangle
inequality, then,

    |a - b| ≤ |p - q| + 10^(-L/20)·(|p| + |q|)

and both terms are known before a runtime has computed anything: how far the plans are apart in torch, and what a
runtime may add. That is the bound, as a ratio to the source's values. Where parity lowered a limit, because the network
itself amplifies roundings, the bound stays: two runtimes may then be further apart than it says, which is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penjing.measure import limits
from penjing.measure.columns import Array, Columns, Difference, differences
from penjing.measure.decibels import decibels
from penjing.records import ParityRow


@dataclass(frozen=True)
class Side:
    """One artifact's answers, an array per output.

    Attributes:
        planned: What its plan answers in torch.
        answers: What it answers in its runtime.
        limit_db: How near parity holds the second to the first, in decibels.
    """

    planned: Sequence[Array]
    answers: Sequence[Array]
    limit_db: float


def rows(
    source: Sequence[Array], first: Side, second: Side, parts: Sequence[Columns], names: Sequence[str], equal: float
) -> tuple[ParityRow, ...]:
    """The differences of two artifacts, part by part, as ratios to the source's values, with their limits.

    Args:
        source: The source network's answers to the same samples.
        first: One artifact.
        second: The other.
        parts: Result of `split`.
        names: Of the outputs.
        equal: Share of values of integer and boolean outputs in which parity holds an artifact to its plan.

    Raises:
        ArtifactError: The numbers of outputs or their shapes differ.
    """
    samples = len(source[0]) if source and source[0].ndim else 1
    between = differences(first.answers, second.answers, parts, samples)
    plans = differences(first.planned, second.planned, parts)
    powers = ([d.signal for d in differences(side.planned, side.answers, parts)] for side in (first, second))
    signals = [d.signal for d in differences(source, first.answers, parts)]
    rows = limits.told([replace(d, signal=s) for d, s in zip(between, signals, strict=True)], names)
    judged = []
    for row, d, plan, signal, p, q in zip(rows, between, plans, signals, *powers, strict=True):
        if row.equal is not None:
            judged.append(replace(row, limit_equal=max(0.0, (plan.equal or 0.0) - 2 * (1 - equal))))
            continue
        noise = allowed(plan, (p, first.limit_db), (q, second.limit_db))
        within = not signal and d.noise <= noise  # without a signal there is no ratio
        judged.append(row if within else replace(row, limit_db=decibels(signal, noise)))
    return tuple(judged)


def allowed(plans: Difference, *sides: tuple[float, float]) -> float:
    """The most that two artifacts may differ, as a sum of squares.

    Args:
        plans: The difference of their plans.
        sides: Of each, the sum of squares of what its plan answers, and the limit of its parity in decibels.
    """
    added = sum(math.sqrt(power) * 10 ** (-limit_db / 20) for power, limit_db in sides)
    return (math.sqrt(plans.noise) + added) ** 2
