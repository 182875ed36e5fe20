"""Several runs side by side, in words: a row for every figure, why figures are not ranked, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penjing import records
from penjing.records.comparison import Comparison, measured, value
from penjing.records.differences import Difference
from penjing.records.figures import FIGURES
from penjing.report import comparison as compared
from penjing.report import numbers
from penjing.report.html import setting

ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure or fact of all runs; `best` is True for the runs with the best value."""

    key: str
    label: str
    cells: tuple[str, ...]
    best: tuple[bool, ...] = ()
    good: tuple[bool, ...] = ()  # of a row that is yes or no


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One thing that differs: a cell for every run."""

    topic: str
    name: str
    cells: tuple[str, ...]


def rows(comparison: Comparison) -> tuple[Row, ...]:
    """Artifact and figures of every run; without figures that no run has."""
    runs = comparison.runs
    facts: tuple[tuple[str, str, Callable[[records.Record], str]], ...] = (
        ("chosen", "Artifact", lambda record: record.goal.chosen or ABSENT),
        ("runtime", "Runtime", lambda record: record.chosen.runtime if record.chosen else ABSENT),
        ("precision", "Precision", lambda record: record.chosen.precision if record.chosen else ABSENT),
    )
    met = tuple(run.record.goal.met for run in runs)
    texts = tuple(_outcome(run.record) for run in runs)
    table = [Row(key=key, label=label, cells=tuple(read(r.record) for r in runs)) for key, label, read in facts]
    table.append(Row(key="met", label="Goal", cells=texts, good=met))
    for name in ("metric", "drop", "latency_ms", "size_bytes", "packed_bytes", "peak_memory_bytes", "energy_mj",
                 "parameters", "macs"):  # fmt: skip
        if comparison.values(name):
            table.append(_figure(comparison, name))
        if name == "latency_ms" and comparison.values(name):
            table += _beside_latency(comparison)
    return tuple(table)


def reasons(comparison: Comparison) -> tuple[str, ...]:
    """Why figures are not ranked, a sentence each."""
    shown = ("metric", "drop", "latency_ms", "peak_memory_bytes", "energy_mj")
    sentences = []
    for conflict in comparison.conflicts:
        names = [n for n in shown if n in conflict.figures and comparison.values(n)]
        words = [_label(comparison, name).lower() if name != "metric" else "the metric" for name in names]
        if words:
            listed = ", ".join(words[:-1]) + (" and " if words[1:] else "") + words[-1]
            verb = "is" if len(words) == 1 else "are"
            sentences.append(f"{listed[0].upper()}{listed[1:]} {verb} not ranked: {conflict.reason}.")
    return tuple(sentences)


def changes(comparison: Comparison) -> tuple[Changed, ...]:
    """What differs between the runs, as text."""
    names = [run.name for run in comparison.runs]
    return tuple(
        Changed(topic=row.topic, name=row.name, cells=tuple(_cell(row, name, comparison) for name in names))
        for row in comparison.differences
    )


def same(comparison: Comparison) -> str:
    """What does not differ, in one sentence."""
    topics = {row.topic for row in comparison.differences}
    words = {"source": "source network", "data": "data", "recipe": "recipe", "machine": "machine", "timing": "threads",
             "versions": "versions", "seed": "seed"}  # fmt: skip
    alike = [word for topic, word in words.items() if topic not in topics]
    return f"The same in all: {', '.join(alike)}." if alike else ""


def _outcome(record: records.Record) -> str:
    if record.chosen is not None and record.chosen.rejection is not None:
        return "rejected"
    return "met" if record.goal.met else "not met"


def _figure(comparison: Comparison, name: str) -> Row:
    best = comparison.best(name)
    return Row(
        key=name,
        label=_label(comparison, name),
        cells=tuple(_text(run.record, name, comparison) for run in comparison.runs),
        best=tuple(run.name in best for run in comparison.runs),
    )


def _label(comparison: Comparison, name: str) -> str:
    if name == "metric":
        titles = {run.record.metric_name for run in comparison.runs}
        return titles.pop() if len(titles) == 1 else "metric"
    return {"macs": "MACs", "drop": "Drop"}.get(name) or FIGURES[name].label


def _text(record: records.Record, name: str, comparison: Comparison) -> str:
    number, artifact = value(record, name), measured(record)
    if number is None:
        return numbers.ABSENT
    if name == "metric":
        alike = len({run.record.metric_name for run in comparison.runs}) == 1
        return numbers.metric(number, record.metric_name) + ("" if alike else f" {record.metric_name}")
    if name == "drop":
        return numbers.drop(number, record.metric_name)
    text = numbers.figure(number, FIGURES[name].unit)
    if name == "latency_ms" and artifact.latency_ms is not None:
        return f"{text} ± {artifact.latency_ms.spread / 2:.0%}"
    if name == "energy_mj" and artifact.energy_mj is not None:
        return f"{text} ({'modelled' if artifact.energy_mj.method == 'model' else artifact.energy_mj.method})"
    return text


def _beside_latency(comparison: Comparison) -> list[Row]:
    """What a latency is to be seen with: speed-ups within the run, and how it was timed."""
    over_torch, over_fp32, timed = [], [], []
    for run in comparison.runs:
        record, latency = run.record, measured(run.record).latency_ms
        plain = None if record.chosen is None else compared.floor(record, record.chosen)
        over_torch.append(_speedup(record.source.latency_ms, latency))
        over_fp32.append(ABSENT if plain is None else _speedup(plain.latency_ms, latency))
        timed.append(ABSENT if latency is None else f"{latency.threads}, {latency.batch}")
    return [
        Row(key="over_torch", label="  speed over torch", cells=tuple(over_torch)),
        Row(key="over_fp32", label="  speed over fp32", cells=tuple(over_fp32)),
        Row(key="timing", label="  threads, batch", cells=tuple(timed)),
    ]


def _speedup(before: records.Latency | None, after: records.Latency | None) -> str:
    words = compared.faster(before, after)
    return "busy" if words.startswith("busy") else words.removesuffix(" faster") or ABSENT


def _cell(row: Difference, run: str, comparison: Comparison) -> str:
    if run not in row.values:
        return ABSENT
    content = row.values[run]
    if row.topic == "source" and row.name in FIGURES:
        if row.name == "metric":
            record = next(r.record for r in comparison.runs if r.name == run)
            return numbers.metric(content, record.metric_name)
        return numbers.figure(content, FIGURES[row.name].unit)
    if row.name == "memory_bytes":
        return numbers.figure(content, "bytes")
    if row.name == "instruction_sets":
        return _beyond(row.values, content)
    return plain(content)


def _beyond(values: dict[str, Any], own: Sequence[str]) -> str:
    """Of a long list, what not all have."""
    shared = set.intersection(*(set(names) for names in values.values()))
    return ", ".join(name for name in own if name not in shared) or "none of these"


def plain(content: Any) -> str:
    """A setting as text.

    >>> plain(None), plain(0.5), plain(["a", "b"]), plain([]), plain(True)
    ('none', '0.5', 'a, b', 'none', 'true')
    """
    return setting(content) if content not in (None, [], {}) else "none"
