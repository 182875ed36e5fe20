"""An axis with round ticks, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LOG_FROM = 8.0  # ratio of the extreme values above which the axis is logarithmic


@dataclass(frozen=True)
class Tick:
    """A tick: its position in pixels and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Maps values from `low`..`high` to pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: tuple[Tick, ...] = ()

    @classmethod
    def spanning(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        inset: float = 0.0,
        *,
        ticks: int = 6,
        may_log: bool = False,
        percent: bool = False,
    ) -> Axis:
        """An axis that spans `values`.

        Args:
            values: At least one.
            start: Pixel of the lower end.
            end: Pixel of the upper end.
            inset: Distance in pixels of the extreme values from the ends.
            ticks: Approximate number of ticks of a linear axis.
            may_log: Whether the axis may be logarithmic.
            percent: Whether ticks are percentages of the values.
        """
        low, high = min(values), max(values)
        log = may_log and low > 0 and high / low > _LOG_FROM
        if log:
            low, high = math.log10(low), math.log10(high)
        smallest = 0.004 * max(abs(low), abs(high)) or 1.0
        if high - low < smallest:  # equal values are centred
            low, high = (low + high) / 2 - smallest, (low + high) / 2 + smallest
        pixels = abs(end - start)
        margin = (high - low) * inset / max(pixels - 2 * inset, 1.0)
        bare = cls(low - margin, high + margin, start, end, log)
        marks = _decades(bare.low, bare.high) if log else _round_steps(bare.low, bare.high, ticks)
        texts = _texts(marks, 100.0 if percent else 1.0, log)
        placed = tuple(Tick(round(bare.at(m), 1), t) for m, t in zip(marks, texts, strict=True))
        return cls(bare.low, bare.high, start, end, log, placed)

    def at(self, value: float) -> float:
        """The position of a value in pixels."""
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_steps(low: float, high: float, about: int) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    marks = [f * 10.0**e for e in exponents for f in factors]
    return [m for m in marks if low <= math.log10(m) <= high]


def _texts(marks: Sequence[float], factor: float, log: bool) -> list[str]:
    if log or len(marks) < 2:
        return [f"{m * factor:g}" for m in marks]
    step = (marks[1] - marks[0]) * factor
    decimals = next((d for d in range(8) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 8)
    return [f"{m * factor + 0.0:.{decimals}f}" for m in marks]
