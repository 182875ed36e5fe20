"""Comparison of source and artifact: every figure of both, and the artifact's gain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from penjing import records
from penjing.records import steadiness
from penjing.records.figures import FIGURES, Figure
from penjing.report import numbers

_SAME = 0.005  # gains closer to 1 than this are reported as "same"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of source and artifact; a `gain` above 1 means that the artifact is better."""

    key: str
    label: str
    source: float | None
    artifact: float | None
    source_text: str
    artifact_text: str
    source_note: str = ""
    artifact_note: str = ""
    note: str = ""  # on both figures
    gain: float | None = None
    words: str = ""  # the gain in words: "3.1× faster"
    floor: float | None = None  # figure of the source in fp32 in the artifact's runtime, the baseline of compression
    floor_text: str = ""
    floor_words: str = ""
    optional: bool = False  # shown only if it was measured
    reference: float | None = None  # figure of the network that drops are relative to, if it is not the source
    reference_text: str = ""

    @property
    def better(self) -> bool | None:
        """Whether the artifact is better (True) or worse (False); None if they are equal or unknown."""
        return None if self.gain is None or abs(self.gain - 1) < _SAME else self.gain > 1


def rows(record: records.Record) -> tuple[Row, ...]:
    """All figures in order of importance, without optional ones that were measured on neither side."""
    source, artifact = record.source, measured(record)
    plain = floor(record, record.chosen) if record.chosen else None
    if plain is not None and record.chosen is not None and plain is record.chosen.measured:
        plain = None  # nothing was compressed
    sides = source, artifact
    every = [_metric(record, *sides)]
    for figure in FIGURES.values():
        if figure.label:
            every.append(_DETAILS.get(figure.name, _as_measured)(_row(figure, *sides), *sides, plain))
        if figure.name == "latency_ms":
            every.append(_p95(*sides))
    shown = tuple(r for r in every if not r.optional or r.source is not None or r.artifact is not None)
    return shown if record.reference is None else tuple(_with_reference(r, record.reference) for r in shown)


def _with_reference(row: Row, reference: records.Reference) -> Row:
    """The row with the figure of the reference added."""
    figures = reference.measured
    if row.key == "metric":
        return replace(row, reference=figures.metric, reference_text=numbers.metric(figures.metric, row.label))
    figure = FIGURES.get(row.key)
    value = None if figure is None or figure.read is None else figure.read(figures)
    if figure is None or value is None:
        return row
    return replace(row, reference=value, reference_text=numbers.figure(value, figure.unit))


def against(record: records.Record) -> str:
    """A note on which network drops are relative to; "" if it is the source."""
    if record.reference is None:
        return ""
    return (
        f"drop is against the reference {record.reference.name}, {numbers.metric(record.baseline, record.metric_name)}"
    )


def measured(record: records.Record) -> records.Measured:
    """The figures of the delivered artifact; all None without one."""
    chosen = record.chosen
    return record.artifact or (chosen.measured if chosen else records.Measured())


def floor(record: records.Record, candidate: records.Candidate) -> records.Measured | None:
    """The source in fp32 in a candidate's runtime: the effect of the runtime alone. None if it was not built.

    It is the fp32 candidate, unless that has another network than the source, such as one with binary layers.
    """
    plain = (
        c.measured
        for c in record.candidates
        if (c.runtime, c.precision) == (candidate.runtime, "fp32")
        and not any(row.executed in ("binary", "ternary") for row in c.layers)
    )
    return record.floors.get(candidate.runtime) or next(plain, None)


def speedup(record: records.Record, candidate: records.Candidate) -> float | None:
    """Speed-up of a candidate over the source; None if it was not measured, or the timings are unsteady."""
    return _speedup(record.source.latency_ms, candidate.measured.latency_ms)


def speedup_over_floor(record: records.Record, candidate: records.Candidate) -> float | None:
    """Speed-up of a candidate over fp32 in the same runtime; None if unknown, and for the fp32 candidate itself."""
    plain = floor(record, candidate)
    if plain is None or plain is candidate.measured:
        return None
    return _speedup(plain.latency_ms, candidate.measured.latency_ms)


def _speedup(before: records.Latency | None, after: records.Latency | None) -> float | None:
    if before is None or after is None or min(before.median, after.median) <= 0 or steadiness.doubt(before, after):
        return None
    return steadiness.speedup(before, after)


def busy(record: records.Record, candidate: records.Candidate) -> str:
    """Why a candidate's timing is unsteady, in words; "" if it is steady or was not measured."""
    before, after = record.source.latency_ms, candidate.measured.latency_ms
    return "" if before is None or after is None else after.doubt or steadiness.doubt(before, after)


