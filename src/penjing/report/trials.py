"""The trials of a search: a timeline, expected against measured figures, and what was best."""

from __future__ import annotations

from dataclasses import dataclass

from penjing import records
from penjing.records.figures import FIGURES
from penjing.records.search import TrialRow
from penjing.report import arithmetic, numbers
from penjing.report.scatter import Measure, Plot, Point, lay_out

SHOWN = ("latency_ms", "size_bytes", "packed_bytes")
_UNITS = {"bytes": (1e3, "kB"), "MACs": (1e6, "million"), "count": (1e3, "thousand"), "/s": (1.0, "samples a second")}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trial in the table.

    Attributes:
        row: The trial.
        chosen: Whether the artifact is from it.
        start: Where it began, as a part of the whole time.
        length: How long it took, as a part of the whole time.
        cells: For each of `titles`, and for the drop: what was measured, and what had been expected; "" for none.
    """

    row: TrialRow
    chosen: bool
    start: float
    length: float
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What the report shows of a search.

    Attributes:
        lines: The trials, in the order in which they began.
        titles: Of the figures that were measured in any of them.
        plots: Wide and narrow: the best artifact of every trial.
        errors: How far expectations were off, in words: the median over all trials, by figure.
        training: Seconds of the trials that trained, as a part of all.
    """

    lines: tuple[Line, ...]
    titles: tuple[str, ...]
    plots: tuple[Plot, ...]
    errors: str
    training: float


def of(record: records.Record) -> Trials | None:
    """The trials of a record; None where nothing was searched."""
    search = record.search
    if search is None:
        return None
    named = (search.objective, *(limit.figure for limit in record.goal.limits))
    asked = [name for name in named if FIGURES[name].unit not in ("metric", "%")]  # drops have their own column
    names = [name for name in dict.fromkeys([*SHOWN, *asked]) if any(name in row.measured for row in search.trials)]
    whole = max((row.began_s + row.seconds for row in search.trials), default=0.0) or 1.0
    seconds = sum(row.seconds for row in search.trials) or 1.0
    return Trials(
        lines=tuple(_line(record, row, names, whole) for row in search.trials),
        titles=tuple(FIGURES[name].label.lower() for name in names),
        plots=tuple(p for p in (_plot(record, names, 1000, 460), _plot(record, names, 350, 400)) if p),
        errors=_errors(search.trials, names),
        training=sum(row.seconds for row in search.trials if row.training) / seconds,
    )


def _line(record: records.Record, row: TrialRow, names: list[str], whole: float) -> Line:
    search = record.search
    assert search is not None

    def both(name: str) -> tuple[str, str]:
        words = [
            numbers.figure(values[name], FIGURES[name].unit) if name in values else ""
            for values in (row.measured, row.predicted)
        ]
        return words[0], words[1]

    drops = [
        numbers.drop(values["drop"], record.metric_name) if "drop" in values else ""
        for values in (row.measured, row.predicted)
    ]
    return Line(
        row=row,
        chosen=row.number == search.chosen,
        start=row.began_s / whole,
        length=row.seconds / whole,
        cells=(*map(both, names), (drops[0], drops[1])),
    )


def _plot(record: records.Record, names: list[str], width: int, height: int) -> Plot | None:
    search = record.search
    if search is None or not names:
        return None
    measure = Measure("metric", record.metric_name, record.higher_is_better)
    asked = (search.objective, *(limit.figure for limit in record.goal.limits), *names)
    figure = FIGURES[next(name for name in asked if name in names)]
    scale, unit = _UNITS.get(figure.unit, (1.0, figure.unit))
    points = [
        Point(
            name=str(row.number),
            x=row.measured[figure.name] / scale,
            y=row.measured["metric"],
            size=int(row.measured.get("size_bytes", 0)) or None,
            family=arithmetic.family(row.best.partition("-")[2]),
            title=f"trial {row.number}: {row.words}\n{row.best}",
            met=row.met,
            chosen=row.number == search.chosen,
        )
        for row in search.trials
        if figure.name in row.measured and "metric" in row.measured
    ]
    if len(points) < 2:
        return None
    title = f"{figure.label.lower()}, {unit}"
    return lay_out(points, measure.scales([p.y for p in points], title), (), width, height)


def _errors(trials: tuple[TrialRow, ...], names: list[str]) -> str:
    """For example "latency 4 %, size on disk 2 %"."""
    parts = []
    for name in names:
        off = sorted(
            abs(row.measured[name] / row.predicted[name] - 1)
            for row in trials
            if row.training and row.predicted.get(name) and name in row.measured
        )
        if off:
            parts.append(f"{FIGURES[name].label.lower()} {off[len(off) // 2]:.0%}".replace("%", " %"))
    return ", ".join(parts)
