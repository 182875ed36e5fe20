"""One group of coupled channels as text and as an image: a strip per pruned axis, a colour per unit.

After a shuffle or a split, the colours show the new positions of a layer's channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from penjing import records

_WIDTH, _ROW, _LABEL, _RIGHT = 640, 22, 330, 150  # pixels
_QUIET = "#59636e"
_WORDS = {"its outputs": "makes", "its channels": "passes", "its inputs": "reads"}
_MOST = 60  # maximum number of strips


def text(row: records.GroupRow) -> str:
    """Its tensors, the reasons of coupling, and the operators that make pruning approximate, one per line."""
    lines = [f"{row.name}: {row.units} units"]
    for cut in row.cuts:
        lines.append(f"  {cut.tensor} axis {cut.axis} ({cut.role}): {len(cut.positions)} of {cut.length} positions")
    lines += [f"  because {reason}" for reason in row.because]
    lines += [f"  approximate: {where} takes statistics over them" for where in row.statistics]
    return "\n".join(lines)


def picture(row: records.GroupRow) -> str:
    """SVG with the weights of the group in order of execution, beginning with the layers that produce the units.

    Vectors (biases, norms) are omitted: they are pruned like the preceding weights.
    """
    cuts = [cut for cut in row.cuts if cut.role in _WORDS and cut.tensor.endswith("weight")]
    cuts = (cuts or list(row.cuts))[:_MOST]
    left_out = len(row.cuts) - len(cuts)
    height = 64 + _ROW * len(cuts) + 20 * (1 + len(row.statistics[:3]))
    width = _LABEL + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(row.name)}: coupled channels</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _words(12, 24, f"{row.name}: {row.units} units", "#1f2328", 'font-size="15" font-weight="600"'),
        _words(
            12, 42, "each colour is a unit, which is removed as a whole; grey positions belong to other groups", _QUIET
        ),
    ]
    for i, cut in enumerate(cuts):
        parts += _strip(cut, row.units, 56 + _ROW * i)
    foot = 56 + _ROW * len(cuts) + 16
    if left_out > 0:
        parts.append(_words(12, foot, f"and {left_out} more tensors, cut in the same way", _QUIET))
    for i, where in enumerate(row.statistics[:3]):
        text = f"approximate: {where} takes statistics over them"
        parts.append(_words(12, foot + 18 * (i + 1), text, "#9a6700"))
    return "\n".join([*parts, "</svg>", ""])


def _strip(cut: records.CutRow, units: int, top: int) -> list[str]:
    layer = cut.tensor.rpartition(".")[0] or cut.tensor
    shown = layer if len(layer) <= 40 else "…" + layer[-39:]
    word = _WORDS.get(cut.role, "holds")
    parts = [
        _words(12, top + 13, shown, "#1f2328"),
        _words(_LABEL - 46, top + 13, word, _QUIET),
        f'<rect x="{_LABEL}" y="{top}" width="{_WIDTH}" height="16" fill="#d0d7de"/>',
    ]
    scale = _WIDTH / cut.length
    for first, last, unit in _runs(cut.positions, cut.units):
        x, width = _LABEL + first * scale, max(0.5, (last + 1 - first) * scale)
        parts.append(f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="16" fill="{_colour(unit, units)}"/>')
    parts.append(_words(_LABEL + _WIDTH + 10, top + 13, f"{len(cut.positions)} of {cut.length}", _QUIET))
    return parts


def _words(x: int, y: int, text: str, fill: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{fill}" {more}>{escape(text)}</text>'


def _runs(positions: Sequence[int], units: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs (first, last, unit) of adjacent positions of the same unit."""
    runs: list[tuple[int, int, int]] = []
    for position, unit in sorted(zip(positions, units, strict=True)):
        if runs and runs[-1][1] == position - 1 and runs[-1][2] == unit:
            runs[-1] = (runs[-1][0], position, unit)
        else:
            runs.append((position, position, unit))
    return runs


def _colour(unit: int, units: int) -> str:
    """From blue over green to orange; even and odd units differ in lightness to distinguish neighbours."""
    hue = 220 - 190 * unit / max(1, units - 1)
    return f"hsl({hue:.0f} 70% {46 + 12 * (unit % 2)}%)"