def faster(before: records.Latency | None, after: records.Latency | None, than: str = "") -> str:
    """A speed-up in words; for unsteady timings its range, with a note that the machine was busy.

    >>> slow, fast = (records.Latency(median=m, p95=m, spread=0, batch=1, threads=1, calls=9) for m in (9.6, 1.0))
    >>> faster(slow, fast, "torch"), faster(fast, fast, "torch"), faster(slow, fast)
    ('9.6× faster than torch', 'as fast as torch', '9.6× faster')
    >>> faster(replace(slow, spread=0.9), fast, "torch")
    'busy machine: about 9.6× as fast as torch'
    """
    if before is None or after is None or min(before.median, after.median) <= 0:
        return ""
    if steadiness.doubt(before, after):
        low, high = (numbers.figure(value, "×") for value in steadiness.between(before, after))
        span = f"about {low}" if low == high else f"{low} to {high}"
        return f"busy machine: {span} as fast" + (f" as {than}" if than else "")
    return than_whom(in_words(steadiness.speedup(before, after), "faster", "slower"), "as fast", than)


def smaller(before: int | None, after: int | None, than: str = "") -> str:
    """A reduction in size in words.

    >>> smaller(360, 100, "the source"), smaller(100, 100, "the source"), smaller(100, 200)
    ('3.6× smaller than the source', 'as large as the source', '2.0× larger')
    """
    return than_whom(in_words(gain(before, after), "smaller", "larger"), "as large", than)


def than_whom(words: str, same: str, whom: str) -> str:
    """A change with what it is relative to: `words` "than" `whom`, or `same` "as" `whom`; "" without a change."""
    if not whom or not words:
        return words
    return f"{same} as {whom}" if words == "same" else f"{words} than {whom}"


def by_select(record: records.Record) -> str:
    """A note that the candidates' metrics are computed on other data than those of source and artifact."""
    return f"by Task.select, where the source has {numbers.metric(record.selected, record.metric_name)}"


def gain(source: float | None, artifact: float | None, higher_is_better: bool = False) -> float | None:
    """The ratio by which the artifact's figure is better; None if a figure is missing or not positive."""
    if source is None or artifact is None or source <= 0 or artifact <= 0:
        return None
    return artifact / source if higher_is_better else source / artifact


def in_words(value: float | None, better: str, worse: str) -> str:
    """A gain in words.

    >>> in_words(3.14, "faster", "slower"), in_words(0.5, "faster", "slower"), in_words(1.0, "faster", "slower")
    ('3.1× faster', '2.0× slower', 'same')
    """
    if value is None:
        return ""
    if abs(value - 1) < _SAME:
        return "same"
    times = value if value > 1 else 1 / value
    # Close to 1, two digits would read as "1.0× faster".
    text = f"{times:.2f}×" if times < 1.095 else numbers.figure(times, "×")
    return f"{text} {better if value > 1 else worse}"


def _row(figure: Figure, source: records.Measured, artifact: records.Measured) -> Row:
    before, after = (None if figure.read is None else figure.read(row) for row in (source, artifact))
    value = gain(before, after, higher_is_better=figure.better == "more")
    return Row(
        key=figure.name,
        label=figure.label,
        source=before,
        artifact=after,
        source_text=numbers.figure(before, figure.unit),
        artifact_text=numbers.figure(after, figure.unit),
        gain=value,
        words=in_words(value, *figure.words),
        optional=figure.optional,
    )


def _metric(record: records.Record, source: records.Measured, artifact: records.Measured) -> Row:
    name, after = record.metric_name, artifact.metric
    before = source.metric if record.reference is None else record.reference.measured.metric
    value, words = None, ""
    if before is not None and after is not None:
        loss = before - after if record.higher_is_better else after - before
        points = numbers.is_share(name, before, after)
        amount = f"{100 * abs(loss):.2f} points" if points else numbers.significant(abs(loss))
        # A drop is given in the metric's unit: as a ratio, 93 % to 92 % would be negligible.
        value = 1 - loss / abs(before) if before else None
        words = "same" if loss == 0 else f"{amount} {'worse' if loss > 0 else 'better'}"
    return Row(
        key="metric",
        label=name,
        source=source.metric,
        artifact=after,
        source_text=numbers.metric(source.metric, name),
        artifact_text=numbers.metric(after, name),
        note="" if record.higher_is_better else "lower is better",
        gain=value,
        words=words,
    )


def _as_measured(row: Row, source: records.Measured, artifact: records.Measured, plain: records.Measured | None) -> Row:
    return row


def _size(row: Row, source: records.Measured, artifact: records.Measured, plain: records.Measured | None) -> Row:
    if plain is None or plain.size_bytes is None or artifact.size_bytes is None:
        return row
    return replace(
        row,
        floor=plain.size_bytes,
        floor_text=numbers.figure(plain.size_bytes, "bytes"),
        floor_words=smaller(plain.size_bytes, artifact.size_bytes),
    )


