"""The language of goals: figures, units, and errors that point at the word that can't be parsed.

Grammar: clauses between commas. A clause is ``minimize FIGURE``, ``maximize FIGURE`` or ``FIGURE <= VALUE`` (or
``>=``), where VALUE is a number with a unit.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from penjing.errors import GoalError
from penjing.records.figures import FIGURES, Unit

EXAMPLE = '"latency_ms<=5, drop<=1%, minimize size_bytes"'
DROP_HELP = (
    "drop is the absolute change for the worse in the metric's own unit (1% is 0.01: from 0.93 to 0.92); "
    "relative_drop is that change divided by the source's metric"
)

_ALIASES = {alias: figure.name for figure in FIGURES.values() for alias in figure.aliases}
_THOUSANDS: dict[str, int | Decimal] = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY: dict[str, int | Decimal] = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL: dict[str, int | Decimal] = {"B": 1, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_THOUSANDTH = Decimal("0.001")
_SHARES: dict[str, int | Decimal] = {"": 1, "%": Decimal("0.01")}
_UNITS: dict[Unit, dict[str, int | Decimal]] = {
    "metric": _SHARES,
    "%": _SHARES,
    "bytes": {**_THOUSANDS, **_DECIMAL, **_BINARY},
    "count": _THOUSANDS,
    "MACs": _THOUSANDS,
    "/s": {**_THOUSANDS, "/s": 1},
    "ms": {"": 1, "ms": 1, "s": 1000, "us": _THOUSANDTH, "µs": _THOUSANDTH},
    "mJ": {"": 1, "mJ": 1, "J": 1000, "uJ": _THOUSANDTH, "µJ": _THOUSANDTH},
}
"""What may stand behind a value, and how many of the figure's own unit it is."""

