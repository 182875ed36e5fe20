"""Re-running the evidence of a record on this machine. No code that a record names is imported or executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penjing import measure, records
from penjing.errors import ArtifactError, RecordError
from penjing.pipeline import evidence, intact
from penjing.pipeline.building import counted, executed_precisions
from penjing.pipeline.evidence import PROBES
from penjing.pipeline.metrics import metric_of
from penjing.records import Candidate, Parity, ParityRow, Record, steadiness
from penjing.records.folder import ARTIFACT, EVIDENCE, SOURCE
from penjing.records.manifest import Manifest, Port, read_manifest, sample_axes
from penjing.runtimes import isolated
from penjing.runtimes.artifact import narrowed, predictor
from penjing.tasks.task import Task

SPEED_TOLERANCE = 0.25  # of the speed-up: what a quiet machine repeats
METRIC_TOLERANCE = 1e-4
PARITY_TOLERANCE = 0.1  # of the recorded difference: kernels of another processor round elsewhere


@dataclass(frozen=True)
class Check:
    """One figure: its recorded value, its value now, and whether it holds (None: can't be compared here)."""

    figure: str
    recorded: str
    found: str
    holds: bool | None
    note: str = ""


def verify(
    folder: Path | str,
    task: Task | None = None,
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    events: Callable[..., None] | None = None,
) -> tuple[Check, ...]:
    """Check hashes, size, integer operators, parity, latency and, given a task, the metric.

    Args:
        folder: A run folder.
        task: Needed for the metric alone.
        threads: None takes the threads of the record.
        seconds: Timed seconds per artifact; 0 leaves latency and speed-up out.
        events: Progress of the timing.

    Raises:
        RecordError: There is no record, or no evidence beside it.
        ArtifactError: The artifact is not there.
    """
    folder = Path(folder)
    record = records.read(folder)
    chosen = record.chosen
    if chosen is None:
        raise RecordError(
            "the record has no artifact", code="no-artifact", got=record.goal.reason, expected="a run with an artifact"
        )
    manifest = read_manifest(folder / ARTIFACT)
    checks = [*_hashes(folder, record, chosen), _size(folder, record, chosen, manifest)]
    used = measure.check_threads(threads or record.machine.threads)
    try:
        session = isolated.open_artifact(folder / ARTIFACT, used)
        checks.append(_operators(folder, chosen, manifest))
    except ArtifactError as error:
        # Damaged files say so in a check: whoever verifies wants to know that, and not why a runtime stumbled.
        return (*checks, Check(f"opens in {manifest.runtime}", "yes", f"no: {error.got}", False))
    checks += _parities(folder, chosen, session, manifest)
    if seconds > 0:
        checks += _speed(folder, record, chosen, manifest, used, seconds, events)
    if task is not None:
        checks.append(_metric(record, task, session, manifest))
    return tuple(checks)


def _hashes(folder: Path, record: Record, chosen: Candidate) -> list[Check]:
    differences = intact.differences(folder, record)
    held = {name: record.files.get(f"{ARTIFACT}/{name}") for name in chosen.sha256}
    other = sorted(name for name in held if held[name] != chosen.sha256[name])
    text = str(differences) or f"{len(record.files)} files, all equal"
    if not record.files or not chosen.sha256:
        text = "the record holds no hashes"
    elif other:
        text = f"the chosen candidate's hashes are others: {', '.join(other[:5])}"
    holds = bool(record.files and chosen.sha256) and not (differences.missing or differences.changed or other)
    checks = [Check("SHA-256 of the files", f"{len(record.files)} files", text, holds)]
    if differences.strange:
        note = "the run did not leave them, and nothing vouches for them"
        checks.append(Check("other files", "none", intact.listed(differences.strange), None, note))
    return checks


def _size(folder: Path, record: Record, chosen: Candidate, manifest: Manifest) -> Check:
    size = measure.size_bytes(folder / ARTIFACT, manifest.files())
    told = {row.size_bytes for row in (chosen.measured, record.artifact) if row is not None}
    words = " and ".join(sorted(map(str, told)))  # the record says it twice
    return Check("size in bytes", words, str(size), told == {size})


def _operators(folder: Path, chosen: Candidate, manifest: Manifest) -> Check:
    kinds = {row.name: row.kind for row in chosen.layers}
    counts, _ = counted(kinds, executed_precisions(folder / ARTIFACT, manifest))
    recorded = chosen.integer_operators
    return Check("integer operators", _counts(recorded), _counts(counts), counts == recorded)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def _parities(folder: Path, chosen: Candidate, session: Any, manifest: Manifest) -> list[Check]:
    """The comparisons of the record, and that every output and group of columns keeps its limit, now as then."""
    stored = evidence.stored(folder)
    inputs = [stored[k] for k in stored if k.startswith("input_")]
    outputs = session.run(inputs)
    original = [stored[k] for k in stored if k.startswith("source_")]
    parts = measure.split(original)
    names = [port.name for port in manifest.programs[0].outputs]
    checks, rows = [], []
    for recorded in chosen.parity:
        reference = [stored[k] for k in stored if k.startswith(f"{recorded.against}_")]
        if reference:
            parity = measure.parity([reference], [outputs], recorded.against)
            holds = parity.largest <= recorded.largest * (1 + PARITY_TOLERANCE) + 1e-5
            checks.append(Check(f"parity with {recorded.against}", _parity(recorded), _parity(parity), holds))
            if recorded.against == "planned":
                samples = len(outputs[0]) if outputs[0].ndim else 1
                near = measure.differences(reference, outputs, parts, samples)
                for size in (*PROBES, samples):  # in one session, as when it was judged
                    expected = reference if size == samples else [x for k, x in stored.items() if f"probe{size}_" in k]
                    if expected:
                        few = session.run(_of_samples(inputs, manifest.programs[0].inputs, size))
                        near = measure.worst(near, measure.differences(expected, few, parts, size))
                rows = list(measure.limits.judged(near, names, manifest.precision))
    if rows:
        checks.append(_limit(rows, chosen))
    return checks


def _limit(rows: list[ParityRow], chosen: Candidate) -> Check:
    """Every row beside its limit; a limit that the run had lowered stays as low, with the reason."""
    lowered = {row.place: row for p in chosen.parity if p.against == "planned" for row in p.rows if row.why}
    judged = [
        replace(row, limit_db=lowered[row.place].limit_db, why=lowered[row.place].why) if row.place in lowered else row
        for row in rows
    ]
    worst = max(judged, key=lambda row: (row.shortfall, -row.snr_db))
    limit = measure.limits.of(chosen.precision)
    recorded = f"at least {limit.snr_db:.0f} dB" if chosen.rejection is None else f"rejected: {chosen.rejection.reason}"
    text = f"{worst.place}: {measure.limits.failure(worst) if worst.shortfall else f'{worst.snr_db:.1f} dB'}"
    return Check("limits of the parity", recorded, text, worst.holds, worst.why)


def _parity(parity: Parity) -> str:
    return f"largest {parity.largest:.3g}, mean {parity.mean:.3g}, {parity.snr_db:.1f} dB"


def _speed(
    folder: Path,
    record: Record,
    chosen: Candidate,
    manifest: Manifest,
    threads: int,
    seconds: float,
    events: Callable[..., None] | None,
) -> list[Check]:
    before, after = record.source.latency_ms, chosen.measured.latency_ms
    if before is None or after is None:
        return []
    inputs = batch_of(folder, manifest.programs[0].inputs, after.batch)
    targets = [
        measure.Target("source", folder / SOURCE, inputs, after.batch),
        measure.Target("artifact", folder / ARTIFACT, inputs, after.batch),
    ]
    timings = side_by_side(targets, threads, seconds, events)
    recorded = steadiness.speedup(before, after)
    measured = measure.ratio(timings["source"], timings["artifact"])
    same = record.machine == measure.machine(record.machine.threads) and threads == record.machine.threads
    holds, note = _speed_holds(recorded, measured, same, after.doubt, timings["artifact"].latency.doubt)
    text = f"{timings['artifact'].latency.median:.3f} ms"
    return [
        Check("latency", f"{after.median:.3f} ms", text, None, "absolute times drift; the speed-up is what is checked"),
        Check("speed-up over the source", f"{recorded:.2f}×", f"{measured:.2f}×", holds, note),
    ]


def _speed_holds(recorded: float, measured: float, same: bool, then: str, now: str) -> tuple[bool | None, str]:
    """Whether a speed-up holds, and what there is to say; None where two figures do not compare.

    Args:
        recorded: The record's.
        measured: Measured now.
        same: Whether machine and threads are the record's.
        then: Why the record's timings can't be trusted; "" where they can.
        now: The same of those taken now.
    """
    if not same:
        return None, "measured on another machine or with other threads: not comparable"
    if then:
        return None, f"the machine was busy when this was recorded ({then}): not comparable"
    if now:
        return None, f"this machine is busy ({now}): measure again when it is quiet"
    return abs(measured / recorded - 1) <= SPEED_TOLERANCE, ""


def side_by_side(
    targets: Sequence[measure.Target], threads: int, seconds: float, events: Callable[..., None] | None
) -> dict[str, measure.Timing]:
    """Latencies of several artifacts in turns: warmed up no longer than timed, very short timings not repeated."""
    patience = steadiness.PATIENCE if seconds >= steadiness.WORTH_SECONDS else 1
    return measure.compare(
        targets,
        threads=threads,
        seconds=seconds,
        patience=patience,
        warmup_seconds=min(0.3, seconds),
        events=events,
    )


def batch_of(folder: Path, ports: tuple[Port, ...], batch: int) -> list[np.ndarray]:
    """Inputs of one call: the stored evidence where there is some, zeros otherwise; a fixed batch stays as it is."""
    if (folder / EVIDENCE).exists():
        inputs = [array for name, array in evidence.stored(folder).items() if name.startswith("input_")]
        return _of_samples(narrowed(ports, inputs), ports, batch)
    axes = sample_axes(ports)
    sizes = [
        [n if isinstance(n, int) else batch if i == axis else 8 for i, n in enumerate(port.shape)]
        for port, axis in zip(ports, axes, strict=True)
    ]
    return [np.zeros(size, dtype=port.dtype) for size, port in zip(sizes, ports, strict=True)]


def _of_samples(inputs: list[np.ndarray], ports: tuple[Port, ...], count: int) -> list[np.ndarray]:
    """The first samples of inputs, repeated where there are fewer; a fixed batch stays as it is."""
    pairs = zip(inputs, sample_axes(ports), strict=True)
    return [x if axis is None else np.take(x, range(count), axis, mode="wrap") for x, axis in pairs]


def _metric(record: Record, task: Task, session: Any, manifest: Manifest) -> Check:
    recorded = record.artifact.metric if record.artifact is not None else None
    if task.evaluate is None or recorded is None:
        return Check(record.metric_name, str(recorded), "the task has no evaluate", None)
    measured = metric_of(task.evaluate, predictor(session, manifest), "the artifact")
    return Check(record.metric_name, f"{recorded:.6g}", f"{measured:.6g}", abs(measured - recorded) <= METRIC_TOLERANCE)
