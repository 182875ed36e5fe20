"""Length and learning rate of a training: minutes are converted to steps."""

from __future__ import annotations

import math
import time

from penjing.train.schedules import SCHEDULES
from penjing.train.settings import TrainingSettings

TIMED = 8  # steps before the training
LATE = 0.8  # of the steps that are left would fit: then there are fewer of them


def rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """The learning rate of a step: it rises over the fraction `warmup` of the steps, then follows the schedule."""
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * SCHEDULES[settings.schedule]((step - warm) / max(1, steps - warm))


class Budget:
    """The minutes of a training.

    Args:
        minutes: An upper bound; None is none.
    """

    def __init__(self, minutes: float | None) -> None:
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.begin(0.0, 0.0)

    def begin(self, pace: float, before: float) -> None:
        """Start or resume the clock.

        Args:
            pace: Seconds a step so far.
            before: Seconds of training so far.
        """
        self.pace, self.before, self.start = pace, before, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds of training so far, in all processes."""
        return self.before + time.perf_counter() - self.start

    def fit(self) -> float:
        """Number of steps that fit at the pace of the timed ones."""
        return self.seconds / self.pace if self.pace else math.inf

    def steps(self, step: int, steps: int) -> int:
        """The total number of steps, seen after `step` of them: `steps`, or fewer where these would take too long."""
        if self.seconds == math.inf:
            return steps
        left = self.seconds - self.spent
        if left <= 0:
            return step
        pace = max((self.spent + TIMED * self.pace) / (step + TIMED), 1e-9)
        return step + round(left / pace) if left / pace < LATE * (steps - step) else steps


__all__ = ["Budget", "rate"]
