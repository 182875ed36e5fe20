"""The measure stage: the source and all candidates are timed side by side, each in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penjing import measure, runtimes
from penjing.errors import PenjingError
from penjing.pipeline import energies, evidence
from penjing.pipeline.building import build
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.run import Run
from penjing.records import Candidate, Energy, Measured, from_dict, steadiness
from penjing.records.folder import SOURCE, STATE
from penjing.records.manifest import Manifest, read_manifest
from penjing.steps.draft import Draft


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The result of the measure stage.

    Attributes:
        source: The source's figures.
        candidates: Those that could be timed, and the rejected ones.
        floors: Runtime → the source itself in fp32 there, where the fp32 candidate is another network.
    """

    source: Measured
    candidates: tuple[Candidate, ...]
    floors: dict[str, Measured]


def measure_all(prepared: Prepared, candidates: Sequence[Candidate], *, with_floors: bool = True) -> Timed:
    """Time all candidates interleaved with the source; rejected ones only if no other candidate is left.

    Args:
        prepared: The run.
        candidates: Its artifacts.
        with_floors: Whether the source in fp32 in each runtime is timed with them.
    """
    run = prepared.run
    here = [c for c in candidates if not runtimes.absent(c.runtime)]
    offered = [c for c in here if c.rejection is None] or here
    plain = floors(run, here, prepared.source, prepared.structure) if with_floors else {}
    timings = latencies(run, prepared.manifest, offered, plain)
    known = energies.named_by(prepared.order.goal) and run.target is None
    spent = _metered(run, prepared.manifest, [c for c in offered if c.name in timings]) if known else {}
    return Timed(
        source=timed(prepared.source, timings["source"], spent.get("source")),
        candidates=tuple(
            replace(c, measured=timed(c.measured, timings[c.name], spent.get(c.name))) if c.name in timings else c
            for c in candidates
            if c.name in timings or c.rejection is not None
        ),
        floors={
            runtime: timed(row, timings[f"floor-{runtime}"])
            for runtime, row in plain.items()
            if f"floor-{runtime}" in timings
        },
    )


def floors(run: Run, candidates: Sequence[Candidate], source: Measured, structure: Any) -> dict[str, Measured]:
    """The source itself in fp32 in each runtime where the fp32 candidate is another network, built anew; its size.

    What is faster or smaller than this is so by the recipe; what this is faster than torch, by the runtime. Where it
    can't be built, the runtime is left out.
    """
    floors = {}
    for runtime in dict.fromkeys(c.runtime for c in candidates if not runtimes.SPECS[c.runtime].levels):
        plain = next((c for c in candidates if (c.runtime, c.precision) == (runtime, "fp32")), None)
        if plain is not None and plain.rejection is not None:
            continue  # and so would this be
        if plain and (plain.measured.parameters, plain.measured.macs) == (source.parameters, source.macs):
            continue
        folder = run.folder.path / _floor(runtime)
        try:
            if not folder.exists():
                with run.costing(f"export the source for {runtime}"), run.folder.building(_floor(runtime)) as aside:
                    build(Draft(run.network), runtime, "fp32", run.task, structure, aside)
            size = measure.size_bytes(folder, read_manifest(folder).files())
        except PenjingError as error:
            run.warn(f"the source could not be built in fp32 for {runtime}, to be compared with: {error.what}")
            continue
        floors[runtime] = Measured(size_bytes=size, parameters=source.parameters, macs=source.macs)
    return floors


def _floor(runtime: str) -> str:
    return f"{STATE}/floor-{runtime}"


def latencies(
    run: Run, manifest: Manifest, candidates: Sequence[Candidate], floors: Collection[str] = ()
) -> dict[str, measure.Timing]:
    """Time the source and all candidates side by side, each in a process of its own; "source" is the source.

    The source in fp32 in a runtime of `floors` is called "floor-" and the runtime's name. What a runtime crashes or
    hangs at has none, and a warning says so.
    """
    if stored := run.folder.read_state("latency"):
        return {name: from_dict(measure.Timing, value) for name, value in stored.items()}
    targets = _targets(run, manifest, candidates, floors)
    timings: dict[str, measure.Timing] = {}
    again = True  # a machine that stood still for a minute costs the round, not the run
    with run.costing("measure latency"):
        while not timings:
            try:
                timings = measure.compare(
                    targets,
                    threads=run.threads,
                    seconds=run.seconds,
                    patience=steadiness.PATIENCE if run.seconds >= steadiness.WORTH_SECONDS else 1,
                    warmup_seconds=min(0.3, run.seconds),
                    events=run.events,
                )
            except measure.TargetError as error:
                if error.target == "source" and again:
                    again = False
                    run.warn(f"the source could not be timed, and is timed once more: {error.what} ({error.got})")
                    continue
                targets = [target for target in targets if target.name != error.target]
                if error.target == "source" or not {t.name for t in targets} & {c.name for c in candidates}:
                    raise
                run.warn(f"{error.target} could not be timed: {error.what} ({error.got})")
    run.folder.write_state("latency", {name: dataclasses.asdict(t) for name, t in timings.items()})
    return timings


def _targets(
    run: Run, manifest: Manifest, candidates: Sequence[Candidate], floors: Collection[str] = ()
) -> list[measure.Target]:
    inputs = evidence.arrays(manifest, evidence.one_call(run.task, run.batch))
    folders = {"source": run.folder.path / SOURCE} | {c.name: run.folder.path / c.folder for c in candidates}
    folders |= {f"floor-{runtime}": run.folder.path / _floor(runtime) for runtime in floors}
    return [measure.Target(name, folder, inputs, run.batch) for name, folder in folders.items()]


def _metered(run: Run, manifest: Manifest, candidates: Sequence[Candidate]) -> dict[str, Energy]:
    return energies.metered(run, candidates, _targets(run, manifest, candidates))


def timed(measured: Measured, timing: measure.Timing, energy: Energy | None = None) -> Measured:
    """The figures with latency, throughput and memory filled in, and an energy that was measured."""
    latency = timing.latency
    return replace(
        measured,
        latency_ms=latency,
        throughput_per_s=1000 * latency.batch / latency.median,
        peak_memory_bytes=timing.peak_memory_bytes,
        load_ms=timing.load_ms,
        energy_mj=energy or measured.energy_mj,
    )
