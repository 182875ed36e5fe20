"""Latency of many small artifacts in one process, in turns: for tables of layers, where a process each costs too much.

All artifacts are open at once; every round calls each of them for a moment, in an order that `latency.order` varies, so
that drift of the machine meets all alike. Artifacts share caches of the process: figures that are judged come from
`latency.compare`, which gives each a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penjing.errors import UsageError
from penjing.measure.child import THREAD_VARIABLES
from penjing.measure.latency import Target
from penjing.measure.machine import processors
from penjing.measure.processes import Process
from penjing.measure.time_limits import call_s, opening_s

WARMUP_CALLS = 5


def series(targets: Sequence[Target], *, threads: int, rounds: int = 7, seconds: float = 0.1) -> list[list[float]]:
    """Time artifacts in turns in one process.

    Args:
        targets: The artifacts; their runtime is one that may open many in a process.
        threads: That the runtime may use.
        rounds: Turns of each artifact.
        seconds: Timed seconds of each artifact in all rounds together.

    Returns:
        For each target, the median of every round in milliseconds.

    Raises:
        UsageError: There is no target.
        ArtifactError: One can't be opened or run, or the process crashed or took too long.
    """
    if not targets:
        raise UsageError("nothing can be timed", code="targets", got="no artifacts", expected="one or more")
    cpus = ",".join(map(str, processors()[:threads]))
    arguments = ["--threads", str(threads), "--cpus", cpus]
    with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
        process = Process(
            "layers", "penjing.measure.series_worker", arguments, dict.fromkeys(THREAD_VARIABLES, str(threads))
        )
        asking = False
        try:
            for index, target in enumerate(targets):
                path = Path(aside) / f"{index}.npz"
                np.savez(path, *target.inputs)
                request = {"cmd": "open", "folder": str(target.folder), "inputs": str(path), "warmup": WARMUP_CALLS}
                limit = opening_s(Path(target.folder)) + WARMUP_CALLS * call_s(target.inputs)
                process.ask(request, limit_s=limit)
            limit = len(targets) * (seconds + 5 * rounds * max(call_s(t.inputs) for t in targets))
            answer, _ = process.ask({"cmd": "time", "rounds": rounds, "seconds": seconds}, limit_s=limit)
            asking = True
        finally:
            process.close(asking)
    return [[float(ms) for ms in row] for row in answer["rounds"]]
