"""Goal: what a run is to reach, in words or as a value, and how candidates are judged by it.

Grammar: clauses between commas. A clause is ``minimize FIGURE``, ``maximize FIGURE`` or ``FIGURE <= VALUE`` (or
``>=``). Judging reads records alone: nothing here needs torch.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from penjing.errors import GoalError
from penjing.records import Candidate, GoalResult

_SHARES = ("drop", "relative_drop")
_METRICS = ("metric", *_SHARES)
_BYTES = ("size_bytes", "packed_bytes", "peak_memory_bytes")
_COUNTS = ("parameters", "macs")
FIGURES = (*_METRICS, "latency_ms", "throughput_per_s", *_BYTES, "energy_mj", *_COUNTS)
DEFAULT = "size_bytes"  # the objective of a goal that names none

_ALIASES = {
    "latency": "latency_ms",
    "time": "latency_ms",
    "speed": "latency_ms",
    "ms": "latency_ms",
    "fps": "throughput_per_s",
    "throughput": "throughput_per_s",
    "size": "size_bytes",
    "bytes": "size_bytes",
    "memory": "peak_memory_bytes",
    "ram": "peak_memory_bytes",
    "energy": "energy_mj",
    "accuracy": "metric",
    "loss": "drop",
    "params": "parameters",
    "flops": "macs",
}
_DECIMAL_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTE_UNITS = _DECIMAL_UNITS | {"B": 1, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS: dict[str, dict[str, int | Decimal]] = {
    **{name: {"": 1, "%": Decimal("0.01")} for name in _METRICS},
    **{name: dict(_BYTE_UNITS) for name in _BYTES},
    **{name: dict(_DECIMAL_UNITS) for name in _COUNTS},
    "throughput_per_s": {**_DECIMAL_UNITS, "/s": 1},
    "latency_ms": {"": 1, "ms": 1, "s": 1000, "us": Decimal("0.001"), "µs": Decimal("0.001")},
    "energy_mj": {"": 1, "mJ": 1, "J": 1000, "uJ": Decimal("0.001"), "µJ": Decimal("0.001")},
}
_DROP_HELP = (
    "drop is the absolute change for the worse in the metric's own unit (1% is 0.01: from 0.93 to 0.92); "
    "relative_drop is that change divided by the source's metric"
)
_EXAMPLE = '"latency_ms<=5, drop<=1%, minimize size_bytes"'
_OBJECTIVE = re.compile(r"\s*(minimi[sz]e|maximi[sz]e)\s+(.*?)\s*", re.IGNORECASE | re.DOTALL)
_LIMIT = re.compile(r"\s*(?P<figure>[^\s<>=≤≥]+)\s*(?P<op>[<>=≤≥!]+)\s*(?P<value>.*?)\s*", re.DOTALL)
_VALUE = re.compile(r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)\s*(?P<unit>\S*)", re.ASCII)
_SLACK = 1e-9  # 0.93 - 0.92 is 0.010000000000000009: a limit must not fail by the last bit of a subtraction


@dataclass(frozen=True)
class Limit:
    """A bound on one figure: ``Limit("latency_ms", "<=", 5.0)``. Shares are fractions: 1% is 0.01."""

    figure: str
    op: str
    value: float

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise _unknown_figure(self.figure)
        if self.op not in ("<=", ">="):
            raise GoalError("a limit's op is unknown", got=repr(self.op), expected="<= or >=")
        object.__setattr__(self, "value", _number(self.figure, self.value))

    def text(self) -> str:
        """As it stands in a goal: ``drop<=1%``."""
        return f"{self.figure}{self.op}{_exact(self.figure, self.value)}"

    def excess(self, value: float) -> float:
        """How far a figure is beyond the limit, in its own unit; 0 within it (and within a rounding error)."""
        beyond = value - self.value if self.op == "<=" else self.value - value
        return beyond if beyond > _SLACK * max(1.0 if self.figure not in _METRICS else 0.0, abs(self.value)) else 0.0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a run is to reach: at most one objective, and limits.

    `drop` is the absolute change for the worse in the metric's own unit (1% is 0.01: from 0.93 to 0.92);
    `relative_drop` is that change divided by the source's metric.

    Attributes:
        minimize: The figure to make small, for example "latency_ms".
        maximize: The figure to make large: "throughput_per_s" or "metric".
        max_drop: Largest `drop`, as a fraction of 1.
        max_relative_drop: Largest `relative_drop`, as a fraction of 1.
        limits: Bounds on other figures.

    Without an objective, the smallest file that keeps the limits wins.

    Raises:
        GoalError: It names no known figure, contradicts itself, or asks for nothing.

    >>> Goal(minimize="latency_ms", max_drop=0.01).text()
    'drop<=1%, minimize latency_ms'
    """

    minimize: str | None = None
    maximize: str | None = None
    max_drop: float | None = None
    max_relative_drop: float | None = None
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        limits = []
        for limit in self.limits:  # drop<=... has a field of its own, so that equal goals are equal values
            field = {"drop": "max_drop", "relative_drop": "max_relative_drop"}.get(limit.figure)
            if field is None or limit.op != "<=":
                limits.append(limit)
                continue
            if getattr(self, field) is not None:
                raise _twice(limit.figure)
            object.__setattr__(self, field, limit.value)
        object.__setattr__(self, "limits", tuple(limits))
        for figure, field in (("drop", "max_drop"), ("relative_drop", "max_relative_drop")):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, _number(figure, getattr(self, field)))
        bounds = [(limit.figure, limit.op) for limit in limits]
        repeated = next((figure for i, (figure, op) in enumerate(bounds) if (figure, op) in bounds[:i]), None)
        if repeated is not None:
            raise _twice(repeated)
        self._check_objective()

    def _check_objective(self) -> None:
        if self.minimize is not None and self.maximize is not None:
            raise GoalError(
                "a goal has one objective",
                got=f"minimize {self.minimize} and maximize {self.maximize}",
                expected="one figure to minimize or maximize",
                remedy=f"bound the other one, for example {_EXAMPLE}",
            )
        figure = self.minimize if self.minimize is not None else self.maximize
        if figure is None:
            if not self.all_limits():
                raise GoalError("the goal asks for nothing", got="no clause", expected=f"for example {_EXAMPLE}")
            return
        if figure not in FIGURES:
            raise _unknown_figure(figure)
        wrong = (self.minimize is not None and figure == "throughput_per_s") or (
            self.maximize is not None and figure not in ("throughput_per_s", "metric")
        )
        if wrong:
            word, other = ("minimize", "maximize") if self.minimize is not None else ("maximize", "minimize")
            raise GoalError(
                f"to {word} {figure} makes the network worse",
                got=f"{word} {figure}",
                expected=f"{other} {figure}",
                remedy=f"write {other} {figure}",
            )

    @classmethod
    def parse(cls, text: str) -> Goal:
        """A goal in words: ``"latency_ms<=5, drop<=1%, minimize size_bytes"``.

        Values take units: % for metric, drop and relative_drop; B, KB, KiB, MB, MiB, GB, GiB (and k, M, G) for bytes;
        k, M, G for parameters and macs; us, ms, s; uJ, mJ, J.

        Raises:
            GoalError: Points at the word that can't be read.

        >>> Goal.parse("drop<=0.5%, size_bytes<=2MB").max_drop
        0.005
        """
        from penjing.search.goal_text import parse

        return parse(text)

    def text(self) -> str:
        """The goal in words, in one fixed form; `parse` reads the same goal back."""
        clauses = [limit.text() for limit in self.all_limits()]
        if self.minimize is not None:
            clauses.append(f"minimize {self.minimize}")
        if self.maximize is not None:
            clauses.append(f"maximize {self.maximize}")
        return ", ".join(clauses)

    def all_limits(self) -> tuple[Limit, ...]:
        """Every limit, `max_drop` and `max_relative_drop` among them."""
        drops = (("drop", self.max_drop), ("relative_drop", self.max_relative_drop))
        return (*self.limits, *(Limit(figure, "<=", value) for figure, value in drops if value is not None))

    def objective(self) -> tuple[str, int]:
        """The figure to rank by, and 1 where smaller is better, -1 where larger is."""
        if self.maximize is not None:
            return self.maximize, -1
        return self.minimize or DEFAULT, 1
