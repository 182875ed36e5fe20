"""The command `quantize`: one integer file, and what there is to know of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from penjing.cli import sources
from penjing.cli.console import Progressing, Terminal
from penjing.errors import SourceError, TaskError
from penjing.tasks.usercode import check_file

if TYPE_CHECKING:
    from penjing.pipeline.quick import QuantizedFile


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
    for text in lines(done):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def lines(done: QuantizedFile) -> list[str]:
    """What is told of a file: its size, its parity, the operators in integers, and how it is opened."""
    from penjing.report.numbers import figure

    planned, source = done.parity
    share = done.size_bytes / max(1, done.source_bytes)
    told = [
        f"{done.path} for {done.runtime}: {figure(done.size_bytes, 'bytes')}, {share:.0%} of the source's weights",
        f"parity with the source: {source.snr_db:.1f} dB"
        + (f", {source.agreement:.1%} of the samples in the same class" if source.agreement is not None else "")
        + f" ({source.samples} samples); with what was planned: {planned.snr_db:.1f} dB",
        f"in integers: {_counts(done.integer_operators)}; in floating point: {_counts(done.float_operators)}",
    ]
    if done.remedy:
        told.append(f"outlier channels: {done.remedy}")
    if done.settings:
        settings = ", ".join(f"{name}={value}" for name, value in done.settings.items())
        told.append(f"measured with {settings}")
    return [*told, f"{sum(done.seconds.values()):.1f} s"]


def _counts(operators: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(operators.items())) or "none"
