"""Sensitivity: the noise of the outputs when a single group of channels is pruned, as text and as an image.

Rows are groups in order of execution, columns fractions of their channels; dark cells have a low ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from penjing import records
from penjing.report import numbers

_LABEL, _CELL, _ROW, _TOP, _BAR = 300, 74, 20, 74, 150  # pixels
_QUIET, _INK = "#59636e", "#1f2328"
_SCALE = ((30.0, "#e8f5e9", _INK), (20.0, "#c8e6c9", _INK), (12.0, "#fff3c4", _INK), (6.0, "#ffcc80", _INK),
          (0.0, "#e57373", "#ffffff"), (float("-inf"), "#8e1b1b", "#ffffff"))  # fmt: skip
_SHOWN = "signal-to-noise ratio of the outputs in dB when this group alone loses this fraction of its channels"


def text(rows: Sequence[records.SensitivityRow]) -> str:
    """A line for every group: its number of channels, and decibels for every fraction."""
    longest = max((len(row.name) for row in rows), default=0)
    lines = [_SHOWN]
    for row in rows:
        cells = " ".join(f"{_share(row, i):>5}: {_decibels(db):>5}" for i, db in enumerate(row.snr_db))
        lines.append(f"  {row.name:<{longest}} {row.units:>5}  {cells}")
    return "\n".join(lines)


def picture(rows: Sequence[records.SensitivityRow]) -> str:
    """SVG with a row per group and a cell per fraction; bars on the right show multiply-accumulates."""
    columns = max((len(row.removed) for row in rows), default=0)
    width, height = _LABEL + _CELL * columns + _BAR + 24, _TOP + _ROW * len(rows) + 16
    most = max((row.macs for row in rows), default=0) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<title>Sensitivity to pruning</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _words(12, 24, "Sensitivity to pruning, group by group", _INK, 'font-size="15" font-weight="600"'),
        _words(12, 42, _SHOWN, _QUIET),
        _words(_LABEL + _CELL * columns + 16, 64, "multiply-accumulates", _QUIET),
    ]
    widest = max(rows, key=lambda row: len(row.removed), default=None)
    for i in range(columns):
        assert widest is not None
        parts.append(_words(_LABEL + _CELL * (i + 0.5), 64, f"−{_share(widest, i)}", _QUIET, 'text-anchor="middle"'))
    for n, row in enumerate(rows):
        top = _TOP + _ROW * n
        name = row.name if len(row.name) <= 34 else "…" + row.name[-33:]
        parts.append(_words(12, top + 14, name, _INK))
        parts.append(_words(_LABEL - 10, top + 14, str(row.units), _QUIET, 'text-anchor="end"'))
        for i, decibels in enumerate(row.snr_db):
            parts += _cell(row, i, decibels, _LABEL + _CELL * i, top)
        bar = _BAR * row.macs / most
        parts.append(
            f'<rect x="{_LABEL + _CELL * columns + 16}" y="{top + 4}" width="{bar:.1f}" height="{_ROW - 8}" '
            f'fill="#9fb8d0"><title>{escape(row.name)}: {numbers.figure(row.macs, "MACs")}</title></rect>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _cell(row: records.SensitivityRow, i: int, decibels: float | None, left: float, top: float) -> list[str]:
    _, fill, ink = next(step for step in _SCALE if decibels is None or decibels >= step[0])
    tooltip = f"{row.name}: without {row.removed[i]} of {row.units}: {_decibels(decibels)} dB"
    return [
        f'<rect x="{left}" y="{top}" width="{_CELL - 2}" height="{_ROW - 2}" rx="3" fill="{fill}">'
        f"<title>{escape(tooltip)}</title></rect>",
        _words(left + _CELL / 2 - 1, top + 13.5, _decibels(decibels), ink, 'text-anchor="middle"'),
    ]


def _share(row: records.SensitivityRow, i: int) -> str:
    return f"{row.removed[i] / row.units:.0%}"


def _decibels(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}".replace("-", "−")


def _words(x: float, y: float, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" {more}>{escape(text)}</text>'


__all__ = ["picture", "text"]
