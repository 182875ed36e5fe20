"""What `penjing inspect` says of integers: where they cost accuracy, and what stays in floating point."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penjing.cli.console import Terminal
from penjing.errors import UsageError

if TYPE_CHECKING:
    from penjing.pipeline.inspection import Inspection


def show_gains(inspection: Inspection, out: Terminal) -> None:
    """Print what each optimization before export removes."""
    from penjing.report import table

    if inspection.gains:
        out.print("\n[bold]optimized before export[/bold]")
        for line in table.gains(inspection.gains):
            out.print(f"  {line}", markup=False, highlight=False)


def show_diagnosis(inspection: Inspection, out: Terminal) -> None:
    """Print what the network will gain at most, and why not more."""
    from penjing.report import expected

    if inspection.diagnosis is not None:
        out.print("\n[bold]what to expect[/bold]")
        for line in expected.lines(inspection.diagnosis):
            out.print(f"  {line}", markup=False, highlight=False)


def show_branches(inspection: Inspection, out: Terminal) -> None:
    """Print where values of different kinds meet on the way to an output, with their layers."""
    from penjing.report import table

    if inspection.branches:
        out.print("\n[bold]outputs of different magnitude[/bold]: these layers need care, one scale can't serve them")
        for line in table.branches(inspection.branches):
            out.print(f"  {line}", markup=False, highlight=False)


def show_activations(inspection: Inspection, out: Terminal) -> None:
    """Print what the activations need in the best order, and what is alive at the peak."""
    from penjing.report.numbers import figure

    best, narrow = inspection.activations, inspection.int8_activations
    if best is None or narrow is None:
        return
    known = "no order needs less" if best.proved else "the best order that was found"
    given = figure(best.graph_bytes, "bytes")
    out.print(
        f"with elementwise operators in place: {given} in this order, {figure(best.size_bytes, 'bytes')} in the order "
        f"that needs least ({known}); {figure(narrow.size_bytes, 'bytes')} with 8 bits a value",
        *(f"  while {best.site} runs: {name} {figure(size, 'bytes')}" for name, size in list(best.alive.items())[:3]),
        sep="\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_floats(inspection: Inspection, out: Terminal) -> None:
    """Print what stays in floating point in each runtime, and why."""
    notes = list(inspection.notes.values())
    shared = [n for n in notes[0] if all(n in others for others in notes[1:])] if len(notes) > 1 else []
    for runtime, reasons in inspection.floats.items():
        out.print(f"\n[bold]{runtime}[/bold]: ", end="")
        every = "every convolution, linear layer and addition can run in integers"
        out.print("stays in floating point:" if reasons else every)
        for line in _by_reason(reasons):
            out.print(f"  {line}", markup=False, highlight=False)
        for note in inspection.notes[runtime]:
            if note not in shared:
                out.print(f"  note: {note}", markup=False, highlight=False)
    for note in shared:
        out.print(f"\nnote: {note}", markup=False, highlight=False)


def show_device(inspection: Inspection, target: str | None, out: Terminal) -> None:
    """Print what the network needs on the target beside what fits there, and every limit that it breaks."""
    from penjing.report.numbers import figure
    from penjing.targets import load

    if target is None or inspection.device is None:
        return
    device, needs = load(target), inspection.device
    both = "weights and activations" if device.limits.weights_in == "memory" else "activations"
    rows = (
        (needs.storage_bytes, "weights", device.limits.storage_bytes, "storage"),
        (needs.memory_bytes, both, device.limits.memory_bytes, "memory"),
    )
    parts = [
        f"about {figure(size, 'bytes')} of {what}" + (f", of {figure(limit, 'bytes')} of {where}" if limit else "")
        for size, what, limit, where in rows
    ]
    texts = [f"{device.name}: {'; '.join(parts)}"]
    texts += [f"{device.name} can't take it: {excess}" for excess in inspection.excesses]
    for text in texts:
        out.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)


def show_sensitivity(inspection: Inspection, parsed: argparse.Namespace, out: Terminal) -> int:
    """Print what the outputs lose by every group that is pruned alone; returns the exit code."""
    from penjing.records import files
    from penjing.report import sensitivity

    out.print(sensitivity.text(inspection.sensitivity), markup=False, highlight=False, soft_wrap=True)
    if parsed.picture:
        files.write_text(Path(parsed.picture), sensitivity.picture(inspection.sensitivity))
        out.print(parsed.picture, markup=False, highlight=False)
    return 0


def show_group(inspection: Inspection, parsed: argparse.Namespace, out: Terminal) -> int:
    """Print everything that is coupled with the channels of a layer; returns the exit code."""
    from penjing.records import files
    from penjing.report import strips

    row = next((group for group in inspection.groups if group.name == parsed.group), None)
    if row is None:
        names = [group.name for group in inspection.groups]
        near = difflib.get_close_matches(parsed.group, names, n=3)
        raise UsageError(
            "the group of channels is unknown",
            code="unknown-group",
            got=parsed.group,
            expected=f"one of {len(names)} groups, for example {', '.join(names[:3])}",
            remedy=f"did you mean {' or '.join(near)}?" if near else None,
        )
    out.print(strips.text(row), markup=False, highlight=False)
    if parsed.picture:
        files.write_text(Path(parsed.picture), strips.picture(row))
        out.print(parsed.picture, markup=False, highlight=False)
    return 0


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
