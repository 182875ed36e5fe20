"""One runtime for the whole run, picked by what the source takes in each: ``--runtime auto``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from penjing import measure
from penjing.errors import ExportError, PenjingError
from penjing.pipeline import evidence
from penjing.pipeline.building import build
from penjing.pipeline.prepare import Prepared
from penjing.steps.draft import Draft

SECONDS, ROUNDS = 0.15, 3  # of timing, for each runtime


def picked(prepared: Prepared) -> tuple[str, ...]:
    """The runtimes of a run: those of the request, or the fastest of them where it is to be picked.

    The source in fp32 is exported for each and timed in turns; an export to ONNX is made once for all that read it. A
    runtime that can't take it is left out, with a warning. What was picked is kept for a resume.

    Raises:
        ExportError: None of them can take the source.
    """
    run, names = prepared.run, prepared.order.runtimes
    if not prepared.order.auto or len(names) == 1:
        return names
    if (stored := run.folder.read_state("runtime")) in names:
        return (stored,)
    with tempfile.TemporaryDirectory(prefix="penjing-") as aside, run.costing("pick a runtime"):
        targets = []
        for name in names:
            folder = Path(aside) / name
            folder.mkdir()
            try:
                manifest = build(Draft(run.network), name, "fp32", run.task, prepared.structure, folder)
            except PenjingError as error:
                run.warn(f"{name} is left out: {error.what}{f' ({error.got})' if error.got else ''}")
                continue
            inputs = evidence.arrays(manifest, evidence.one_call(run.task, run.batch))
            targets.append(measure.Target(name, folder, inputs, run.batch))
        if not targets:
            raise ExportError(
                "no runtime can take the network",
                code="no-runtime",
                got="; ".join(run.warnings[-len(names) :]),
                expected=f"a network that one of {', '.join(names)} takes",
                remedy="penjing inspect --runtime all names the operators that they lack",
            )
        timings = measure.compare(targets, threads=run.threads, seconds=SECONDS, rounds=ROUNDS)
    fastest = min(timings, key=lambda name: timings[name].latency.median)
    run.folder.write_state("runtime", fastest)
    times = ", ".join(f"{timing.latency.median:.3g} ms in {name}" for name, timing in timings.items())
    run.warn(f"the runtime is {fastest}: the source in fp32 takes {times}")
    return (fastest,)
