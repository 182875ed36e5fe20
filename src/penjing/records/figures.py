"""The figures of a candidate, each declared in one row: goals, tables, pictures and the command line iterate over it.

A new figure is a field of `Measured`, a row here, and the code that measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from penjing.records.record import Candidate, Measured

Unit = Literal["metric", "%", "ms", "/s", "bytes", "mJ", "count", "MACs"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure that a goal can name.

    Attributes:
        name: As goals write it; the unit stands in the name.
        unit: Of its values; "%" is a share that people read in percent, "metric" what the task measures.
        better: Which way it improves; "task" says that `Record.higher_is_better` tells.
        label: Its name in tables; "" for a figure that another row tells.
        words: An artifact that is better and one that is worse, in words: ("faster", "slower").
        aliases: What people write in its place: a goal suggests the name.
        read: The value of a measured row, None where it was not measured. Without it, the figure is a comparison of
            two rows and a field of `Candidate`.
        optional: Of interest only where it was measured.
    """

    name: str
    unit: Unit
    better: Literal["less", "more", "task"] = "less"
    label: str = ""
    words: tuple[str, str] = ("less", "more")
    aliases: tuple[str, ...] = ()
    read: Callable[[Measured], float | None] | None = None
    optional: bool = False

    def of(self, candidate: Candidate) -> float | None:
        """The candidate's value, None where it was not measured (or is not a finite number)."""
        value = getattr(candidate, self.name) if self.read is None else self.read(candidate.measured)
        return float(value) if value is not None and math.isfinite(value) else None


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(name="metric", unit="metric", better="task", read=lambda row: row.metric, aliases=("accuracy",)),
        Figure(name="drop", unit="%", aliases=("loss",)),
        Figure(name="relative_drop", unit="%"),
        Figure(
            name="latency_ms",
            unit="ms",
            label="Latency",
            words=("faster", "slower"),
            aliases=("latency", "time", "speed"),
            read=lambda row: row.latency_ms.median if row.latency_ms is not None else None,
        ),
        Figure(
            name="throughput_per_s",
            unit="/s",
            better="more",
            label="Throughput",
            words=("more", "less"),
            aliases=("throughput", "fps"),
            read=lambda row: row.throughput_per_s,
        ),
        Figure(
            name="size_bytes",
            unit="bytes",
            label="Size on disk",
            words=("smaller", "larger"),
            aliases=("size", "bytes"),
            read=lambda row: row.size_bytes,
        ),
        Figure(
            name="packed_bytes",
            unit="bytes",
            label="Packed size",
            words=("smaller", "larger"),
            aliases=("packed",),
            read=lambda row: row.packed_bytes,
            optional=True,
        ),
        Figure(
            name="peak_memory_bytes",
            unit="bytes",
            label="Peak memory",
            aliases=("memory", "ram"),
            read=lambda row: row.peak_memory_bytes,
        ),
        Figure(
            name="load_ms",
            unit="ms",
            label="Time to open",
            words=("shorter", "longer"),
            aliases=("load", "startup"),
            read=lambda row: row.load_ms,
            optional=True,
        ),
        Figure(
            name="parameters",
            unit="count",
            label="Parameters",
            words=("fewer", "more"),
            aliases=("params",),
            read=lambda row: row.parameters,
        ),
        Figure(
            name="macs",
            unit="MACs",
            label="Multiply-accumulates",
            words=("fewer", "more"),
            aliases=("flops",),
            read=lambda row: row.macs,
        ),
        Figure(
            name="energy_mj",
            unit="mJ",
            label="Energy a call",
            aliases=("energy",),
            read=lambda row: row.energy_mj.value if row.energy_mj is not None else None,
            optional=True,
        ),
    )
}
