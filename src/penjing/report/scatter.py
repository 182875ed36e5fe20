"""Geometry of the Pareto scatter plot: positions of points, labels, ticks and goal limits, without markup.

x is the median latency (left is better), y the task's metric or, without one, agreement or signal-to-noise
against the source (up is better), the bubble's area the size on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate, or a source, before it is laid out: `x` and `y` in the units of the axes, `size` in bytes."""

    name: str  # beside the bubble; "" for none
    x: float
    y: float
    size: int | None
    family: str
    title: str = ""
    met: bool = True
    chosen: bool = False
    pareto: bool = False


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Titles of the axes, and how they run."""

    x_title: str
    y_title: str
    higher_is_better: bool = True
    percent: bool = False  # whether y is a fraction, shown in percent


@dataclass(frozen=True)
class Measure:
    """The figure on the y axis."""

    kind: str  # "metric", "agreement" or "snr_db"
    title: str
    higher_is_better: bool = True

    def of(self, candidate: records.Candidate) -> float | None:
        """A candidate's value; None where it was not measured, or is not a finite number."""
        if self.kind == "metric":
            return candidate.measured.metric
        row = parity(candidate)
        value = None if row is None else getattr(row, self.kind)
        return value if value is not None and math.isfinite(value) else None

    def scales(self, ys: Sequence[float], x_title: str) -> Scales:
        """Axes for these values."""
        percent = self.kind == "agreement" or (self.kind == "metric" and numbers.is_share(self.title, *ys))
        unit = ", %" if percent else ", dB" if self.kind == "snr_db" else ""
        return Scales(
            x_title=x_title, y_title=self.title + unit, higher_is_better=self.higher_is_better, percent=percent
        )

    def write(self, value: float) -> str:
        """A value in words."""
        if self.kind == "metric":
            return numbers.metric(value, self.title)
        return numbers.figure(value, "%" if self.kind == "agreement" else "dB")


def parity(candidate: records.Candidate, against: str = "source") -> records.Parity | None:
    """The candidate's parity against `against`, otherwise its first one; None if it has none."""
    first = candidate.parity[0] if candidate.parity else None
    return next((p for p in candidate.parity if p.against == against), first)


def plot(record: records.Record, width: int = 1000, height: int = 460) -> Plot | None:
    """Lay out the scatter plot, `width` × `height` pixels; None if no candidate has both figures."""
    measure = measure_of(record.candidates, record.metric_name, record.higher_is_better)
    points = _points(record, measure)
    if all(p.family == "source" for p in points):
        return None
    limits, beyond = _limits(record, measure, points)
    ys = [p.y for p in points] + [v for a, v, _ in limits if a == "y"]
    names = {p.name for p in points}
    drawn = lay_out(points, measure.scales(ys, "latency, ms"), limits, width, height)
    left_out = tuple(c.name for c in record.candidates if c.name not in names)
    return replace(drawn, beyond=beyond, left_out=left_out)


def lay_out(
    points: Sequence[Point],
    scales: Scales,
    limits: Sequence[tuple[str, float, str]] = (),
    width: int = 1000,
    height: int = 460,
) -> Plot:
    """Place points, at least one, on `width` × `height` pixels.

    Args:
        points: What is drawn; members of the Pareto set are joined.
        scales: The axes.
        limits: Lines across the plot, as ("x" or "y", value, text).
        width: Pixels.
        height: Pixels.
    """
    narrow = width < 500
    left, right, top, bottom = (52.0 if narrow else 70.0), width - 12.0, 46.0, height - 52.0
    largest = 17.0 if narrow else 26.0
    xs = [p.x for p in points] + [v for a, v, _ in limits if a == "x"]
    # The outermost bubbles need space for their names.
    x = Axis.spanning(xs, left, right, largest + (24 if narrow else 80), ticks=4 if narrow else 7, may_log=True)
    ys = [p.y for p in points] + [v for a, v, _ in limits if a == "y"]
    ends = (bottom, top) if scales.higher_is_better else (top, bottom)
    y = Axis.spanning(ys, *ends, largest + 8, ticks=5, percent=scales.percent)
    most = max((p.size or 0 for p in points), default=0)
    bubbles = [_bubble(p, x, y, largest, most) for p in points]
    lines = _lines(limits, x, y, (left, right, top, bottom))
    front = _front(bubbles)
    bubbles = _labelled(bubbles, lines, front, (left, right, top, bottom))
    return Plot(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x=x,
        y=y,
        x_title=scales.x_title + (", log scale" if x.log else ""),
        y_title=scales.y_title,
        # In drawing order: small bubbles above large ones, the chosen one on top.
        bubbles=tuple(sorted(bubbles, key=lambda b: (b.chosen, -b.radius, b.name))),
        front=front,
        limits=lines,
        unlabelled=sum(bool(b.name) and b.label is None for b in bubbles),
    )


