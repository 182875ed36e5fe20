"""Bytes of every tensor of a packed file: as float32, as the file holds it, and packed. An image."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from penjing.report import numbers

Row = tuple[str, str, int, int, int]
"""Name, number type, bytes as float32, bytes in the file, bytes packed."""

_LABEL, _BAR, _ROW, _TOP, _RIGHT = 330, 420, 20, 84, 250  # pixels
_QUIET, _INK = "#59636e", "#1f2328"
_BARS = (("#dde3ea", "as float32"), ("#9fb8d0", "in the file"), ("#2f6f4f", "packed"))
_MOST = 60  # tensors


def picture(rows: Sequence[Row], title: str) -> str:
    """SVG with a row per tensor in the order of the file; the smaller bars lie upon the larger ones."""
    shown = rows if len(rows) <= _MOST else sorted(rows, key=lambda row: -row[2])[:_MOST]
    height = _TOP + _ROW * len(shown) + (44 if len(shown) < len(rows) else 20)
    most = max((max(row[2], row[3], row[4]) for row in shown), default=0) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LABEL + _BAR + _RIGHT} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_LABEL + _BAR + _RIGHT}" height="{height}" fill="#ffffff"/>',
        _words(12, 24, title, _INK, 'font-size="15" font-weight="600"'),
    ]
    totals = [sum(sizes) for sizes in ([row[2] for row in rows], [row[3] for row in rows], [row[4] for row in rows])]
    left = 12.0
    for (colour, label), total in zip(_BARS, totals, strict=True):
        text = f"{label}: {numbers.figure(total, 'bytes')}"
        parts.append(f'<rect x="{left:g}" y="42" width="12" height="12" fill="{colour}"/>')
        parts.append(_words(left + 18, 52, text, _QUIET))
        left += 40 + 7.1 * len(text)
    for n, row in enumerate(shown):
        parts += _row(row, _TOP + _ROW * n, most)
    if len(shown) < len(rows):
        parts.append(_words(12, _TOP + _ROW * len(shown) + 24, f"and {len(rows) - len(shown)} smaller tensors", _QUIET))
    return "\n".join([*parts, "</svg>", ""])


def _row(row: Row, top: float, most: int) -> list[str]:
    name, kind, *sizes = row
    short = name if len(name) <= 46 else "…" + name[-45:]
    parts = [_words(12, top + 13, short, _INK)]
    order = sorted(range(3), key=lambda i: -sizes[i])
    for i in order:
        inset = 3 if i == 2 else 0
        parts.append(
            f'<rect x="{_LABEL}" y="{top + 2 + inset}" width="{max(_BAR * sizes[i] / most, 0.5):.1f}" '
            f'height="{_ROW - 5 - 2 * inset}" fill="{_BARS[i][0]}">'
            f"<title>{escape(name)}, {_BARS[i][1]}: {numbers.figure(sizes[i], 'bytes')}</title></rect>"
        )
    text = f"{kind}: {' → '.join(numbers.figure(size, 'bytes') for size in sizes)}"
    parts.append(_words(_LABEL + _BAR + 12, top + 13, text, _QUIET))
    return parts


def _words(x: float, y: float, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" {more}>{escape(text)}</text>'


__all__ = ["Row", "picture"]
