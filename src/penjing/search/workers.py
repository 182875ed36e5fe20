"""Who carries trials out: this process, one trial after the other."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from penjing.pipeline.prepare import Prepared
from penjing.search.budget import Clock
from penjing.search.choice import Choice, Learning, recipe
from penjing.search.trial import carry_out


class Workers(Protocol):
    """What carries trials out.

    Attributes:
        count: Trials that may be in progress at once.
    """

    count: int

    def submit(self, number: int, choice: Choice, learning: Learning, folder: Path) -> None:
        """Begin a trial in a folder, or go on with it."""
        ...

    def wait(self) -> int:
        """Wait until a trial has ended and its outcome lies in its folder; returns its number."""
        ...


class Here:
    """Trials in this process."""

    count = 1

    def __init__(self, prepared: Prepared, clock: Clock) -> None:
        self.prepared, self.clock = prepared, clock
        self._next: list[tuple[int, Choice, Learning, Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next.clear()

    def submit(self, number: int, choice: Choice, learning: Learning, folder: Path) -> None:
        """Remember a trial for `wait`."""
        self._next.append((number, choice, learning, folder))

    def wait(self) -> int:
        """Carry the trial out.

        Raises:
            OutOfTime: It takes longer than there is time.
        """
        number, choice, learning, folder = self._next.pop(0)
        run = self.prepared.run
        with (
            run.costing(f"trial {number}: {choice.words()}"),
            run.events.heard(self.clock),
            run.events.within(trial=number),
        ):
            carry_out(self.prepared, choice, recipe(choice, learning), folder)
        return number
