"""Labels beside points without overlaps: the nearest free place around each point, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
Circle = tuple[float, float, float]  # x, y, radius

# A little more than the mean width of a letter in the usual system fonts at 13 px, since the font is not known here.
_LETTER, _ABOVE, _BELOW = 7.1, 11.0, 4.0
_LONGEST = 30
_AROUND = ((1, 0), (0, -1), (0, 1), (-1, 0), (0.75, -0.75), (0.75, 0.75), (-0.75, -0.75), (-0.75, 0.75))
_DISTANCES = (6.0, 16.0, 30.0, 46.0)


@dataclass(frozen=True)
class Label:
    """A line of text at its baseline; `leader` is the line from the point to a distant label."""

    text: str
    x: float
    y: float
    anchor: str  # "start", "middle" or "end"
    box: Box
    leader: tuple[float, float, float, float] | None = None

    @classmethod
    def standing(cls, text: str, x: float, y: float, anchor: str) -> Label:
        """A label at this position, with a box estimated from the number of letters."""
        wide = _LETTER * len(text)
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        return cls(text, round(x, 1), round(y, 1), anchor, (left - 4, y - _ABOVE, left + wide + 4, y + _BELOW))


def place(
    text: str,
    point: Circle,
    circles: Sequence[Circle],
    taken: Sequence[Box],
    frame: tuple[float, float, float, float],
    lines: Sequence[Box] = (),
) -> Label | None:
    """The label at the nearest position around `point` that overlaps neither circles nor boxes; None if there is none.

    Args:
        text: The text, shortened in the middle if it is very long.
        point: The circle to label.
        circles: All circles of the plot, including `point`.
        taken: Boxes that the label must not overlap.
        frame: Left, right, upper and lower end of the plot; the label stays within it.
        lines: Boxes that the label should not overlap, but may, rather than move further away.
    """
    left, right, top, bottom = frame
    for distance in _DISTANCES:
        free = []
        for dx, dy in _AROUND:
            label = _beside(elided(text), point, distance, dx, dy)
            x0, y0, x1, y1 = label.box
            if x0 < left or x1 > right or y0 < top or y1 > bottom:
                continue
            if any(overlap(label.box, box) for box in taken) or any(_touch(label.box, c) for c in circles):
                continue
            if any(overlap(part, box) for part in trail(label.leader) for box in taken):
                continue
            free.append(label)
        if free:
            return next((label for label in free if not any(overlap(label.box, line) for line in lines)), free[0])
    return None


def trail(line: tuple[float, float, float, float] | None) -> list[Box]:
    """Small boxes along a line, for tests of overlap."""
    if line is None:
        return []
    x0, y0, x1, y1 = line
    count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / 4))
    dots = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
    return [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in dots]


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def elided(text: str, longest: int = _LONGEST) -> str:
    """`text` with its middle replaced by "…" if it is longer than `longest`.

    >>> elided("a-name-that-goes-on-and-on-and-on", 15)
    'a-name-…-and-on'
    """
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _beside(text: str, point: Circle, distance: float, dx: float, dy: float) -> Label:
    x, y, radius = point
    reach = radius + distance
    anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
    # The baseline is below the middle of the letters; above and below the point, their height is added.
    base = y + dy * reach + (4.0 if dx else (-_BELOW if dy < 0 else _ABOVE))
    label = Label.standing(text, x + dx * reach, base, anchor)
    if distance <= _DISTANCES[0]:
        return label
    end = (x + dx * (reach - 3), y + dy * (reach - 1))
    start = (x + dx * radius, y + dy * radius)
    leader = (round(start[0], 1), round(start[1], 1), round(end[0], 1), round(end[1], 1))
    return Label(label.text, label.x, label.y, label.anchor, label.box, leader)


def _touch(box: Box, circle: Circle) -> bool:
    x, y, radius = circle
    near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    return (near_x - x) ** 2 + (near_y - y) ** 2 < (radius + 1) ** 2
