"""Geometry of the chart of layers: one column per layer, for networks with too many layers for a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penjing import records
from penjing.report import arithmetic, numbers

READABLE = 60  # number of layers up to which all are listed; more are drawn as a skyline
_COLUMNS = 220  # more columns could not be distinguished
MEASURES = (
    ("macs", "MACs", "MACs"),
    ("weight_bytes", "Weights", "bytes"),
    ("activation_bytes", "Activations", "bytes"),
)
_STACK = (arithmetic.INTEGER, arithmetic.HALF, arithmetic.FLOAT, arithmetic.UNSEEN)


@dataclass(frozen=True)
class Block:
    """One family's part of a column, in pixels."""

    x: float
    y: float
    width: float
    height: float
    family: str


@dataclass(frozen=True)
class Column:
    """One layer, or neighbouring layers that share a column; `title` is its tooltip."""

    x: float
    width: float
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Panel:
    """One measure over all layers."""

    label: str
    top: float
    bottom: float
    highest: str
    total: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Skyline:
    """Three panels above each other, the layers from input to output along x."""

    width: int
    height: int
    left: float
    right: float
    panels: tuple[Panel, ...]
    layers: int
    shared: int  # most layers in one column


def skyline(rows: Sequence[records.LayerRow], width: int = 1000, panel: int = 118) -> Skyline:
    """Lay out the skyline, `width` pixels wide with panels of height `panel`, for any number of layers."""
    left, right, gap, head = 0.0, float(width), 18, 24
    limit = min(_COLUMNS, int(width / 3.2))
    groups = _grouped(rows, limit)
    panels = []
    for i, (field, label, unit) in enumerate(MEASURES):
        top = i * (panel + gap + head) + head
        panels.append(_panel(groups, (field, label, unit), (left, right, float(top), float(top + panel))))
    height = len(MEASURES) * (panel + gap + head)
    return Skyline(width, height, left, right, tuple(panels), len(rows), max((len(g) for g in groups), default=0))


def _grouped(rows: Sequence[records.LayerRow], limit: int) -> list[Sequence[records.LayerRow]]:
    if len(rows) <= limit:
        return [[r] for r in rows]
    edges = [round(i * len(rows) / limit) for i in range(limit + 1)]
    return [rows[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _panel(
    groups: Sequence[Sequence[records.LayerRow]],
    measure: tuple[str, str, str],
    frame: tuple[float, float, float, float],
) -> Panel:
    field, label, unit = measure
    left, right, top, bottom = frame
    sums = [sum(getattr(r, field) for r in group) for group in groups]
    most = max(sums, default=0)
    step = (right - left) / max(len(groups), 1)
    width = step * 0.82 if step > 2.4 else step
    columns = []
    for i, group in enumerate(groups):
        x, blocks, y = left + i * step, [], bottom
        for family in _STACK:
            part = sum(getattr(r, field) for r in group if arithmetic.family(r.executed) == family)
            if part:
                height = max((bottom - top) * part / most, 0.6)
                y -= height
                blocks.append(Block(round(x, 2), round(y, 2), round(width, 2), round(height, 2), family))
        columns.append(Column(round(x, 2), round(step, 2), _tooltip(group, sums[i], unit), tuple(blocks)))
    return Panel(label, top, bottom, numbers.figure(most, unit), numbers.figure(sum(sums), unit), tuple(columns))


def _tooltip(group: Sequence[records.LayerRow], value: float, unit: str) -> str:
    first, last = group[0], group[-1]
    name = first.name if len(group) == 1 else f"{first.name} to {last.name} ({len(group)} layers)"
    lines = [name, numbers.figure(value, unit)]
    if len(group) == 1:
        lines.append(f"{first.kind}, executed as {first.executed or 'not visible'}")
        lines += [first.reason] if first.reason else []
    return "\n".join(lines)


def heaviest(rows: Sequence[records.LayerRow], count: int = 20) -> list[records.LayerRow]:
    """The `count` layers with the most multiply-accumulates, in network order."""
    keep = sorted(range(len(rows)), key=lambda i: (-rows[i].macs, -rows[i].weight_bytes, i))[:count]
    return [rows[i] for i in sorted(keep)]


def shares(rows: Sequence[records.LayerRow]) -> list[tuple[str, int, float]]:
    """For every family of arithmetic that occurs: its name, number of layers with MACs, and share of all MACs."""
    total = sum(r.macs for r in rows)
    families = []
    for family in _STACK:
        members = [r for r in rows if r.macs and arithmetic.family(r.executed) == family]
        if members:
            families.append((family, len(members), sum(r.macs for r in members) / total))
    return families
