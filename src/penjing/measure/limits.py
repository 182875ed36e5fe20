"""What an artifact has to reach to be offered: the limits of every precision, and the judgement of its differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from penjing.measure.columns import Difference
from penjing.measure.decibels import decibels
from penjing.records import Parity, ParityRow, Rejection


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an artifact of one precision has to keep of the torch network that it was exported from.

    Attributes:
        snr_db: Least signal-to-noise ratio of every output and group of columns.
        told_db: Below this it is told, and no reason to reject.
        equal: Least share of equal values of outputs that are integers or booleans.
        operators: Their roundings add up: from so many on the limit sinks with their number; 0 where it does not.
        bits: Bits of the significand that values are rounded to: what the arithmetic can't keep is not asked for.
    """

    snr_db: float
    told_db: float = 0.0
    equal: float
    bits: int
    operators: int = 0


LIMITS = {
    "fp32": Limits(snr_db=60, equal=0.99, bits=24),
    "fp16": Limits(snr_db=35, equal=0.95, bits=11),
    "bf16": Limits(snr_db=30, equal=0.8, bits=8, operators=16),
    "int8": Limits(snr_db=30, told_db=40, equal=0.8, bits=0, operators=32),
    "int8-bf16": Limits(snr_db=30, equal=0.8, bits=0, operators=32),
}
"""Against the torch network with the same quantizers ("planned"). The bounds of fp16 and bf16 leave room below what
EfficientNet-Lite0 keeps with its 50 operators, 47 and 28 dB; ResNet-20 keeps 72 and 47."""
SOURCE_TOLD_DB = 15.0
"""An integer artifact below this against the source network draws a warning; it is what was planned all the same."""
_SPARE_DB = {24: 20.0, 11: 3.0, 8: 3.0}  # by bits: noise depends on the order of sums, of float32 most
LEAST_DB = 25.0  # however many operators there are
_DEEP_SHARE = 0.5  # of the plan's own noise, where roundings of many operators add up: MiniLM adds a third
_SMALL_SHARE = 0.25  # of the plan's own noise, where columns are small beside others


def of(precision: str) -> Limits:
    """The limits of a precision; those of float32 where it is not known."""
    return LIMITS.get(precision, LIMITS["fp32"])


def judged(
    found: Sequence[Difference],
    names: Sequence[str],
    precision: str,
    inherent: Callable[[], Sequence[Difference]] | None = None,
    operators: int = 0,
) -> tuple[ParityRow, ...]:
    """Rows with limits, for a comparison with what was planned.

    A limit is lower where the values can't be told better: a floating-point artifact is not asked for more than what
    rounding to its significand leaves of this network; roundings to integers and to bfloat16 add up with the operators,
    so that the limit sinks with their number (down to 25 dB); and in columns that are small beside others an integer
    artifact may add a quarter of the noise that the plan itself has there.

    Args:
        found: One for every part.
        names: Of the outputs.
        precision: Of the artifact.
        inherent: The same parts' noise: of the network in float32 against float64, or, of an integer artifact, of the
            plan against floating point. Asked for where a limit does not hold.
        operators: That the plan quantizes, or that compute in floating point.
    """
    limits, why = of(precision), ""
    if limits.operators and operators > limits.operators:
        limit = max(min(limits.snr_db, LEAST_DB), limits.snr_db - 10 * math.log10(operators / limits.operators))
        limits, why = replace(limits, snr_db=limit), f"roundings of {operators} operators add up"
    rows = told(found, names)
    strict = tuple(
        _with(row, None, limits.equal) if row.equal is not None else _with(row, limits.snr_db, None, why)
        for row in rows
    )
    if all(row.holds for row in strict):
        return strict
    scale = max((d.signal / d.values for d in found if d.values), default=0.0)
    noise = {d.columns: d for d in (inherent() if inherent is not None else ())}
    failing = [not row.holds and row.equal is None and not row.fault for row in strict]
    return tuple(
        _lowered(row, d, noise.get(d.columns), limits, scale) if fails else row
        for row, d, fails in zip(strict, found, failing, strict=True)
    )


def told(found: Sequence[Difference], names: Sequence[str]) -> tuple[ParityRow, ...]:
    """Rows without limits."""
    return tuple(
        ParityRow(
            output=names[d.columns.port] if d.columns.port < len(names) else f"output {d.columns.port}",
            columns=d.columns.words,
            snr_db=d.snr_db,
            largest=d.largest,
            equal=d.equal,
            batch=d.batch,
            fault=d.fault,
        )
        for d in found
    )


def _with(row: ParityRow, limit_db: float | None, limit_equal: float | None, why: str = "") -> ParityRow:
    return replace(row, limit_db=limit_db, limit_equal=limit_equal, why=why)


def _lowered(row: ParityRow, d: Difference, inherent: Difference | None, limits: Limits, scale: float) -> ParityRow:
    """The row with the limit that its values allow, where that is lower."""
    allowed, why = d.values * 1e-12 * scale, "the values are next to nothing beside the others"
    mine = inherent.noise * d.values / inherent.values if inherent is not None and inherent.values else 0.0
    if inherent is not None and limits.bits:
        rounding = mine * 10 ** (_SPARE_DB[limits.bits] / 10) * 4.0 ** (24 - limits.bits)
        if rounding > allowed:
            allowed, why = rounding, f"float32 itself keeps {inherent.snr_db:.0f} dB of the network's values here"
    elif inherent is not None and not limits.bits:
        share = _SMALL_SHARE if d.columns.smaller else _DEEP_SHARE if row.why else 0.0
        if mine * share > allowed:
            allowed, why = mine * share, f"the plan itself keeps {inherent.snr_db:.0f} dB here"
    if d.noise <= allowed and not d.signal:
        return _with(row, None, None, why)  # no ratio tells anything where there is no signal
    limit = decibels(d.signal, allowed)
    return _with(row, limit, None, why) if limit < limits.snr_db and d.signal else row


def rejection(parities: Sequence[Parity]) -> Rejection | None:
    """Why an artifact with these comparisons is not to be offered; None where every limit holds."""
    for parity in parities:
        worst = parity.worst
        if worst is None or worst.holds:
            continue
        return Rejection(
            reason=f"{worst.place}: {failure(worst)} {AGAINST[parity.against]}{_at(worst, parity)}",
            against=parity.against,
            output=worst.place,
            snr_db=None if worst.fault or worst.limit_db is None else worst.snr_db,
            limit_db=None if worst.fault else worst.limit_db,
        )
    return None


AGAINST = {
    "planned": "against what was planned, computed in torch",
    "source": "against the source network",
}


def failure(row: ParityRow) -> str:
    """What does not hold, in words."""
    if row.fault:
        return row.fault
    if row.equal is not None and row.limit_equal is not None:
        return f"{row.equal:.1%} of the values are equal, at least {row.limit_equal:.0%} have to be"
    return f"{row.snr_db:.1f} dB is below the limit of {row.limit_db:.0f} dB" if row.limit_db is not None else ""


def _at(row: ParityRow, parity: Parity) -> str:
    return f", in a call of {row.batch}" if row.batch and row.batch != parity.samples else ""
