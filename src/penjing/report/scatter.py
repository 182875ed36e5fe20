"""Geometry of the Pareto scatter plot: positions of points, labels, ticks and goal limits, without markup.

x is the median latency (left is better), y the task's metric or, without one, agreement or signal-to-noise
against the source (up is better), the bubble's area the size on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from penjing import records
from penjing.report import arithmetic, labels, numbers
from penjing.report.axis import Axis
from penjing.report.labels import Label

RING = 4.0  # pixels between a chosen bubble and the ring around it


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """One candidate, or the source, in pixels."""

    name: str
    x: float
    y: float
    radius: float
    family: str  # of arithmetic; "source" for the source
    met: bool = False
    chosen: bool = False
    pareto: bool = False
    title: str = ""
    label: Label | None = None


@dataclass(frozen=True)
class Limit:
    """A limit of the goal as a line across the plot; `vertical` at x, else horizontal at y."""

    vertical: bool
    at: float
    text: str
    label: Label


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that the template draws; positions in pixels from the upper left corner."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis
    x_title: str
    y_title: str
    bubbles: tuple[Bubble, ...]
    front: tuple[tuple[float, float], ...]
    limits: tuple[Limit, ...]
    beyond: tuple[str, ...] = ()  # limits too far away to draw
    left_out: tuple[str, ...] = ()  # candidates without both figures
    unlabelled: int = 0


@dataclass(frozen=True)
class _Point:
    name: str
    x: float
    y: float
    size: int | None
    candidate: records.Candidate | None = None


@dataclass(frozen=True)
class _Measure:
    """The figure on the y axis."""

    kind: str  # "metric", "agreement" or "snr_db"
    title: str
    higher_is_better: bool = True

    def of(self, candidate: records.Candidate) -> float | None:
        if self.kind == "metric":
            return candidate.measured.metric
        row = parity(candidate)
        value = None if row is None else getattr(row, self.kind)
        return value if value is not None and math.isfinite(value) else None

    def write(self, value: float) -> str:
        if self.kind == "metric":
            return numbers.metric(value, self.title)
        return numbers.figure(value, "%" if self.kind == "agreement" else "dB")


def parity(candidate: records.Candidate, against: str = "source") -> records.Parity | None:
    """The candidate's parity against `against`, otherwise its first one; None if it has none."""
    first = candidate.parity[0] if candidate.parity else None
    return next((p for p in candidate.parity if p.against == against), first)


def plot(record: records.Record, width: int = 1000, height: int = 460) -> Plot | None:
    """Lay out the scatter plot, `width` × `height` pixels; None if no candidate has both figures."""
    measure = _measure(record)
    points = _points(record, measure)
    if not any(p.candidate for p in points):
        return None
    narrow = width < 500
    left, right, top, bottom = (52.0 if narrow else 70.0), width - 12.0, 46.0, height - 52.0
    largest = 17.0 if narrow else 26.0
    limits, beyond = _limits(record, measure, points)
    xs = [p.x for p in points] + [v for a, v, _ in limits if a == "x"]
    # The outermost bubbles need space for their names.
    x = Axis.spanning(xs, left, right, largest + (24 if narrow else 80), ticks=4 if narrow else 7, may_log=True)
    ys = [p.y for p in points] + [v for a, v, _ in limits if a == "y"]
    ends = (bottom, top) if measure.higher_is_better else (top, bottom)
    percent = measure.kind == "agreement" or (measure.kind == "metric" and numbers.is_share(measure.title, *ys))
    y = Axis.spanning(ys, *ends, largest + 8, ticks=5, percent=percent)
    most = max((p.size or 0 for p in points), default=0)
    bubbles = [_bubble(record, measure, p, x, y, largest, most) for p in points]
    lines = _lines(limits, x, y, (left, right, top, bottom))
    front = _front(bubbles)
    bubbles = _labelled(bubbles, lines, front, (left, right, top, bottom))
    names = {p.name for p in points}
    return Plot(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x=x,
        y=y,
        x_title="latency, ms" + (", log scale" if x.log else ""),
        y_title=measure.title + (", %" if percent else ", dB" if measure.kind == "snr_db" else ""),
        # In drawing order: small bubbles above large ones, the chosen one on top.
        bubbles=tuple(sorted(bubbles, key=lambda b: (b.chosen, -b.radius, b.name))),
        front=front,
        limits=lines,
        beyond=beyond,
        left_out=tuple(c.name for c in record.candidates if c.name not in names),
        unlabelled=sum(b.label is None for b in bubbles),
    )


def _measure(record: records.Record) -> _Measure:
    if any(c.measured.metric is not None for c in record.candidates):
        return _Measure("metric", record.metric_name, record.higher_is_better)
    if any((p := parity(c)) is not None and p.agreement is not None for c in record.candidates):
        return _Measure("agreement", "agreement with the source")
    return _Measure("snr_db", "signal-to-noise")


