"""The Pareto picture of several runs: one plot of all their candidates, a colour for every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penjing import records
from penjing.records.comparison import Comparison, measured, network
from penjing.records.runs import RunRow
from penjing.report import scatter
from penjing.report.html import environment
from penjing.report.scatter import Measure, Plot, Point

COLOURS = 6
SAME, OWN = "signal-to-noise against the source", "signal-to-noise against its own source"
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn.

    Attributes:
        wide: The plot on a wide page.
        narrow: The same on a phone.
        legend: Class of the colour, and name, of every run in it.
        notes: What the picture can't show, and why.
        by_size: Whether x is the size on disk, because latencies can't be compared.
    """

    wide: Plot
    narrow: Plot
    legend: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    by_size: bool


def picture(comparison: Comparison) -> Picture | None:
    """Lay out the picture; None where fewer than two runs have both figures.

    x is the latency where it can be compared over all runs, otherwise the size on disk; y the metric where it can be
    compared, otherwise signal-to-noise, of each against its own source.
    """
    by_size = not (comparison.comparable("latency_ms") and len(comparison.values("latency_ms")) > 1)
    measure = _measure(comparison)
    unit = _unit(comparison) if by_size else None
    points = {run.name: _points(run, i, measure, unit) for i, run in enumerate(comparison.runs)}
    drawn = [point for of_run in points.values() for point in of_run]
    if sum(bool(of_run) for of_run in points.values()) < 2:
        return None
    if joined := measure.title != OWN:
        drawn = _with_front(drawn, measure.higher_is_better)
    x_title = "latency, ms" if unit is None else f"size on disk, {unit[0]}"
    scales = measure.scales([p.y for p in drawn], x_title)
    notes = ["x is the size on disk, since latencies can't be compared"] if by_size else []
    notes += [] if joined else ["no line joins the best: each is seen against its own source, on its own data"]
    alone = [run.name for run in comparison.runs if points[run.name] and run.record.selected is not None]
    notes += (
        [f"the chosen artifact alone, since the others' metrics are by Task.select: {', '.join(alone)}"]
        if alone
        else []
    )
    notes += [f"not drawn, for lack of figures: {name}" for name, of_run in points.items() if not of_run]
    return Picture(
        wide=scatter.lay_out(drawn, scales),
        narrow=scatter.lay_out(drawn, scales, width=350, height=400),
        legend=tuple((_colour(i), name) for i, name in enumerate(points) if points[name]),
        notes=tuple(notes),
        by_size=by_size,
    )


def svg(drawn: Picture) -> str:
    """The picture as a file of its own, for a page or a presentation: without scripts, fonts or variables."""
    return environment().get_template("runs.svg.j2").render(picture=drawn, plot=drawn.wide)


def _measure(comparison: Comparison) -> Measure:
    record = comparison.runs[0].record
    if comparison.comparable("metric") and len(comparison.values("metric")) == len(comparison.runs):
        return Measure("metric", record.metric_name, record.higher_is_better)
    # Parity is of calibration samples.
    against = {(network(run.record), run.record.data.get("calibration")) for run in comparison.runs}
    return Measure("snr_db", SAME if len(against) == 1 else OWN)


def _unit(comparison: Comparison) -> tuple[str, float]:
    """Name and bytes of the unit that the largest size has at least one of."""
    sizes = [c.measured.size_bytes or 0 for run in comparison.runs for c in _drawn(run.record)]
    return next((unit for unit in _UNITS if max(sizes, default=0) >= unit[1]), _UNITS[-1])


def _points(run: RunRow, place: int, measure: Measure, unit: tuple[str, float] | None) -> list[Point]:
    record = run.record
    points = []
    for candidate in _drawn(record):
        chosen = candidate.name == record.goal.chosen
        if chosen:  # by `evaluate`, also where `select` chose it
            candidate = replace(candidate, measured=measured(record))
        size = candidate.measured.size_bytes
        point = scatter.point(candidate, measure, x=size / unit[1] if unit and size else None)
        if point is None or (unit and not size):
            continue
        title = f"{run.name}: {point.title}"
        point = replace(point, name=run.name if chosen else "", title=title, family=_colour(place), chosen=chosen)
        points.append(replace(point, size=None) if unit else point)
    return points


def _drawn(record: records.Record) -> Sequence[records.Candidate]:
    """All candidates; the chosen one alone where the others' metrics are of other data."""
    chosen = () if record.chosen is None else (record.chosen,)
    if record.selected is not None:
        return chosen
    return record.candidates if record.chosen in record.candidates else (*record.candidates, *chosen)


def _with_front(points: list[Point], higher_is_better: bool) -> list[Point]:
    """The same, with those marked that no other beats in both figures."""

    def beats(a: Point, b: Point) -> bool:
        better = a.y >= b.y if higher_is_better else a.y <= b.y
        return a.x <= b.x and better and (a.x, a.y) != (b.x, b.y)

    return [replace(p, pareto=not any(beats(other, p) for other in points)) for p in points]


def _colour(place: int) -> str:
    return f"run{place % COLOURS + 1}"