def _throughput(row: Row, source: records.Measured, artifact: records.Measured, plain: records.Measured | None) -> Row:
    before, after = source.latency_ms, artifact.latency_ms
    if row.gain is None or before is None or after is None or before.batch != after.batch:
        return row
    gain_in_speed = _speedup(before, after)  # from the rounds, like the latency's
    return replace(row, gain=gain_in_speed, words=in_words(gain_in_speed, "more", "less") or "busy machine")


def _latency(row: Row, source: records.Measured, artifact: records.Measured, plain: records.Measured | None) -> Row:
    before, after = source.latency_ms, artifact.latency_ms
    row = replace(row, gain=_speedup(before, after), words=faster(before, after))
    if plain is not None and plain.latency_ms is not None and after is not None:
        row = replace(
            row,
            floor=plain.latency_ms.median,
            floor_text=numbers.figure(plain.latency_ms.median, "ms"),
            floor_words=faster(plain.latency_ms, after),
        )
    settings = [f"batch {t.batch}, {plural(t.threads, 'thread')}" for t in (before, after) if t]
    alike = len(set(settings)) == 1
    return replace(
        row,
        source_note=_timing(before, not alike),
        artifact_note=_timing(after, not alike),
        note=f"median, {settings[0]}" if alike else "median",
    )


def _timing(latency: records.Latency | None, with_settings: bool) -> str:
    if latency is None:
        return ""
    settings = f", batch {latency.batch}, {plural(latency.threads, 'thread')}" if with_settings else ""
    return f"p95 {numbers.figure(latency.p95, 'ms')}, spread {numbers.share(latency.spread)}{settings}"


def _p95(source: records.Measured, artifact: records.Measured) -> Row:
    before, after = source.latency_ms, artifact.latency_ms
    row = replace(_row(_P95, source, artifact), key="p95")
    if before is None or after is None or not row.words:
        return row
    doubted = steadiness.doubt(before, after) or steadiness.tails(before) or steadiness.tails(after)
    return replace(row, gain=None, words="busy machine") if doubted else row


def _energy(row: Row, source: records.Measured, artifact: records.Measured, plain: records.Measured | None) -> Row:
    before, after = source.energy_mj, artifact.energy_mj
    if before is None or after is None or before.method == after.method == "model":
        return replace(row, note=by(before or after))
    return replace(row, source_note=by(before), artifact_note=by(after))


def by(energy: records.Energy | None) -> str:
    """How an energy is known, in words.

    >>> by(records.Energy(value=1.0, method="model")), by(records.Energy(value=1.0, method="measured", source="RAPL"))
    ('modelled', 'measured, RAPL')
    """
    if energy is None or energy.method == "model":
        return "" if energy is None else "modelled"
    spread = "" if energy.spread is None else f", spread {numbers.share(energy.spread)}"
    return f"{energy.method}{f', {energy.source}' if energy.source else ''}{spread}"


_P95 = replace(
    FIGURES["latency_ms"],
    label="Latency p95",
    read=lambda row: row.latency_ms.p95 if row.latency_ms is not None else None,
)
_DETAILS = {"latency_ms": _latency, "throughput_per_s": _throughput, "size_bytes": _size, "energy_mj": _energy}
"""Figure → function that adds its baseline, its notes, or a gain that is not the ratio of the two values."""


def plural(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1.

    >>> plural(1, "thread"), plural(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def devices(record: records.Record) -> tuple[tuple[str, ...], ...]:
    """Device, threads, latency, time to load, peak memory, energy and parity in words: the record's machine first."""
    rows: list[tuple[str, ...]] = []
    chosen = record.chosen
    if chosen is not None:
        here = chosen.measured
        planned = next((parity for parity in chosen.parity if parity.against == "planned"), None)
        rows.append(
            (
                f"{record.machine.processor}, {record.machine.system} (the record's machine)",
                str(here.latency_ms.threads) if here.latency_ms else numbers.ABSENT,
                numbers.figure(here.latency_ms.median if here.latency_ms else None, "ms"),
                numbers.figure(here.load_ms, "ms"),
                numbers.figure(here.peak_memory_bytes, "bytes"),
                numbers.figure(here.energy_mj.value if here.energy_mj else None, "mJ"),
                numbers.ABSENT if planned is None else numbers.figure(planned.least_db, "dB"),
            )
        )
    for device_run in record.devices:
        worst = min(device_run.parity, key=lambda row: (row.holds, row.snr_db))
        rows.append(
            (
                f"{device_run.device.processor}, {device_run.device.system}",
                str(device_run.latency_ms.threads),
                numbers.figure(device_run.latency_ms.median, "ms"),
                numbers.figure(device_run.load_ms, "ms"),
                numbers.figure(device_run.peak_memory_bytes, "bytes"),
                numbers.figure(device_run.energy_mj.value if device_run.energy_mj else None, "mJ"),
                numbers.figure(worst.snr_db, "dB") + ("" if worst.holds else ": too far"),
            )
        )
    return tuple(rows)