_OBJECTIVE = re.compile(r"(minimi[sz]e|maximi[sz]e)(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
_LIMIT = re.compile(r"([^<>=≤≥!]*?)\s*([<>=≤≥!]+)\s*(.*)", re.DOTALL)
_VALUE = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(\S*)")
_OPERATORS = {"<=": "<=", "≤": "<=", "=<": "<=", ">=": ">=", "≥": ">=", "=>": ">="}


@dataclass(frozen=True)
class Clause:
    """One clause: `op` is "minimize", "maximize", "<=" or ">="; `start` and `end` say where it stands in the text."""

    op: str
    figure: str
    value: float
    start: int
    end: int


def clauses(text: str) -> Iterator[Clause]:
    """Read the clauses of a goal from left to right.

    Raises:
        GoalError: Points at the first word that can't be read.
    """
    start = 0
    for part in text.split(","):
        begin = start + len(part) - len(part.lstrip())
        clause = part.strip()
        if not clause:
            what = "a clause of the goal is empty"
            raise pointing(text, begin, begin + 1, what, "nothing", f"for example {EXAMPLE}", code="empty")
        yield _clause(text, clause, begin)
        start += len(part) + 1


def _clause(text: str, clause: str, begin: int) -> Clause:
    end = begin + len(clause)
    objective = _OBJECTIVE.fullmatch(clause)
    if objective is not None:
        verb = "minimize" if objective[1].lower().startswith("min") else "maximize"
        if not objective[2]:
            raise pointing(
                text, begin, end, f"{verb} needs a figure", repr(clause), f"{verb} latency_ms", code="no-figure"
            )
        at = begin + objective.start(2)
        return Clause(verb, _figure(text, objective[2], at), 0.0, begin, end)
    limit = _LIMIT.fullmatch(clause)
    if limit is None:
        word = clause.split()[0]
        remedy = _suggest(word, ("minimize", "maximize", *FIGURES))
        expected = "minimize FIGURE, maximize FIGURE or FIGURE<=VALUE"
        what = "a clause of the goal can't be read"
        raise pointing(text, begin, end, what, repr(clause), expected, remedy, code="unreadable")
    figure = _figure(text, limit[1], begin)
    op = _OPERATORS.get(limit[2])
    if op is None:
        at = begin + limit.start(2)
        what = f"{limit[2]} is not a comparison of a goal"
        near = ">=" if limit[2].startswith(">") else "<="
        remedy = f"write {figure}{near}{limit[3]}"
        raise pointing(text, at, at + len(limit[2]), what, limit[2], "<= or >=", remedy, code="comparison")
    return Clause(op, figure, _value(text, figure, limit[3], begin + limit.start(3)), begin, end)


def _figure(text: str, word: str, at: int) -> str:
    if word in FIGURES:
        return word
    expected = f"one of {', '.join(FIGURES)}"
    what = "the goal names an unknown figure"
    raise pointing(text, at, at + len(word), what, repr(word), expected, nearest(word), code="unknown-figure")


def _value(text: str, figure: str, word: str, at: int) -> float:
    match = _VALUE.fullmatch(word)
    units = _UNITS[FIGURES[figure].unit]
    known = ", ".join(unit for unit in units if unit) or "none"
    if match is None:
        what = f"the value of {figure} is not a number"
        expected = f"a number, with a unit of: {known}"
        raise pointing(text, at, at + len(word), what, repr(word), expected, _help(figure), code="not-a-number")
    if match[2] not in units:
        what = f"{figure} does not take this unit"
        where = at + match.start(2)
        expected = f"a unit of: {known}"
        raise pointing(
            text, where, where + len(match[2]), what, repr(match[2]), expected, _help(figure), code="unknown-unit"
        )
    value = float(Decimal(match[1]) * units[match[2]])
    try:
        return checked(figure, value)
    except GoalError as error:
        raise pointed(text, at, at + len(word), error) from None


def checked(figure: str, value: float) -> float:
    """The value of a limit as a float.

    Raises:
        GoalError: It is not finite, or below 0 for a figure that can't be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GoalError(
            f"the limit of {figure} is not a finite number",
            code="not-finite",
            got=repr(value),
            expected="a finite number",
        )
    if value < 0 and not of_the_metric(figure):
        raise GoalError(f"{figure} is never below 0", code="negative", got=value, expected="a number of at least 0")
    return float(value) + 0.0  # minus zero would be written as another goal


def of_the_metric(figure: str) -> bool:
    """Whether a figure is the task's metric or a change of it, which may be below 0."""
    return FIGURES[figure].unit in ("metric", "%")


def exact(figure: str, value: float) -> str:
    """A value that reads back to the same bits: shares in %, everything else in the figure's own unit."""
    number = Decimal(repr(value))
    percent = FIGURES[figure].unit == "%"
    number = number.scaleb(2) if percent else number
    plain = -6 < number.adjusted() < 16
    digits = format(number.normalize(), "f" if plain else "e") if number else "0"
    return digits + ("%" if percent else "")


def nearest(word: str) -> str | None:
    """ "did you mean latency_ms?" """
    near = _ALIASES.get(word.lower())
    return f"did you mean {near}?" if near else _suggest(word, tuple(FIGURES))


def _suggest(word: str, known: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(word.lower(), known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else None


def _help(figure: str) -> str | None:
    return DROP_HELP if FIGURES[figure].unit == "%" else None


def pointing(
    text: str, start: int, end: int, what: str, got: object, expected: object, remedy: str | None = None, *, code: str
) -> GoalError:
    """A GoalError whose first lines show the goal with carets under the word."""
    line = "".join(c if c.isprintable() else " " for c in text)
    carets = " " * start + "^" * max(1, end - start)
    return GoalError(f"{what}\n    {line}\n    {carets}", code=code, got=got, expected=expected, remedy=remedy)


def pointed(text: str, start: int, end: int, error: GoalError) -> GoalError:
    """The same error, with the goal and carets under the words that it is about."""
    return pointing(text, start, end, error.what, error.got, error.expected, error.remedy, code=error.code)
