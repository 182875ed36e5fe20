"""Several runs side by side in the terminal: their artifacts, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType

from penjing.records.comparison import Comparison
from penjing.report import runs
from penjing.report.table import Legible, cell, column, plain_table

ABREAST = 4  # runs that stand beside each other in 80 columns
_STAR = " *"


def artifacts(comparison: Comparison) -> Iterator[RenderableType]:
    """A row a figure, a column a run; a star marks the best. Then a line for every reason not to rank a figure.

    More runs than `ABREAST` follow in further tables.
    """
    rows = runs.rows(comparison)
    starred = any(any(row.best) for row in rows)
    notes = (["* the best; ± is half of the interquartile range over the median"] if starred else []) + list(
        runs.reasons(comparison)
    )
    names = [run.name for run in comparison.runs]
    for places in _abreast(len(names)):
        table = plain_table()
        column(table, "")
        for i in places:
            column(table, names[i], "right")
        for row in rows:
            cells = [cell(row.cells[i] + (_STAR if row.best and row.best[i] else ""), _style(row, i)) for i in places]
            table.add_row(cell(row.label), *cells)
        yield table
    yield from (Legible(note) for note in notes)


def changes(comparison: Comparison) -> Iterator[RenderableType]:
    """A row for everything that differs, a column a run."""
    rows = runs.changes(comparison)
    names = [run.name for run in comparison.runs]
    for places in _abreast(len(names)):
        table = plain_table()
        column(table, "what differs")
        for i in places:
            column(table, names[i])
        for topic, several in groupby(rows, key=lambda row: row.topic):
            table.add_row(cell(topic, "bold"))
            for row in several:
                table.add_row(cell(f"  {row.name}"), *(cell(row.cells[i]) for i in places))
        yield table
    yield Legible(runs.same(comparison))


def _style(row: runs.Row, i: int) -> str:
    if row.good:
        return "green" if row.good[i] else "yellow"
    return "bold" if row.best and row.best[i] else ""


def _abreast(number: int) -> list[Sequence[int]]:
    return [range(start, min(start + ABREAST, number)) for start in range(0, number, ABREAST)]
