"""The time of a search: what is left, what a trial takes, and the end of one that takes too long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penjing.search.choice import Choice

LATE = 1.1  # times the minutes: then a trial is broken off
MIXING = 4.0  # times the seconds of a plain trial: a guess for bits of its own for every layer
FIRST_S = 10.0  # a guess for a trial without training, as long as none was seen
AT_LEAST_S = 5.0  # for choosing and writing, beside what was measured


class OutOfTime(BaseException):
    """The time is over in the middle of a trial. Not an error of the trial: nothing on the way may take it for one."""


@dataclass
class Clock:
    """Measures a search against its minutes.

    Attributes:
        minutes: It is given; None is no limit.
        reserve: Seconds that choosing and writing will take.
        before: Seconds before an interruption.
        has_result: Whether a trial has given an artifact: before that none is broken off.
    """

    minutes: float | None
    reserve: float = AT_LEAST_S
    before: float = 0.0
    has_result: bool = False

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.before + time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds that trials may still take."""
        return np.inf if self.minutes is None else 60 * self.minutes - self.reserve - self.spent

    @property
    def spare(self) -> float:
        """Seconds until a trial would be broken off."""
        return np.inf if self.minutes is None else LATE * 60 * self.minutes - self.reserve - self.spent

    def __call__(self, event: dict[str, Any]) -> None:
        """Listens to a trial, and breaks it off when it takes too long.

        Raises:
            OutOfTime: It does.
        """
        if self.spare < 0 and self.has_result:
            raise OutOfTime


@dataclass(frozen=True, kw_only=True)
class Paces:
    """Seconds of trials, learned from those that ended.

    Attributes:
        plain: Of one that changes neither structure nor weights.
        structure: That a structural edit adds.
        rounding: That searching the rounding adds.
        mixing: That bits of its own for every layer add.
        epoch: Of a pass over the data that trains; of half a pass with few epochs the half.
    """

    plain: float
    structure: float
    rounding: float
    mixing: float
    epoch: float

    def seconds(self, choice: Choice) -> float:
        """What a trial is expected to take."""
        trained = self.epoch * choice.epochs
        integers = {"rounded": self.rounding, "mixed": self.mixing}.get(choice.integers, 0.0)
        return self.plain + trained + integers + (self.structure if choice.structural else 0.0)


def paces(seen: Sequence[tuple[Choice, float]], epoch: float) -> Paces:
    """Learn from the seconds of trials.

    Args:
        seen: Choices and seconds.
        epoch: Seconds of a pass, as long as no trial has trained.
    """
    plain = min((s for c, s in seen if not c.structural and not c.epochs), default=FIRST_S)
    rounding = _median([s - plain for c, s in seen if c.integers == "rounded" and not c.structural], plain)
    mixing = _median([s - plain for c, s in seen if c.integers == "mixed" and not c.structural], MIXING * plain)
    structure = _median([s - plain for c, s in seen if c.structural and not c.epochs], plain)
    known = Paces(plain=plain, structure=structure, rounding=rounding, mixing=mixing, epoch=0.0)
    per_epoch = [(s - known.seconds(c)) / c.epochs for c, s in seen if c.epochs]
    return replace(known, epoch=_median(per_epoch, epoch))


def _median(values: list[float], otherwise: float) -> float:
    return max(0.0, float(np.median(values))) if values else otherwise
