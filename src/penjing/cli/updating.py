"""The commands `delta` and `patch`: an update from one version of a network to the next."""

from __future__ import annotations

import argparse
import dataclasses
import json

from penjing.cli.console import Terminal
from penjing.report.numbers import figure


def delta(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the update, and tell what it takes."""
    from rich.table import Table

    from penjing.storage import delta as updates

    done = updates.delta(parsed.old, parsed.new, parsed.out, threads=parsed.threads, force=parsed.force)
    if parsed.json:
        data = dataclasses.asdict(done) | {"path": str(done.path), "new_bytes": done.new_bytes}
        print(json.dumps(data, indent=2))
        return 0
    out = Terminal()
    table = Table("", "tensors", "bytes", "in the update", box=None)
    for word, (number, before, after) in done.tensors.items():
        if number:
            table.add_row(word, str(number), figure(before, "bytes"), figure(after, "bytes"))
    _, before, after = done.other
    table.add_row("other bytes", "", figure(before, "bytes"), figure(after, "bytes"))
    out.print(table)
    share = done.size_bytes / max(1, done.new_bytes)
    out.print(
        f"{done.path}: {figure(done.size_bytes, 'bytes')}, {share:.1%} of {figure(done.new_bytes, 'bytes')}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def patch(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the new version."""
    from penjing.storage import delta as updates

    files = updates.patch(parsed.old, parsed.update, parsed.out, threads=parsed.threads, force=parsed.force)
    if parsed.json:
        print(json.dumps([str(file) for file in files], indent=2))
        return 0
    for file in files:
        Terminal().print(str(file), highlight=False, soft_wrap=True)
    return 0
