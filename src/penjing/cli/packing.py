"""The commands `pack` and `unpack`: a network's files as one entropy-coded file, and back."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.cli import sources
from penjing.cli.console import Progressing, Terminal
from penjing.errors import SourceError, TaskError, UsageError
from penjing.records.files import write_text
from penjing.records.folder import check_writable
from penjing.report import packed_bars
from penjing.report.numbers import figure
from penjing.tasks.usercode import check_file

if TYPE_CHECKING:
    from penjing.storage.packed import Packed

_SHOWN = 12  # tensors, unless --all


def pack(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the packed file, and tell what the largest tensors take in it."""
    from penjing.storage import checkpoint, packed

    limits = _limits(parsed)
    if parsed.picture:
        check_writable(Path(parsed.picture))
    if limits:
        return _lossy(parsed, messages, limits)
    only = checkpoint.FILES if parsed.checkpoint else ()
    done = packed.pack(parsed.source, parsed.out, only=only, threads=parsed.threads, force=parsed.force)
    _draw(parsed.picture, done)
    if parsed.json:
        print(json.dumps(_plain(done), indent=2))
        return 0
    out = Terminal()
    _show(done, out)
    share = done.size_bytes / max(1, done.unpacked_bytes)
    out.print(
        f"{done.path}: {figure(done.size_bytes, 'bytes')}, {share:.1%} of {figure(done.unpacked_bytes, 'bytes')} "
        f"in {len(done.files)} {'file' if len(done.files) == 1 else 'files'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _limits(parsed: argparse.Namespace) -> dict[str, float]:
    """The limits that were given, as `share.Grid` calls them.

    Raises:
        UsageError: Options that say nothing together.
    """
    options = {"noise": "snr_db", "agreement": "agreement", "drop": "drop"}
    limits = {name: getattr(parsed, option) for option, name in options.items() if getattr(parsed, option) is not None}
    needing = {
        "--calibration": parsed.calibration, "--weights": parsed.weights, "--ignore-weights": parsed.ignore_weights,
        "--keep": parsed.keep, "--seed": parsed.seed,
    }  # fmt: skip
    given = [option for option, value in needing.items() if value not in (None, [])]
    if given and not limits:
        raise UsageError(
            f"{given[0]} says nothing where files are packed as they are",
            code="no-limit",
            got=", ".join(given),
            expected="a limit beside it: --noise 25dB, --agreement 97% or --drop 0.5%",
        )
    if limits and parsed.checkpoint:
        raise UsageError(
            "a checkpoint is packed as it is",
            code="contradiction",
            got="--checkpoint beside " + ", ".join(f"--{o}" for o, name in options.items() if name in limits),
            expected="one of both",
            remedy="give the network as a SOURCE",
        )
    if limits and parsed.calibration is None:
        raise UsageError(
            "packing with loss needs samples on which the loss is measured",
            code="no-calibration",
            got="a limit without --calibration",
            expected="--calibration DATA: inputs without labels, or for --drop a TASK with select",
        )
    return limits


def _lossy(parsed: argparse.Namespace, messages: Terminal, limits: dict[str, float]) -> int:
    """Pack with loss."""
    check_file(parsed.source, error=SourceError, role="source")
    check_file(parsed.calibration, error=TaskError, role="calibration data")
    from penjing.pipeline.lossy import pack_to

    with Progressing(messages) as progress:
        done = pack_to(
            sources.source(parsed), parsed.calibration, parsed.out, **limits, keep=parsed.keep, seed=parsed.seed or 0,
            threads=parsed.threads, force=parsed.force, listeners=[progress],
        )  # fmt: skip
    _draw(parsed.picture, done.packed)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(done) | {"packed": _plain(done.packed)}, indent=2))
        return 0
    out = Terminal()
    _show(done.packed, out)
    for text in [*done.lines(), f"{sum(done.seconds.values()):.1f} s"]:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _plain(done: Packed) -> dict[str, Any]:
    return dataclasses.asdict(done) | {"path": str(done.path), "unpacked_bytes": done.unpacked_bytes}


def _draw(picture: str | None, done: Packed) -> None:
    """Write the image that was asked for."""
    if not picture:
        return
    from penjing.storage.regions import ALL_BITS as BITS

    rows = [(name, kind, before * 32 // BITS[kind], before, after) for name, kind, before, after in done.tensors]
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(picture), packed_bars.picture(rows, f"Bytes of the tensors of {done.path.name}"))


def _show(done: Packed, out: Terminal) -> None:
    """What the largest tensors take."""
    from rich.table import Table

    table = Table("tensor", "type", "bytes", "packed", "share", box=None)
    for name, dtype, before, after in done.tensors[:_SHOWN]:
        table.add_row(name, dtype, figure(before, "bytes"), figure(after, "bytes"), f"{after / before:.0%}")
    if done.tensors:
        out.print(table)
    if len(done.tensors) > _SHOWN:
        out.print(f"and {len(done.tensors) - _SHOWN} more", highlight=False)


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
