"""The commands `bench` and `record`: an artifact on the device itself, and what was measured there."""

from __future__ import annotations

import argparse
import dataclasses
import json

from penjing.cli.console import Terminal
from penjing.report.numbers import figure


def bench(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the folder for the device, and say how to go on."""
    from penjing.pipeline.device import BENCH, COMMANDS, write_bench

    folder = write_bench(parsed.source, parsed.out, threads=parsed.threads, force=parsed.force)
    files = sorted(folder.iterdir())
    if parsed.json:
        print(json.dumps({str(file): file.stat().st_size for file in files}, indent=2))
        return 0
    out = Terminal()
    for file in files:
        out.print(f"{file}  {figure(file.stat().st_size, 'bytes')}", highlight=False, soft_wrap=True, markup=False)
    out.print(
        f"Copy the folder to the device and run there: python {BENCH} --out bench.json ({COMMANDS} tells other ways); "
        "then here: penjing record add RUN bench.json",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    return 0


def record(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Take a device's figures into a record, and show them beside this machine's."""
    from penjing.pipeline.device import add_device
    from penjing.report.table import devices

    run = add_device(parsed.run, parsed.bench)
    if parsed.json:
        print(json.dumps([dataclasses.asdict(device) for device in run.devices], indent=2))
    else:
        Terminal().print(devices(run))
    return 0 if run.devices[-1].holds else 3
