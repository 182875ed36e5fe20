"""What a search tried, as the record of its run tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One recipe that was tried.

    Attributes:
        number: In the order in which trials began.
        words: What the recipe does.
        recipe: Its steps as plain data.
        training: Whether it trained; a trial without is over in seconds.
        began_s: Seconds from the beginning of the search.
        seconds: That it took.
        predicted: Figures that were expected, by name, before it began.
        measured: Those of its best artifact.
        best: That artifact: runtime and precision.
        met: Whether it meets the goal.
        failure: Why the trial gave nothing; "" where it did.
    """

    number: int
    words: str
    recipe: list[dict[str, Any]]
    training: bool
    began_s: float
    seconds: float
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    best: str = ""
    met: bool = False
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class SearchRow:
    """A search.

    Attributes:
        trials: All that ended.
        objective: The figure of the goal that was made small or large.
        stopped: Why it came to its end, in words.
        seconds: It took, without what came before an interruption.
        minutes: It was given; None without a limit.
        most: Trials that it was given; None without a limit.
        study: Where its trials are kept: a file in the run folder, or the database without its password.
        notes: What was left out of the space, and why.
        chosen: The number of the trial that the artifact is from.
    """

    trials: tuple[TrialRow, ...]
    objective: str
    stopped: str
    seconds: float = 0.0
    minutes: float | None = None
    most: int | None = None
    study: str = ""
    notes: tuple[str, ...] = ()
    chosen: int | None = None
