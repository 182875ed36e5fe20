"""Several runs side by side: their figures, which of them can be compared, and what differs. Opens without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penjing.records import steadiness
from penjing.records.differences import Difference, differences
from penjing.records.figures import FIGURES
from penjing.records.record import Measured, Record
from penjing.records.runs import RunRow, read_runs

JUDGED = ("metric", "drop", "relative_drop")
TIMED = ("latency_ms", "throughput_per_s", "load_ms", "peak_memory_bytes", "energy_mj")
NOISE = {"peak_memory_bytes": 0.02, "load_ms": 0.2}
"""Relative variation between repeated measurements; smaller differences count as ties."""
PACE = 1.2
"""The same source network on the same machine takes as long in every run; beyond this ratio something slowed one."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Why figures of the runs can't be compared.

    Attributes:
        code: The kind of reason, for programs: "metric", "data", "network", "target", "machine", "threads", "batch",
            "busy", "pace" or "method".
        figures: Names of the figures that it is about.
        reason: In words, with the runs' names.
    """

    code: str
    figures: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        runs: In the order in which they were named.
        conflicts: Why figures can't be compared; what no conflict names can be.
        differences: What differs between what the runs were given, and where they ran.
    """

    runs: tuple[RunRow, ...]
    conflicts: tuple[Conflict, ...]
    differences: tuple[Difference, ...]

    def comparable(self, figure: str) -> bool:
        """Whether a figure may be compared over all runs that have it."""
        return not any(figure in conflict.figures for conflict in self.conflicts)

    def values(self, figure: str) -> dict[str, float]:
        """A figure of every run's artifact, by the run's name; without runs where it was not measured."""
        read = {run.name: value(run.record, figure) for run in self.runs}
        return {name: number for name, number in read.items() if number is not None}

    def best(self, figure: str) -> tuple[str, ...]:
        """Names of the runs with the best value; none where the figure can't be compared, or all are equal.

        Latencies whose middle halves overlap with those of the fastest count as equal to it.
        """
        values = self.values(figure)
        if len(values) < 2 or not self.comparable(figure):
            return ()
        better = FIGURES[figure].better
        upwards = self.runs[0].record.higher_is_better if better == "task" else better == "more"
        top = max(values.values()) if upwards else min(values.values())
        near = abs(top) * NOISE.get(figure, 0.0)
        winners = tuple(name for name, number in values.items() if abs(number - top) <= near)
        if figure == "latency_ms":
            winners = self._as_fast(winners[0])
        return winners if len(winners) < len(values) else ()

    def _as_fast(self, fastest: str) -> tuple[str, ...]:
        timed = {run.name: measured(run.record).latency_ms for run in self.runs}
        least = timed[fastest]
        assert least is not None
        reach = least.median * (1 + least.spread / 2)
        return tuple(name for name, t in timed.items() if t is not None and t.median * (1 - t.spread / 2) <= reach)

    def to_data(self) -> dict[str, Any]:
        """Everything as plain data for JSON; of the records the figures alone."""
        names = [name for name in FIGURES if self.values(name)]
        return {
            "runs": [_plain(run, names) for run in self.runs],
            "best": {name: list(self.best(name)) for name in names if self.best(name)},
            "conflicts": [asdict(conflict) | {"figures": list(conflict.figures)} for conflict in self.conflicts],
            "differences": [asdict(difference) for difference in self.differences],
        }


def compare(folders: Sequence[Path | str]) -> Comparison:
    """Read several finished runs and put them side by side; see `read_runs` for arguments and errors."""
    return side_by_side(read_runs(folders))


def side_by_side(runs: Sequence[RunRow]) -> Comparison:
    """Put runs side by side whose records were read already."""
    conflicts = (*_judged(runs), *_timed(runs), *_slowed(runs))
    return Comparison(runs=tuple(runs), conflicts=conflicts, differences=differences(runs))


def measured(record: Record) -> Measured:
    """The figures of the delivered artifact; all None without one."""
    return record.artifact or (record.chosen.measured if record.chosen else Measured())


def value(record: Record, figure: str) -> float | None:
    """A figure of a run's artifact; None where it was not measured, or is not a finite number.

    `drop` and `relative_drop` are those of the metric by `Task.evaluate`, also where `Task.select` chose.
    """
    read = FIGURES[figure].read
    number = read(measured(record)) if read is not None else _drop(record, relative=figure == "relative_drop")
    return float(number) if number is not None and math.isfinite(number) else None


def network(record: Record) -> Hashable:
    """What tells a run's source network from others: the hash of the stored source, or what is known of it."""
    return record.files.get("source/model.pt2") or (
        record.source.parameters,
        record.source.macs,
        tuple((row.name, row.kind) for row in record.layers),
        record.source.metric,
    )


def _drop(record: Record, *, relative: bool) -> float | None:
    after = measured(record).metric
    before = record.source.metric if record.reference is None else record.reference.measured.metric
    if before is None or after is None or (relative and not before):
        return None
    loss = before - after if record.higher_is_better else after - before
    return loss / abs(before) if relative else loss


def _plain(run: RunRow, names: Sequence[str]) -> dict[str, Any]:
    record, artifact = run.record, measured(run.record)
    chosen = record.chosen
    return {
        "name": run.name,
        "folder": run.folder,
        "created": record.created,
        "source": record.name,
        "goal": record.goal.text,
        "met": record.goal.met,
        "reason": record.goal.reason,
        "chosen": record.goal.chosen,
        "runtime": None if chosen is None else chosen.runtime,
        "precision": None if chosen is None else chosen.precision,
        "metric_name": record.metric_name,
        "figures": {name: value(record, name) for name in names},
        "latency_ms": None if artifact.latency_ms is None else asdict(artifact.latency_ms),
        "energy_mj": None if artifact.energy_mj is None else asdict(artifact.energy_mj),
    }


