"""The commands `pack` and `unpack`: a network's files as one entropy-coded file, and back."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from penjing.cli.console import Terminal
from penjing.records.files import write_text
from penjing.records.folder import check_writable
from penjing.report import packed_bars
from penjing.report.numbers import figure

_SHOWN = 12  # tensors, unless --all


def pack(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the packed file, and tell what the largest tensors take in it."""
    from rich.table import Table

    from penjing.storage import checkpoint, packed
    from penjing.storage.regions import ALL_BITS as BITS

    if parsed.picture:
        check_writable(Path(parsed.picture))
    only = checkpoint.FILES if parsed.checkpoint else ()
    done = packed.pack(parsed.source, parsed.out, only=only, threads=parsed.threads, force=parsed.force)
    if parsed.picture:
        rows = [(name, kind, before * 32 // BITS[kind], before, after) for name, kind, before, after in done.tensors]
        Path(parsed.picture).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(parsed.picture), packed_bars.picture(rows, f"Bytes of the tensors of {done.path.name}"))
    if parsed.json:
        data = dataclasses.asdict(done) | {"path": str(done.path), "unpacked_bytes": done.unpacked_bytes}
        print(json.dumps(data, indent=2))
        return 0
    out = Terminal()
    table = Table("tensor", "type", "bytes", "packed", "share", box=None)
    for name, dtype, before, after in done.tensors[:_SHOWN]:
        table.add_row(name, dtype, figure(before, "bytes"), figure(after, "bytes"), f"{after / before:.0%}")
    if done.tensors:
        out.print(table)
    if len(done.tensors) > _SHOWN:
        out.print(f"and {len(done.tensors) - _SHOWN} more", highlight=False)
    share = done.size_bytes / max(1, done.unpacked_bytes)
    out.print(
        f"{done.path}: {figure(done.size_bytes, 'bytes')}, {share:.1%} of {figure(done.unpacked_bytes, 'bytes')} "
        f"in {len(done.files)} {'file' if len(done.files) == 1 else 'files'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def unpack(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the files of a packed network."""
    from penjing.storage import packed

    files = packed.unpack(parsed.packed, parsed.out, threads=parsed.threads)
    if parsed.json:
        print(json.dumps([str(file) for file in files], indent=2))
        return 0
    for file in files:
        Terminal().print(str(file), highlight=False, soft_wrap=True)
    return 0
