"""The outcome of a run in one plain sentence."""

from __future__ import annotations

from dataclasses import dataclass

from penjing import records
from penjing.report import comparison, figures


@dataclass(frozen=True)
class Verdict:
    """Whether the goal was met, whose artifact it is, and what became of speed, size and metric."""

    met: bool
    title: str  # "Goal met" or "Goal not met"
    subject: str  # the chosen candidate's name, or ""
    changes: tuple[str, ...]  # "3.1× faster", "3.6× smaller", "accuracy 93.4 % → 93.3 %"
    reason: str

    @property
    def headline(self) -> str:
        """Subject and changes as one line.

        >>> Verdict(True, "Goal met", "openvino-int8", ("3.1× faster", "3.6× smaller"), "").headline
        'openvino-int8: 3.1× faster, 3.6× smaller'
        """
        changes = ", ".join(self.changes)
        return f"{self.subject}: {changes}" if self.subject and changes else self.subject or changes or self.title


def of(record: records.Record) -> Verdict:
    """The verdict of a record."""
    goal = record.goal
    reason = goal.reason or (record.chosen.reason if record.chosen else "")
    title = "Goal met" if goal.met else "Goal not met"
    if record.chosen is None and record.artifact is None:
        built = comparison.plural(len(record.candidates), "candidate")
        what = f"No artifact was chosen from {built}" if record.candidates else "No artifact could be built"
        return Verdict(goal.met, title, "", (what,), reason)
    return Verdict(goal.met, title, record.chosen.name if record.chosen else "artifact", changes(record), reason)


def changes(record: records.Record) -> tuple[str, ...]:
    """What became of speed, size and metric, each only where it was measured on both sides."""
    source, artifact = record.source, comparison.measured(record)
    before, after = source.latency_ms, artifact.latency_ms
    faster = comparison.gain(before.median, after.median) if before and after else None
    smaller = comparison.gain(source.size_bytes, artifact.size_bytes)
    found = [
        "as fast" if (text := comparison.in_words(faster, "faster", "slower")) == "same" else text,
        "as large" if (text := comparison.in_words(smaller, "smaller", "larger")) == "same" else text,
    ]
    if source.metric is not None and artifact.metric is not None:
        old, new = figures.metric_pair(source.metric, artifact.metric, record.metric_name)
        found.append(f"{record.metric_name} {old} → {new}")
    return tuple(f for f in found if f)