def _judged(runs: Sequence[RunRow]) -> tuple[Conflict, ...]:
    """Why metrics and drops can't be compared."""
    runs = [run for run in runs if measured(run.record).metric is not None]
    direction = {True: "higher is better", False: "lower is better"}
    metric = _split(
        runs,
        lambda record: f"{record.metric_name} ({direction[record.higher_is_better]})",
        "they have different metrics",
    )
    data = _split(runs, _evaluation, "the metric was computed on different data")
    # Drops are against each run's own network, and agreement is that with it.
    whose = _split(runs, lambda record: _baseline(record), "they are against different networks", _baseline_words)
    agrees = any(run.record.metric_name.startswith("agreement with") for run in runs)
    rows = (
        ("metric", JUDGED, metric),
        ("data", JUDGED, "" if metric else data),
        ("network", JUDGED if agrees else JUDGED[1:], whose),
    )
    return tuple(Conflict(code=code, figures=figures, reason=text) for code, figures, text in rows if text)


def _timed(runs: Sequence[RunRow]) -> tuple[Conflict, ...]:
    """Why latencies, memory and energy can't be compared."""
    timed = [run for run in runs if measured(run.record).latency_ms is not None]
    energy = [run for run in runs if measured(run.record).energy_mj is not None]
    elsewhere = [f"{run.name}: {run.record.target.name}" for run in timed if run.record.target is not None]
    target = f"this machine's figures are not those of the device ({', '.join(elsewhere)})" if elsewhere else ""
    # A model of the energy knows operations and bytes, not the machine.
    modelled = bool(energy) and all(_method(run.record) == "model" for run in energy)
    here = tuple(name for name in TIMED if name != "energy_mj") if modelled else TIMED
    rows = (
        ("target", here, target),
        ("machine", here, _split(timed, _machine, "they were measured on different machines", _machine_words)),
        (
            "threads",
            TIMED,
            _split(timed, lambda record: _latency(record, "threads"), "they ran with different numbers of threads"),
        ),
        (
            "batch",
            TIMED,
            _split(timed, lambda record: _latency(record, "batch"), "they were timed with different batches"),
        ),
        ("method", ("energy_mj",), _split(energy, _method, "they come about in different ways")),
    )
    return tuple(Conflict(code=code, figures=figures, reason=text) for code, figures, text in rows if text)


def _slowed(runs: Sequence[RunRow]) -> tuple[Conflict, ...]:
    """Why a machine's timings can't be trusted, run by run, or from one run to another."""
    figures = ("latency_ms", "throughput_per_s")
    busy = [(run.name, text) for run in runs if (text := _busy(run.record))]
    if busy:
        reason = "the machine was busy (" + "; ".join(f"{name}: {text}" for name, text in busy) + ")"
        return (Conflict(code="busy", figures=figures, reason=reason),)
    groups: dict[Hashable, dict[str, float]] = {}
    for run in runs:
        latency = run.record.source.latency_ms
        if latency is not None and latency.median > 0 and measured(run.record).latency_ms is not None:
            key = (network(run.record), _machine(run.record), latency.threads, latency.batch)
            groups.setdefault(key, {})[run.name] = latency.median
    for same in groups.values():
        slow, fast = max(same, key=lambda name: same[name]), min(same, key=lambda name: same[name])
        if same[slow] > PACE * same[fast]:
            reason = (
                f"the same source network took {same[slow] / same[fast]:.1f} times as long in {slow} as in {fast}: "
                "the machine was slower then; speed-ups over torch were timed in turns, and stand"
            )
            return (Conflict(code="pace", figures=figures, reason=reason),)
    return ()


def _busy(record: Record) -> str:
    before, after = record.source.latency_ms, measured(record).latency_ms
    if after is None:
        return ""
    if after.doubt or not after.steady:
        return after.doubt or "its timings are unsteady"
    return steadiness.doubt(before, after) if before is not None and before.median > 0 < after.median else ""


def _split(
    runs: Sequence[RunRow],
    key: Callable[[Record], Hashable],
    why: str,
    words: Callable[[Record], str] | None = None,
) -> str:
    """Why runs fall into groups, with the names of each; "" where they are one group."""
    groups: dict[Hashable, list[RunRow]] = {}
    for run in runs:
        groups.setdefault(key(run.record), []).append(run)
    if len(groups) < 2:
        return ""
    shown = {key: str(key) if words is None else words(same[0].record) for key, same in groups.items()}
    parts = [f"{', '.join(run.name for run in same)}: {shown[key]}" for key, same in groups.items()]
    return f"{why} ({'; '.join(parts)})"


def _evaluation(record: Record) -> str:
    return record.data.get("evaluate", "not recorded")[:12]


def _baseline(record: Record) -> Hashable:
    return network(record) if record.reference is None else record.reference.weights


def _baseline_words(record: Record) -> str:
    if record.reference is not None:
        return f"{record.reference.name} {record.reference.weights[:12]}"
    return f"{record.name} {record.files.get('source/model.pt2', '')[:12]}".strip()


def _machine(record: Record) -> Hashable:
    machine = record.machine
    return machine.processor, machine.cores, tuple(sorted(machine.instruction_sets))


def _machine_words(record: Record) -> str:
    machine = record.machine
    return f"{machine.processor or 'unknown'}, {machine.cores} cores, {len(machine.instruction_sets)} instruction sets"


def _latency(record: Record, name: str) -> int:
    return int(getattr(measured(record).latency_ms, name))


def _method(record: Record) -> str:
    energy = measured(record).energy_mj
    return "" if energy is None else energy.method