def _points(record: records.Record, measure: _Measure) -> list[_Point]:
    points = []
    for c in record.candidates:
        value, latency = measure.of(c), c.measured.latency_ms
        if value is not None and latency is not None and latency.median > 0:
            points.append(_Point(c.name, latency.median, value, c.measured.size_bytes, c))
    source = record.source
    # The source agrees with itself by definition; its signal-to-noise ratio is infinite, so it is not drawn.
    value = {"metric": record.source_metric, "agreement": 1.0}.get(measure.kind)
    if value is not None and source.latency_ms is not None and source.latency_ms.median > 0:
        points.append(_Point("source", source.latency_ms.median, value, source.size_bytes))
    return points


def _limits(
    record: records.Record, measure: _Measure, points: list[_Point]
) -> tuple[list[tuple[str, float, str]], tuple[str, ...]]:
    """Limits of the goal on an axis, as (axis, value, text), and the texts of those too far away to draw."""
    near, far = [], []
    sense = -1 if record.higher_is_better else 1
    base = record.baseline
    for limit in record.goal.limits:
        text = limit.text.replace("<=", " ≤ ").replace(">=", " ≥ ").replace("%", " %")
        if limit.figure == "latency_ms":
            axis, at = "x", limit.value
        elif measure.kind == "metric" and limit.figure == "metric":
            axis, at = "y", limit.value
        elif measure.kind == "metric" and limit.figure == "drop" and base is not None:
            axis, at = "y", base + sense * limit.value
        elif measure.kind == "metric" and limit.figure == "relative_drop" and base is not None:
            axis, at = "y", base + sense * limit.value * abs(base)
        else:
            continue
        values = [p.x if axis == "x" else p.y for p in points]
        reach = 3 * max(max(values) - min(values), 0.02 * abs(max(values)))
        inside = min(values) - reach <= at <= max(values) + reach and not (axis == "x" and at <= 0)
        (near.append((axis, at, text)) if inside else far.append(text))
    return near, tuple(far)


def _bubble(
    record: records.Record, measure: _Measure, point: _Point, x: Axis, y: Axis, largest: float, most: int
) -> Bubble:
    # The area is proportional to the size; the smallest bubble must still be visible and easy to point at.
    radius = max(5.0, largest * math.sqrt(point.size / most)) if point.size and most else 6.0
    lines = [point.name, numbers.figure(point.x, "ms"), f"{measure.title} {measure.write(point.y)}"]
    lines.append(numbers.figure(point.size, "bytes") if point.size is not None else "size not measured")
    c = point.candidate
    if c is not None:
        lines.append(("goal met" if c.met else "goal not met") + (f": {c.reason}" if c.reason else ""))
    return Bubble(
        name=point.name,
        x=round(x.at(point.x), 1),
        y=round(y.at(point.y), 1),
        radius=round(radius, 1),
        family="source" if c is None else arithmetic.family(c.precision),
        met=c is None or c.met,
        chosen=c is not None and c.name == record.goal.chosen,
        pareto=c is not None and c.name in record.goal.pareto,
        title="\n".join(lines),
    )


def _front(bubbles: list[Bubble]) -> tuple[tuple[float, float], ...]:
    """The Pareto members that are not dominated in this plane, from fast to good; others excel in a third figure."""
    members = sorted((b for b in bubbles if b.pareto), key=lambda b: (b.x, b.y))
    line: list[tuple[float, float]] = []
    for b in members:
        if not line or b.y < line[-1][1]:
            line.append((b.x, b.y))
    return tuple(line)


def _lines(
    limits: list[tuple[str, float, str]], x: Axis, y: Axis, frame: tuple[float, float, float, float]
) -> tuple[Limit, ...]:
    left, right, top, _ = frame
    lines = []
    for axis, value, text in limits:
        if axis == "x":
            at = round(x.at(value), 1)
            anchor = "end" if at > (left + right) / 2 else "start"
            lines.append(Limit(True, at, text, Label.standing(text, at, top - 9, anchor)))
        else:
            at = round(y.at(value), 1)
            lines.append(Limit(False, at, text, Label.standing(text, right - 4, at + 15, "end")))
    return tuple(lines)


def _labelled(
    bubbles: list[Bubble],
    limits: tuple[Limit, ...],
    front: tuple[tuple[float, float], ...],
    frame: tuple[float, float, float, float],
) -> list[Bubble]:
    """Label every bubble for which there is space: the chosen one, the source and Pareto members first."""
    left, right, top, bottom = frame
    frame = (left, right, 20.0, bottom)  # names may be above the plot, below the axis title
    circles = [(b.x, b.y, b.radius + (RING if b.chosen else 0)) for b in bubbles]
    taken = [limit.label.box for limit in limits]
    drawn = [(m.at, top, m.at, bottom) if m.vertical else (left, m.at, right, m.at) for m in limits]
    drawn += [(*a, *b) for a, b in pairwise(front)]
    lines = [box for line in drawn for box in labels.trail(line)]
    placed = list(bubbles)
    for i in sorted(range(len(bubbles)), key=lambda i: _rank(bubbles[i])):
        label = labels.place(bubbles[i].name, circles[i], circles, taken, frame, lines)
        if label is not None:
            taken += [label.box, *labels.trail(label.leader)]
            placed[i] = replace(bubbles[i], label=label)
    return placed


def _rank(bubble: Bubble) -> tuple[bool, bool, bool, bool, str]:
    return (not bubble.chosen, bubble.family != "source", not bubble.pareto, not bubble.met, bubble.name)
