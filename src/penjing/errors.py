"""Every error that Penjing raises on purpose.

    PenjingError                 exit code 1
    ├── UsageError               exit code 2: the request itself can't be understood
    │   ├── GoalError            a goal that can't be parsed
    │   └── RecipeError          a recipe whose order or settings make no sense
    ├── SourceError              SOURCE is missing, its factory raises, its forward fails
    │   ├── ExportError          the network can't be exported
    │   └── CheckpointError      a checkpoint that is damaged, foreign, or would run code
    ├── TaskError                the task lacks what the recipe or the goal needs
    │   └── CalibrationError     calibration data that is empty, not finite or of the wrong shape
    ├── TrainingError            training that can't go on: a loss that is not finite, no gradient
    ├── MissingDependency        an optional package is not installed
    ├── QuantizationError        a plan that the chosen runtime can't run
    ├── PruningError             a target that can't be reached, or a network that can't be pruned
    ├── DecompositionError       a target that low rank can't reach, or a network that can't be decomposed
    ├── SharingError             weights or layers that can't be shared
    ├── TargetError              a device profile that can't be read, or what a device can't take
    ├── ArtifactError            an artifact that can't be opened
    │   └── ParityError          exit code 3: an artifact that does not compute what was planned
    ├── RecordError              a record that can't be read
    └── OutputError              the output folder holds a run, is full or not writable

Each says what went wrong, what was found, what was expected, and what to do about it. Where a kind has several cases
that a program may want to tell apart, `code` is the case's name; sentences may change, codes stay.
"""

from __future__ import annotations

from typing import Any


class PenjingError(Exception):
    """An error with a remedy.

    Args:
        what: What went wrong, in one sentence.
        got: What was found.
        expected: What would have been right.
        remedy: What the user can do about it.
        code: The name of the case within its kind, for programs; it is not shown.
        field: The name of the setting, or the place in a file, that it is about, for programs; it is not shown.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
        code: str = "",
        field: str = "",
    ) -> None:
        self.what = what
        self.code = code
        self.field = field
        self.got = got
        self.expected = expected
        self.remedy = remedy
        lines = [what]
        for word, value in (("got", got), ("expected", expected), ("remedy", remedy)):
            if value is not None:
                lines.append(f"  {word + ':':<9} {value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """All its parts go with it into another process; what was got goes as text."""
        got = None if self.got is None else str(self.got)
        expected = None if self.expected is None else str(self.expected)
        parts = {"got": got, "expected": expected, "remedy": self.remedy, "code": self.code, "field": self.field}
        return _again, (type(self), self.what, parts)


def _again(kind: type[PenjingError], what: str, parts: dict[str, Any]) -> PenjingError:
    return kind(what, **parts)


def in_percent(got: object, expected: str) -> str | None:
    """The remedy where a fraction was expected and a number of percent was given.

    >>> in_percent(50, "a fraction from 0 to 1"), in_percent("7.5%", "a fraction from 0 to 1")
    ('did you mean 0.5? 50 % is 0.5', 'did you mean 0.075? 7.5 % is 0.075')
    >>> in_percent(-1, "a fraction from 0 to 1")
    """
    text = str(got)
    try:
        number = float(text.strip().removesuffix("%")) if isinstance(got, int | float | str) else -1.0
    except ValueError:
        return None
    told = isinstance(got, str) and text.strip().endswith("%")
    if "fraction" not in expected or not (0 < number <= 100 if told else 1 < number <= 100):
        return None
    return f"did you mean {number / 100:g}? {number:g} % is {number / 100:g}"


class UsageError(PenjingError):
    """The request itself can't be understood."""

    exit_code = 2


class GoalError(UsageError):
    """A goal that can't be parsed."""


class RecipeError(UsageError):
    """A recipe whose order or settings make no sense."""


class SourceError(PenjingError):
    """SOURCE is missing, its factory raises, or its forward fails on the example."""


class ExportError(SourceError):
    """The network can't be exported."""


class CheckpointError(SourceError):
    """A checkpoint that is damaged, belongs to another network, or would run code."""


class TaskError(PenjingError):
    """The task lacks what the recipe or the goal needs."""


class CalibrationError(TaskError):
    """Calibration data that is empty, not finite, or of the wrong shape or type."""


class TrainingError(PenjingError):
    """Training that can't go on."""


class MissingDependency(PenjingError):
    """An optional package is not installed."""


class QuantizationError(PenjingError):
    """A quantization plan that the chosen runtime can't run."""


class PruningError(PenjingError):
    """A target that can't be reached by pruning, or a network that can't be pruned."""


class DecompositionError(PenjingError):
    """A target that can't be reached by low rank, or a network that can't be decomposed."""


class SharingError(PenjingError):
    """Weights or layers that can't be shared."""


class TargetError(PenjingError):
    """A device profile that can't be read, or a network, plan or artifact that a device can't take."""


class ArtifactError(PenjingError):
    """An artifact that can't be opened."""


class ParityError(ArtifactError):
    """An artifact that does not compute what was planned; it is not written."""

    exit_code = 3


class RecordError(PenjingError):
    """A record that can't be read."""


class OutputError(PenjingError):
    """The output folder already holds a run, is full, or can't be written."""
