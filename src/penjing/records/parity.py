"""How far an artifact is from what it was to compute, and why it is not offered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """The same difference for one output, or for those of its columns whose values are of one size.

    Attributes:
        output: Its name.
        columns: Which of its columns, for example "0-3 of the last axis"; "" for the whole output.
        snr_db: Signal power over noise power in decibels.
        largest: The largest difference.
        equal: Of outputs that are not floating-point numbers, the share of values that are equal; None of others.
        batch: Samples in the call that came out worst.
        fault: What no decibels say: NaN, or an infinity on one side alone; "" where there is none.
        limit_db: What `snr_db` has to reach; None where it is told and not judged.
        limit_equal: What `equal` has to reach.
        why: Why the limit is lower than that of the precision; "" where it is not.
    """

    output: str
    columns: str = ""
    snr_db: float
    largest: float
    equal: float | None = None
    batch: int = 0
    fault: str = ""
    limit_db: float | None = None
    limit_equal: float | None = None
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether every figure reaches its limit."""
        return not self.shortfall

    @property
    def shortfall(self) -> float:
        """How far below its limit: in decibels or hundredths of equal values, 1000 for a fault; 0 where all hold."""
        if self.fault:
            return 1000.0
        missing = max(0.0, self.limit_db - self.snr_db) if self.limit_db is not None else 0.0
        if self.equal is not None and self.limit_equal is not None:
            missing = max(missing, 100 * (self.limit_equal - self.equal))
        return missing

    @property
    def place(self) -> str:
        """The output and its columns in words."""
        return f"{self.output}, columns {self.columns}" if self.columns else self.output


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Difference between an artifact in its runtime and a torch network, over all outputs.

    `against` is "planned" (the torch network with the same quantizers: what the export should reproduce)
    or "source" (the network the user gave). `snr_db` is signal power over noise power in decibels.
    `agreement` is the share of samples with the same largest output, None where no output has classes.
    `rows` are the same figures per output and per group of columns, with the limits that they have to reach.
    """

    against: str
    largest: float
    mean: float
    snr_db: float
    agreement: float | None
    samples: int
    rows: tuple[ParityRow, ...] = ()

    @property
    def least_db(self) -> float:
        """Signal-to-noise of the worst output or group of columns; `snr_db` where there is but one."""
        if len({row.place for row in self.rows}) < 2:
            return self.snr_db
        return min((row.snr_db for row in self.rows if not row.fault), default=self.snr_db)

    @property
    def worst(self) -> ParityRow | None:
        """The row furthest below its limit; where all hold, the one that comes nearest to it."""

        def order(row: ParityRow) -> tuple[float, bool, float]:
            return -row.shortfall, row.limit_db is None, row.snr_db - (row.limit_db or 0.0)

        return min(self.rows, key=order, default=None)


@dataclass(frozen=True, kw_only=True)
class PairParity:
    """How far apart two artifacts with integers are, of different runtimes, on the same samples.

    Attributes:
        first: Name of a candidate.
        second: Name of another.
        agreement: Share of samples with the same largest output; None where no output has classes.
        rows: Per output and group of columns: power of the source's values over that of the differences. Their limits
            are what the two plans and the limits of parity allow (see `penjing.measure.between`).
    """

    first: str
    second: str
    agreement: float | None
    rows: tuple[ParityRow, ...]

    @property
    def worst(self) -> ParityRow | None:
        """The row furthest below its limit; where all hold, the one with most noise. None without rows."""
        return min(self.rows, key=lambda row: (-row.shortfall, row.equal is not None, row.snr_db), default=None)

    @property
    def holds(self) -> bool:
        """Whether every row is within what was stated."""
        return all(row.holds for row in self.rows)


def furthest(pairs: Sequence[PairParity]) -> PairParity | None:
    """The pair furthest beyond what was stated; where all hold, the one that differs most. None without pairs."""
    rows = [(pair, pair.worst) for pair in pairs]
    judged = [(pair, row) for pair, row in rows if row is not None]
    return min(judged, key=lambda each: (-each[1].shortfall, each[1].snr_db), default=(None, None))[0]


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why a candidate is not offered: it computes something else than its plan, or can't be judged here.

    Attributes:
        reason: In words, with figure and limit.
        against: "planned", or "" where no comparison tells it.
        output: The output (and columns) that is furthest below its limit.
        snr_db: Its signal-to-noise ratio; None where that is not the figure.
        limit_db: What it had to reach.
        operator: Site of the first operator whose values differ; None where none was found.
    """

    reason: str
    against: str = ""
    output: str = ""
    snr_db: float | None = None
    limit_db: float | None = None
    operator: str | None = None


def by_reason(reasons: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Candidates that share a reason, so that it is said once.

    Args:
        reasons: (name of the candidate, reason).

    Returns:
        (reason, names), in the order in which the reasons first came.

    >>> by_reason([("litert-fp32", "too large"), ("litert-int8", "NaN"), ("tvm-fp32", "too large")])
    [('too large', ['litert-fp32', 'tvm-fp32']), ('NaN', ['litert-int8'])]
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons:
        groups.setdefault(reason, []).append(name)
    return list(groups.items())
