"""Integers as compact text, for edit logs: ``"0-3 7 9-12"``. Order is preserved: ``"8 0-3"`` starts with 8."""

from __future__ import annotations

from collections.abc import Iterable


def to_text(numbers: Iterable[int]) -> str:
    """Format integers; runs of consecutive ones become ``first-last``.

    >>> to_text([0, 1, 2, 3, 7, 9, 10, 8])
    '0-3 7 9-10 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


def from_text(text: str) -> list[int]:
    """Parse the output of `to_text`.

    >>> from_text("0-3 7 9-10 8")
    [0, 1, 2, 3, 7, 9, 10, 8]
    """
    numbers: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
