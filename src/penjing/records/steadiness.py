"""How many times faster one network is than another, and whether the timings can be trusted. Plain numbers, no torch.

Both were timed in turns, so the medians of one round can be divided by each other: what slows a machine down for a
while meets both, and the ratio stays. Where it does not, another program took the processor from one of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from penjing.records.record import Latency

SPREAD = 0.4
"""IQR over median of timed calls. On a quiet machine it is below 0.1, with a neighbour in the caches or a clock that
steps 0.2 to 0.3; two programs on one core give calls of two kinds, and far more."""
JITTER_MS = 0.01
"""An IQR below this is what the timer, an interrupt and a call from Python cost: of a network that takes microseconds
it is a large part on the quietest machine."""
TURNS = 0.2
"""Half of the rounds' ratios lie within this part of their median. A quiet machine stays below 0.05, and a speed-up
that is said with two digits means nothing beyond."""
TAIL = 3.0
"""A p95 of more medians than this is that of another program, which took its turn in one call of twenty."""
PATIENCE = 3
"""Timings that can't be trusted are taken on, up to so many times the rounds that were asked for."""
WORTH_SECONDS = 0.1
"""Who asks for less time than this per artifact wants a quick look: it is not measured on."""


def speedup(before: Latency, after: Latency) -> float:
    """How many times faster `after` is: the median of the ratios of their rounds.

    Of the two medians where the rounds were not recorded, or are not the same.
    """
    return statistics.median(_ratios(before, after))


def between(before: Latency, after: Latency) -> tuple[float, float]:
    """The lower and the upper quartile of the rounds' speed-ups."""
    ratios = _ratios(before, after)
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def scatters(latency: Latency) -> str:
    """Why a network's own calls can't be trusted, in words; "" where they can."""
    if latency.spread <= SPREAD or latency.spread * latency.median <= JITTER_MS:
        return ""
    return f"the middle half of its calls spans {100 * latency.spread:.0f} % of their median"


def tails(latency: Latency) -> bool:
    """Whether the slowest calls say more of the machine than of the network."""
    return latency.p95 > TAIL * latency.median and latency.p95 - latency.median > JITTER_MS


def doubt(before: Latency, after: Latency) -> str:
    """Why the speed-up of `after` over `before` can't be trusted, in words; "" where it can."""
    if text := scatters(after):
        return text
    if text := scatters(before):
        return text.replace("its calls", "the calls that it is compared with")
    low, high = between(before, after)
    if high - low <= TURNS * speedup(before, after):
        return ""
    return f"its speed-up went from {low:.2g}× to {high:.2g}× between turns"


def steady_rounds(rounds: Sequence[Sequence[Latency]]) -> int:
    """Which window of rounds to keep: the one with the fewest doubts, the latest of several.

    Args:
        rounds: For every window the latencies of all targets, the first of them what the others are compared with.
    """
    doubts = [sum(bool(doubt(targets[0], t)) for t in targets) for targets in rounds]
    return max(i for i, number in enumerate(doubts) if number == min(doubts))


def _ratios(before: Latency, after: Latency) -> list[float]:
    if before.rounds and len(before.rounds) == len(after.rounds):
        return [x / y for x, y in zip(before.rounds, after.rounds, strict=True)]
    return [before.median / after.median]
