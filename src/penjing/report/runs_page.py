"""Several runs side by side as one self-contained HTML page, in the dress of a run's report."""

from __future__ import annotations

from penjing.records.comparison import Comparison
from penjing.report import runs
from penjing.report.html import environment
from penjing.report.runs_picture import picture


def render(comparison: Comparison) -> str:
    """The page as text; the same records give the same text. Nothing is loaded from elsewhere."""
    return (
        environment()
        .get_template("runs.html.j2")
        .render(
            runs=comparison.runs,
            rows=runs.rows(comparison),
            reasons=runs.reasons(comparison),
            picture=picture(comparison),
            changes=runs.changes(comparison),
            same=runs.same(comparison),
        )
    )
