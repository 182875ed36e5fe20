"""Parity limits of every precision, and whether an artifact's differences stay within them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from penjing.measure.columns import Columns, Difference
from penjing.measure.decibels import decibels
from penjing.records import Parity, ParityRow, Rejection


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How close an artifact of one precision has to be to the torch network that it was exported from.

    Attributes:
        snr_db: Lowest signal-to-noise ratio accepted for every output and group of columns, in decibels.
        told_db: Ratio below which a warning is given, in decibels; the artifact is still accepted.
        equal: Lowest share of equal values accepted for integer and boolean outputs.
        rounding: Relative error of a rounded value. An artifact need not be closer to the network than the network is
            to itself with such errors.
    """

    snr_db: float
    told_db: float = 0.0
    equal: float
    rounding: float


# Relative error of significands of 11 and 8 bits. A runtime may fuse three of torch's operators.
_FLOAT32 = 2.0**-21  # three bits less than the format: other orders of summation, and approximations of exp and erf
LIMITS = {
    "fp32": Limits(snr_db=60, equal=0.99, rounding=_FLOAT32),
    "fp16": Limits(snr_db=35, equal=0.95, rounding=2.0**-12),
    "bf16": Limits(snr_db=30, equal=0.8, rounding=2.0**-9),
    "int8": Limits(snr_db=30, told_db=40, equal=0.8, rounding=_FLOAT32),
    "int8-bf16": Limits(snr_db=30, equal=0.8, rounding=_FLOAT32),  # below this the int8 candidate is the better one
    "int8-fp16": Limits(snr_db=30, told_db=40, equal=0.8, rounding=2.0**-12),
}
"""Precision → limits for the comparison with the torch network with the same quantizers ("planned")."""
SOURCE_TOLD_DB = 15.0
"""An integer artifact below this against the source network gets a warning: quantization itself loses that much."""
LEAST_DB = 15.0
"""Lowest limit, in decibels, however sensitive the network is: below it, rounding and errors can't be distinguished."""
SELECTED_DB = 0.0
"""The same behind a selection of boxes: one that trades places with its equal moves whole rows of the outputs."""
_SPARE = 2.0  # times the noise of a network with rounding errors: 3 dB
_CLEAR_DB = 1.0
"""An artifact that exceeds a lowered limit by so much is not compared with further tries: `verify` on another processor
finds it within the limit too."""
_NOTHING = 1e-12  # times the power per value of the largest part


def of(precision: str) -> Limits:
    """The limits of a precision; an unknown one has those of float32."""
    return LIMITS.get(precision, LIMITS["fp32"])


def judged(
    differences: Sequence[Difference],
    names: Sequence[str],
    precision: str,
    elsewhere: Callable[[float], Iterable[Sequence[Difference]]] | None = None,
    least_db: float = LEAST_DB,
    few: Callable[[float], Sequence[Difference]] | None = None,
    rounding: float = 0.0,
) -> tuple[ParityRow, ...]:
    """Rows with limits, for the comparison with the plan.

    A limit is lowered where it can't be met: where the torch network with rounding errors differs more from itself
    (down to `least_db`), and where values are negligible relative to those of the other parts.

    Args:
        differences: One for every part.
        names: Names of the outputs.
        precision: Precision of the artifact.
        elsewhere: Maps a relative rounding error to tries, each the differences, part by part, between the torch
            network with such errors and without. Called only if a limit does not hold. The worst of the tries counts;
            no more of them are taken than are needed.
        least_db: The lowest limit that such errors can give.
        few: As one of the tries, on a few of the samples. It counts if it suffices: then there are no others.
        rounding: Relative error of the runtime's own numbers, where that is larger than the precision's.
    """
    limits = of(precision)
    rounding = max(limits.rounding, rounding)
    rows = tuple(
        replace(row, limit_db=limits.snr_db) if row.equal is None else replace(row, limit_equal=limits.equal)
        for row in told(differences, names)
    )
    failing = [not row.holds and row.equal is None and not row.fault for row in rows]
    if not any(failing):
        return rows
    largest = max((d.signal / d.values for d in differences if d.values), default=0.0)
    itself: dict[Columns, Difference] = {}

    def lowered() -> tuple[ParityRow, ...]:
        return tuple(
            _lowered(row, d, _allowed(d, itself.get(d.columns), largest, least_db)) if fails else row
            for row, d, fails in zip(rows, differences, failing, strict=True)
        )

    def sufficient() -> bool:
        return all(_clear(row) for row, fails in zip(lowered(), failing, strict=True) if fails)

    if few is not None:
        itself |= {d.columns: d for d in few(rounding)}
        if sufficient():
            return lowered()
        itself.clear()
    for one in elsewhere(rounding) if elsewhere is not None else ():
        itself |= {d.columns: min(d, itself.get(d.columns, d), key=lambda try_: try_.snr_db) for d in one}
        if sufficient():
            break
    return lowered()


def _clear(row: ParityRow) -> bool:
    """Whether a row holds by more than what another processor's rounding changes."""
    return row.holds and (row.limit_db is None or row.snr_db >= row.limit_db + _CLEAR_DB)


def told(differences: Sequence[Difference], names: Sequence[str]) -> tuple[ParityRow, ...]:
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
        for d in differences
    )


def _allowed(d: Difference, itself: Difference | None, largest: float, least_db: float) -> list[tuple[float, str]]:
    """Noise (sum of squares) that is not the artifact's fault, for every rule, with the rule in words."""
    rules = [(d.values * largest * _NOTHING, "the values are negligible beside the others")]
    if itself is not None and itself.values and not itself.fault:
        noise = _SPARE * itself.noise * d.values / itself.values
        if d.signal:
            noise = min(noise, d.signal * 10 ** (-least_db / 10))
        rules.append((noise, f"torch itself keeps {itself.snr_db:.0f} dB here when every value is off by rounding"))
    return rules


def _lowered(row: ParityRow, d: Difference, rules: Sequence[tuple[float, str]]) -> ParityRow:
    """The row with the lowest limit that the rules give, if that is lower than its own."""
    allowed, why = max(rules)
    if not d.signal:  # without a signal there is no ratio
        return replace(row, limit_db=None, why=why) if d.noise <= allowed else row
    limit = decibels(d.signal, allowed)
    return replace(row, limit_db=limit, why=why) if row.limit_db is not None and limit < row.limit_db else row


def rejection(parities: Sequence[Parity]) -> Rejection | None:
    """Why an artifact with these comparisons is rejected; None if every limit holds."""
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
    """The limit that a row exceeds, in words; "" if it has none."""
    if row.fault:
        return row.fault
    if row.equal is not None and row.limit_equal is not None:
        return f"{row.equal:.1%} of the values are equal, at least {row.limit_equal:.0%} have to be"
    return f"{row.snr_db:.1f} dB is below the limit of {row.limit_db:.0f} dB" if row.limit_db is not None else ""


def _at(row: ParityRow, parity: Parity) -> str:
    return f", in a call of {row.batch}" if row.batch and row.batch != parity.samples else ""
