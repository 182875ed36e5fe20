"""A diagnosis in words: what to expect of a run, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable

from penjing.records import Diagnosis, Effort, Expectation, Finding, Record
from penjing.report import numbers

TOLD = 1.03  # a smaller bound is not worth a line at the start of a run
BRIEF = 4  # findings there


def lines(diagnosis: Diagnosis) -> list[str]:
    """Expectations, findings and, before or after a run, its effort: a line each."""
    shown = [gain(row) for row in diagnosis.expectations]
    shown += [f"{finding.kind}: {finding.words}" for finding in ordered(diagnosis.findings)]
    if not diagnosis.findings:
        shown.append("nothing stands in the way: every layer runs in integers and is bound by its arithmetic")
    if diagnosis.effort is not None:
        shown.append(effort(diagnosis.effort))
    return shown


def brief(diagnosis: Diagnosis) -> list[str]:
    """The same in a few lines, for the start of a run."""
    best: dict[str, Expectation] = {}
    for row in diagnosis.expectations:
        if row.runtime not in best or (row.faster or 0) > (best[row.runtime].faster or 0):
            best[row.runtime] = row
    shown = [gain(row) for row in best.values()]
    weighty = [f for f in ordered(diagnosis.findings) if f.bound is None or f.bound >= TOLD]
    shown += [f"{finding.kind}: {finding.words}" for finding in weighty[:BRIEF]]
    return shown


def after(record: Record) -> list[str]:
    """What was expected of the chosen candidate and of the run, beside what came of it."""
    diagnosis, chosen = record.diagnosis, record.chosen
    if diagnosis is None or chosen is None:
        return []
    rows = [r for r in diagnosis.expectations if (r.runtime, r.precision) == (chosen.runtime, chosen.precision)]
    shown = [f"expected: {gain(row)}" for row in rows]
    return [*shown, effort(diagnosis.effort)] if diagnosis.effort is not None else shown


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Those that stand in the way altogether first, then those with the largest bound."""
    return sorted(findings, key=lambda f: (f.bound is not None, -(f.bound or 0)))


def gain(row: Expectation) -> str:
    """What a precision gains at most, and what it gained.

    >>> gain(Expectation(runtime="openvino", precision="int8", faster=3.31, smaller=3.95, faster_measured=2.6))
    'openvino-int8: at most 3.3× faster than fp32 there, its weights 4.0× smaller; measured 2.6× faster'
    """
    speed = (
        "of the same speed as fp32 there" if row.faster == 1 else f"at most {times(row.faster)} faster than fp32 there"
    )
    first = "" if row.faster is None else f"{speed}, "
    size = f"{first}its weights {times(row.smaller)} smaller" if row.smaller > 1 else f"{first}of the same size"
    after = []
    if row.faster_measured is not None:
        after.append(f"{times(row.faster_measured)} faster")
    if row.smaller_measured is not None:
        after.append(f"its files {times(row.smaller_measured)} smaller")
    text = f"{row.runtime}-{row.precision}: {size}"
    text += f"; measured {', '.join(after)}" if after else ""
    return text + (f" ({row.doubt})" if row.doubt else "")


def effort(row: Effort) -> str:
    """What a run takes.

    >>> effort(Effort(candidates=8, expected_s=130, unknown=("QAT",), expected_memory_bytes=2_000_000_000))
    '8 artifacts: about 2 min 10 s and 2.00 GB of memory, QAT not counted'
    """
    plural = "" if row.candidates == 1 else "s"
    text = f"{row.candidates} artifact{plural}: about {numbers.duration(row.expected_s)}"
    text += f" and {numbers.figure(row.expected_memory_bytes, 'bytes')} of memory"
    text += f", {', '.join(row.unknown)} not counted" if row.unknown else ""
    if row.took_s is not None:
        peak = numbers.figure(row.peak_memory_bytes, "bytes")
        text += f"; it took {numbers.duration(row.took_s)} and {peak}"
    return text


def times(value: float | None) -> str:
    """A factor; close to 1 with two digits behind the point.

    >>> times(3.312), times(1.04), times(None)
    ('3.3×', '1.04×', 'not known')
    """
    if value is None:
        return "not known"
    return f"{value:.2f}×" if value < 1.095 else numbers.figure(value, "×")
