"""Energy of one call: measured where the machine has a meter, otherwise modelled from operations and bytes.

The model takes its constants from Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014
(45 nm, 0.9 V). A processor of today needs less for each, and beside them everything that the model leaves out:
instructions, control, leakage. It ranks artifacts; it does not predict a power bill.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.measure.latency import MAX_CALLS, MIN_CALLS, OPENER, Target, started
from penjing.measure.meters import metered
from penjing.records import Energy, LayerRow

MODEL, MEASURED = "model", "measured"
SOURCE = "Horowitz, ISSCC 2014: 45 nm, 0.9 V"


@dataclass(frozen=True)
class Width:
    """One multiply-accumulate and one value at a width.

    Attributes:
        multiply_pj: Picojoules of a multiplication.
        add_pj: Picojoules of adding the product to its sum.
        bytes: Of one value.
    """

    multiply_pj: float
    add_pj: float
    bytes: int


WIDTHS: dict[str, Width] = {
    "fp32": Width(multiply_pj=3.7, add_pj=0.9, bytes=4),
    # Halves are summed in float32. The paper has no bfloat16: it is taken for float16, whose multiplier is larger.
    "fp16": Width(multiply_pj=1.1, add_pj=0.9, bytes=2),
    "bf16": Width(multiply_pj=1.1, add_pj=0.9, bytes=2),
    "int8": Width(multiply_pj=0.2, add_pj=0.1, bytes=1),  # summed in 32-bit integers
}
CACHE_BYTES = 2**20
CACHE_PJ = 100 / 8  # a byte of a 1 MB cache: 100 pJ for 64 bits
DRAM_PJ = 1300 / 8  # a byte of DRAM: 1.3 to 2.6 nJ for 64 bits; the lower end
TABLES = ("embedding",)  # of a table, the rows that are looked up are read


def modelled(rows: Iterable[LayerRow], batch: int = 1) -> Energy:
    """Millijoules of one call by the model.

    Weights are read once a call from DRAM; every value between layers is written once and read once, through a cache
    of 1 MB where it fits in, through DRAM where it does not. Operators that the runtime fused move nothing.

    Args:
        rows: Layers for one sample, with what the runtime executed; a layer without that counts as it was planned.
        batch: Samples of the call.

    >>> fc = LayerRow(name="fc", kind="linear", parameters=1000, macs=1000, activation_bytes=40, weight_bytes=4000)
    >>> f"{1e9 * modelled([fc]).value:.0f} pJ"  # 1000 × 4.6 pJ, 4000 bytes from DRAM, 2 × 40 through the cache
    '655600 pJ'
    """
    rows = tuple(rows)
    shown = any(row.executed is not None for row in rows)
    picojoules = 0.0
    for row in rows:
        width = WIDTHS.get(row.executed or row.planned, WIDTHS["fp32"])
        picojoules += batch * row.macs * (width.multiply_pj + width.add_pj)
        if shown and row.executed is None and not row.macs and not row.parameters:
            continue  # within the operator before it
        values = batch * row.activation_bytes * width.bytes / WIDTHS["fp32"].bytes
        picojoules += 2 * values * (CACHE_PJ if values <= CACHE_BYTES else DRAM_PJ)
        picojoules += DRAM_PJ * _weights(row, width, values)
    return Energy(value=picojoules / 1e9, method=MODEL, source=SOURCE)


def _weights(row: LayerRow, width: Width, looked_up: float) -> float:
    """Bytes of weights that a layer reads: floats as it computes with them, integers as they are stored."""
    if row.kind in TABLES:
        return min(looked_up, row.weight_bytes)
    return row.weight_bytes if row.stored else row.parameters * width.bytes


def measured(
    targets: Sequence[Target],
    meter: tuple[str, Callable[[], Any]],
    *,
    threads: int,
    seconds: float = 3.0,
    rounds: int = 5,
    opener: str = OPENER,
    events: Callable[..., None] | None = None,
) -> dict[str, Energy]:
    """Millijoules of one call of each target above the idle power; one that can't be told from idle has none.

    The targets take turns, and before each turn the machine is metered while all of them sleep. A meter of a package
    or a board also counts what other programs do.

    Args:
        targets: The artifacts.
        meter: Its name and how to read it, of `penjing.measure.meters`.
        threads: Of the runtimes.
        seconds: Metered seconds per target, and as many at rest.
        rounds: Turns per target.
        opener: "module:function" that opens a folder.
        events: Progress.

    Raises:
        TargetError: An artifact can't be opened or run.
    """
    turns: dict[str, list[float]] = {target.name: [] for target in targets}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        children = []
        for index, target in enumerate(targets):
            child = stack.enter_context(started(target, folder / f"{index}.npz", threads, opener))
            child.ready()
            child.run(seconds=0.1, max_calls=MAX_CALLS, min_calls=MIN_CALLS)
            children.append(child)
        for number in range(rounds):
            for child in children if number % 2 else children[::-1]:
                with metered(meter) as rest:
                    rested = _slept(seconds / rounds)
                start = time.perf_counter()
                with metered(meter) as busy:
                    calls = len(child.run(seconds=seconds / rounds, max_calls=MAX_CALLS, min_calls=MIN_CALLS))
                    took = time.perf_counter() - start
                if "mj" in busy and "mj" in rest:
                    turns[child.name].append((busy["mj"] - rest["mj"] * took / rested) / calls)
            if events is not None:
                events("progress", label="energy", done=number + 1, total=rounds, name=meter[0])
    source = meter[0].replace("idle power included", "idle power subtracted")
    return {name: _summary(values, source) for name, values in turns.items() if _positive(values)}


def _slept(seconds: float) -> float:
    """Seconds that a sleep took."""
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start


def _positive(values: Sequence[float]) -> bool:
    return len(values) >= 2 and statistics.median(values) > 0


def _summary(values: Sequence[float], source: str) -> Energy:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Energy(value=median, method=MEASURED, source=source, spread=(high - low) / median)
