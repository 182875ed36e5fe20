"""The command `quantize`: one integer file, and what there is to know of it."""

from __future__ import annotations

import argparse
import dataclasses
import json

from penjing.cli import sources
from penjing.cli.console import Progressing, Terminal
from penjing.errors import SourceError, TaskError
from penjing.tasks.usercode import check_file


def quantize(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Write the file, and tell its parity and size."""
    check_file(parsed.source, error=SourceError, role="source")
    check_file(parsed.calibration, error=TaskError, role="calibration data")
    from penjing.pipeline.quick import quantize_to

    with Progressing(messages) as progress:
        done = quantize_to(
            sources.source(parsed),
            parsed.calibration,
            parsed.out,
            runtime=parsed.runtime,
            fast=parsed.fast,
            exclude=parsed.exclude,
            seed=parsed.seed,
            threads=parsed.threads,
            force=parsed.force,
            listeners=[progress],
        )
    if parsed.json:
        print(json.dumps(dataclasses.asdict(done), indent=2, default=str))
        return 0
    out = Terminal()
    for text in [*done.lines(), f"{sum(done.seconds.values()):.1f} s"]:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
