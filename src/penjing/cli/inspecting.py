"""What `penjing inspect` says of integers: where they cost accuracy, and what stays in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from penjing.cli.console import Terminal

if TYPE_CHECKING:
    from penjing.pipeline.inspection import Inspection


def show_branches(inspection: Inspection, out: Terminal) -> None:
    """Print where values of different kinds meet on the way to an output, with their layers."""
    from penjing.report import table

    if inspection.branches:
        out.print("\n[bold]outputs of different magnitude[/bold]: these layers need care, one scale can't serve them")
        for line in table.branches(inspection.branches):
            out.print(f"  {line}", markup=False, highlight=False)


def show_floats(inspection: Inspection, out: Terminal) -> None:
    """Print what stays in floating point in each runtime, and why."""
    for runtime, reasons in inspection.floats.items():
        out.print(f"\n[bold]{runtime}[/bold]: ", end="")
        every = "every convolution, linear layer and addition can run in integers"
        out.print("stays in floating point:" if reasons else every)
        for line in _by_reason(reasons):
            out.print(f"  {line}", markup=False, highlight=False)
        for note in inspection.notes[runtime]:
            out.print(f"  note: {note}", markup=False, highlight=False)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """A line for every operator; what is said of more than a few of one layer, such as its steps, is one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, reason in reasons.items():
        groups.setdefault((site.rpartition("/")[0] or site, reason), []).append(site)
    lines = []
    for (_, reason), sites in groups.items():
        many = len(sites) > 4
        lines += [f"{sites[0]} to {sites[-1]} ({len(sites)}): {reason}"] if many else [f"{s}: {reason}" for s in sites]
    return lines
