"""Choices that will fail as others did, told from what failed and from what did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from penjing.search.choice import Choice

OFTEN = 3  # failures that are laid to something which never worked: then it is left alone


class Failures:
    """What failed, and what it is laid to.

    A failure is laid to one part of its choice: to integers where they fail without anything else, to a structure that
    never worked, to training, or to the way in which integers are made.

    Args:
        failed: Choices that gave no artifact.
        worked: Choices that did.
    """

    def __init__(self, failed: Iterable[Choice], worked: Iterable[Choice]) -> None:
        failed, self._worked = list(failed), list(worked)
        self._parts = {part for choice in self._worked for part in _parts(choice)}
        plain = any(c.integers != "none" and not c.structural and not c.epochs for c in failed)
        self._integers = plain and "integers" not in self._parts
        causes = [(choice, self._cause(choice)) for choice in failed]
        self._structures = [choice for choice, cause in causes if cause in (choice.technique, "blocks")]
        often = Counter(cause for _, cause in causes)
        self._hopeless = {part for part, times in often.items() if times >= OFTEN and part not in self._parts}

    def expects(self, choice: Choice) -> bool:
        """Whether a choice will fail: it removes as much or more than one that did, or has what never worked."""
        if any(part in self._hopeless for part in _parts(choice)):
            return True
        return choice.structural and any(_at_most(choice, other) for other in self._structures)

    def _cause(self, choice: Choice) -> str:
        """What a failure is laid to; "" where nothing tells."""
        if self._integers and choice.integers != "none":
            return "integers"
        if choice.structural and not any(_at_most(other, choice) for other in self._worked):
            return choice.technique if choice.technique != "none" else "blocks"
        if choice.epochs and "training" not in self._parts:
            return "training"
        return _way(choice) if choice.integers != "none" else ""


def _at_most(one: Choice, other: Choice) -> bool:
    """Whether one leaves as much as another of the same, or less."""
    return one.technique == other.technique and one.keep <= other.keep and one.blocks >= other.blocks


def _parts(choice: Choice) -> list[str]:
    parts: list[str] = [choice.technique] if choice.technique != "none" else []
    parts += ["blocks"] if choice.blocks else []
    parts += ["training"] if choice.epochs else []
    return parts + (["integers", _way(choice)] if choice.integers != "none" else [])


def _way(choice: Choice) -> str:
    return f"INT{choice.weight_bits} {choice.integers}"
