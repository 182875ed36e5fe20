"""Energy of the source and of every candidate: metered where the goal asks for it and the machine has a meter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from penjing import measure, runtimes
from penjing.goals.goal import Goal
from penjing.measure import energy, meters
from penjing.pipeline.run import Run
from penjing.records import Candidate, Energy, from_dict

SYSFS = Path("/sys")
FIGURE = "energy_mj"
LEAST_S = 3.0  # of metering, for each artifact: counters are coarse, and other programs are in them


def named_by(goal: Goal) -> bool:
    """Whether a goal is about energy."""
    return FIGURE in (goal.objective()[0], *(limit.figure for limit in goal.all_limits()))


def meter_of(runtime: str, sysfs: Path = SYSFS) -> tuple[str, Callable[[], Any]] | None:
    """The meter of what a runtime runs on; None where this machine has none that can be read."""
    if runtimes.SPECS[runtime].place is runtimes.NVIDIA:
        return meters.gpu_meter()
    return meters.power_meter(sysfs)


def metered(
    run: Run, candidates: Sequence[Candidate], targets: Iterable[measure.Target], sysfs: Path = SYSFS
) -> dict[str, Energy]:
    """Measured energies by name, "source" among them; none where not all can be measured, for a warning says so.

    A figure that is measured and one that is modelled can't be compared.

    Args:
        run: For its threads, seconds and folder, in which what was measured stays for a resume.
        candidates: Those of the targets.
        targets: The source and the candidates.
        sysfs: Where Linux shows its meters.

    Raises:
        TargetError: An artifact can't be opened or run.
    """
    if stored := run.folder.read_state("energy"):
        return {name: from_dict(Energy, row) for name, row in stored.items()}
    runtime_of = {"source": "torch"} | {c.name: c.runtime for c in candidates}
    by_meter: dict[str, tuple[tuple[str, Callable[[], Any]], list[measure.Target]]] = {}
    targets = [target for target in targets if target.name in runtime_of]
    for target in targets:
        meter = meter_of(runtime_of[target.name], sysfs)
        if meter is None:
            run.warn(f"energy is modelled ({energy.SOURCE}): this machine has no meter that can be read")
            return {}
        by_meter.setdefault(meter[0], (meter, []))[1].append(target)
    energies: dict[str, Energy] = {}
    with run.costing("measure energy"):
        for meter, mine in by_meter.values():
            seconds = max(LEAST_S, run.seconds)
            energies |= energy.measured(mine, meter, threads=run.threads, seconds=seconds, events=run.events)
    if lost := [target.name for target in targets if target.name not in energies]:
        run.warn(f"energy is modelled ({energy.SOURCE}): the meter can't tell {', '.join(lost)} from an idle machine")
        return {}
    run.folder.write_state("energy", {name: dataclasses.asdict(row) for name, row in energies.items()})
    return energies
