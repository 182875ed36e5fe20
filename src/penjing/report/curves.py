"""Geometry of the training curves: the loss and its terms over the steps of each training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penjing import records
from penjing.report import numbers
from penjing.report.axis import Axis

_APART = 14.0  # minimum distance in pixels between the names of two lines


@dataclass(frozen=True)
class Line:
    """One quantity: its points and the height of its name, in pixels."""

    name: str
    kind: str  # "loss", or "term1" to "term4"
    points: tuple[tuple[float, float], ...]
    label_y: float
    title: str


@dataclass(frozen=True)
class Chart:
    """The curves of one training; positions in pixels."""

    name: str
    note: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


def charts(trainings: Sequence[records.Training]) -> tuple[Chart, ...]:
    """One chart for every training with a curve; several trainings of the same name are numbered."""
    names = [t.name for t in trainings]
    drawn = []
    for i, training in enumerate(trainings):
        many = names.count(training.name)
        name = f"{training.name}, {names[: i + 1].count(training.name)} of {many}" if many > 1 else training.name
        if training.curve:
            drawn.append(_chart(name, training.curve))
    return tuple(drawn)


def _chart(name: str, curve: Sequence[records.CurvePoint], width: float = 480, height: float = 250) -> Chart:
    left, right, top, bottom = 46.0, width - 118.0, 12.0, height - 40.0
    terms = list(curve[-1].terms) if len(curve[-1].terms) > 1 else []
    values = {"loss": [(p.step, p.loss) for p in curve]}
    values |= {term: [(p.step, p.terms[term]) for p in curve if term in p.terms] for term in terms}
    x = Axis.spanning([0.0, float(curve[-1].step)], left, right, ticks=5)
    y = Axis.spanning([v for pairs in values.values() for _, v in pairs], bottom, top, 6, ticks=4, may_log=True)
    lines = [
        Line(
            name=quantity,
            kind="loss" if quantity == "loss" else f"term{1 + terms.index(quantity) % 4}",
            points=tuple((round(x.at(step), 1), round(y.at(value), 1)) for step, value in pairs),
            label_y=y.at(pairs[-1][1]),
            title=f"{quantity}: {numbers.figure(pairs[0][1], '')} to {numbers.figure(pairs[-1][1], '')}",
        )
        for quantity, pairs in values.items()
    ]
    rate = max(p.rate for p in curve)
    last = curve[-1]
    note = f"{last.step} steps, learning rate up to {rate:g}, loss at the end {numbers.figure(last.loss, '')}"
    return Chart(name, note, width, height, left, right, top, bottom, x, y, _spread(lines, top, bottom))


def _spread(lines: Sequence[Line], top: float, bottom: float) -> tuple[Line, ...]:
    """Move the names apart so that they do not overlap: downwards in their order, then upwards from the bottom."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].label_y)
    places: list[float] = []
    for i in order:
        places.append(max(lines[i].label_y, places[-1] + _APART if places else top))
    limit = bottom
    for n in reversed(range(len(places))):
        places[n] = min(places[n], limit)
        limit = places[n] - _APART
    at = dict(zip(order, places, strict=True))
    return tuple(Line(line.name, line.kind, line.points, round(at[i], 1), line.title) for i, line in enumerate(lines))


__all__ = ["Chart", "Line", "charts"]