def measure_of(candidates: Sequence[records.Candidate], metric_name: str, higher_is_better: bool) -> Measure:
    """What quality is drawn as: the metric, or without one agreement or signal-to-noise against the source."""
    if any(c.measured.metric is not None for c in candidates):
        return Measure("metric", metric_name, higher_is_better)
    if any((p := parity(c)) is not None and p.agreement is not None for c in candidates):
        return Measure("agreement", "agreement with the source")
    return Measure("snr_db", "signal-to-noise")


def point(candidate: records.Candidate, measure: Measure, x: float | None = None) -> Point | None:
    """A candidate's quality over its latency, or over `x` in its place; None without one of them."""
    value, latency = measure.of(candidate), candidate.measured.latency_ms
    ms = latency.median if latency is not None and latency.median > 0 else None
    at = ms if x is None else x
    if value is None or at is None:
        return None
    size = candidate.measured.size_bytes
    goal = ("goal met" if candidate.met else "goal not met") + (f": {candidate.reason}" if candidate.reason else "")
    return Point(
        name=candidate.name,
        x=at,
        y=value,
        size=size,
        family=arithmetic.family(candidate.precision),
        met=candidate.met,
        title="\n".join([_title(candidate.name, ms, value, size, measure), goal]),
    )


def _points(record: records.Record, measure: Measure) -> list[Point]:
    points = [
        replace(drawn, chosen=c.name == record.goal.chosen, pareto=c.name in record.goal.pareto)
        for c in record.candidates
        if (drawn := point(c, measure)) is not None
    ]
    source = record.source
    # The source agrees with itself by definition; its signal-to-noise ratio is infinite, so it is not drawn.
    value = {"metric": record.source_metric, "agreement": 1.0}.get(measure.kind)
    if value is not None and source.latency_ms is not None and source.latency_ms.median > 0:
        ms, size = source.latency_ms.median, source.size_bytes
        title = _title("source", ms, value, size, measure)
        points.append(Point(name="source", x=ms, y=value, size=size, family="source", title=title))
    return points


def _title(name: str, ms: float | None, value: float, size: int | None, measure: Measure) -> str:
    time = numbers.figure(ms, "ms") if ms is not None else "latency not measured"
    weight = numbers.figure(size, "bytes") if size is not None else "size not measured"
    return "\n".join([name, time, f"{measure.title} {measure.write(value)}", weight])


def _limits(
    record: records.Record, measure: Measure, points: list[Point]
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


def _bubble(point: Point, x: Axis, y: Axis, largest: float, most: int) -> Bubble:
    # The area is proportional to the size; the smallest bubble must still be visible and easy to point at.
    radius = max(5.0, largest * math.sqrt(point.size / most)) if point.size and most else 6.0
    return Bubble(
        name=point.name,
        x=round(x.at(point.x), 1),
        y=round(y.at(point.y), 1),
        radius=round(radius, 1),
        family=point.family,
        met=point.met,
        chosen=point.chosen,
        pareto=point.pareto,
        title=point.title,
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
    limits: Sequence[tuple[str, float, str]], x: Axis, y: Axis, frame: tuple[float, float, float, float]
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
    for i in sorted((i for i, b in enumerate(bubbles) if b.name), key=lambda i: _rank(bubbles[i])):
        label = labels.place(bubbles[i].name, circles[i], circles, taken, frame, lines)
        if label is not None:
            taken += [label.box, *labels.trail(label.leader)]
            placed[i] = replace(bubbles[i], label=label)
    return placed


def _rank(bubble: Bubble) -> tuple[bool, bool, bool, bool, str]:
    return (not bubble.chosen, bubble.family != "source", not bubble.pareto, not bubble.met, bubble.name)
