"""Interleaved latency measurement of several artifacts, each in a separate process.

Clock rate, temperature and other load drift during a measurement, so figures taken one after the other are not
comparable. Here all artifacts are open at once and take turns (A B C, C B A, B C A, ...): drift affects all of them
alike, and the ratios of the medians of one round are meaningful.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.errors import UsageError
from penjing.measure import time_limits
from penjing.measure.child import Child
from penjing.measure.machine import processors
from penjing.records import Latency, steadiness

OPENER = "penjing.runtimes:open_artifact"
MIN_CALLS = 3  # per turn, however slow the artifact is
MAX_CALLS = 10_000  # per turn, however fast the artifact is
PAUSE_S = 0.05  # between turns: threads of a runtime spin for some milliseconds before they sleep


@dataclass(frozen=True)
class Target:
    """An artifact to time.

    Attributes:
        name: Key of its result.
        folder: The artifact's folder.
        inputs: One array per input, in the order of the manifest, samples on axis 0.
        batch: Number of samples in `inputs`.
    """

    name: str
    folder: Path | str
    inputs: Sequence[npt.NDArray[Any]]
    batch: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The measurements of one target.

    Attributes:
        latency: Over all calls of all rounds, in milliseconds.
        peak_memory_bytes: Peak resident memory of the process: interpreter, runtime, artifact and inputs.
        baseline_bytes: Resident memory of the process before it opened the artifact (interpreter, NumPy, inputs).
        load_ms: Time to import the runtime and open the artifact in a new process, measured once.
    """

    latency: Latency
    peak_memory_bytes: int
    baseline_bytes: int
    load_ms: float

    @property
    def rounds(self) -> tuple[float, ...]:
        """Median of each round in milliseconds, for ratios to another target (`ratio`)."""
        return self.latency.rounds


def compare(
    targets: Sequence[Target],
    *,
    threads: int,
    seconds: float = 1.0,
    rounds: int = 7,
    patience: int = 1,
    warmup_seconds: float = 0.3,
    warmup_calls: int = 5,
    events: Callable[..., None] | None = None,
    opener: str = OPENER,
) -> dict[str, Timing]:
    """Time the targets side by side; name → `Timing`.

    The workers start one after another. Each opens its artifact with `threads` threads, is pinned to as many logical
    processors (on different physical cores first) if the system supports it, and warms up. Then they take turns, in a
    different order every round, while the others sleep. A turn starts with one untimed call, lasts
    ``seconds / rounds``, and has at least three timed calls. Speed-ups are judged relative to the first target.

    Args:
        targets: The artifacts; their names must differ.
        threads: Number of threads that each runtime may use.
        seconds: Timed seconds per target.
        rounds: Number of turns per target.
        patience: The rounds are repeated up to this many times while the timings are unsteady
            (see `penjing.records.steadiness`); the steadiest `rounds` consecutive ones are returned.
        warmup_seconds: Untimed seconds per target before the first round.
        warmup_calls: Minimum number of calls of the warm-up.
        events: Called as ``events("progress", label="latency", done=..., total=..., name=...)`` after every turn.
        opener: "module:function" that opens a folder in a worker: called with (folder, threads=...), it returns an
            object with ``run(list of arrays)``.

    Raises:
        UsageError: No target, a name used twice, an input that is not numeric, or a number below its minimum.
        TargetError: An artifact can't be opened or run, or its runtime crashed or exceeded its time limit.
    """
    _check(targets, threads=threads, rounds=rounds, seconds=seconds)
    with contextlib.ExitStack() as stack:
        children, load_ms = [], {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penjing-")))
        for index, target in enumerate(targets):
            child = stack.enter_context(started(target, folder / f"{index}.npz", threads, opener))
            load_ms[target.name] = child.ready()
            child.run(seconds=warmup_seconds, max_calls=MAX_CALLS, min_calls=warmup_calls)
            children.append(child)
        windows = _windows(children, targets, threads, seconds, rounds, patience, events)
        memory = {child.name: child.peak() for child in children}
    latencies = windows[steadiness.steady_rounds(windows)]
    doubts = [steadiness.doubt(latencies[0], latency) for latency in latencies]
    return {
        target.name: Timing(
            latency=replace(latency, steady=not text, doubt=text),
            peak_memory_bytes=memory[target.name][0],
            baseline_bytes=memory[target.name][1],
            load_ms=load_ms[target.name],
        )
        for target, latency, text in zip(targets, latencies, doubts, strict=True)
    }


def started(target: Target, inputs: Path, threads: int, opener: str) -> Child:
    """Start a worker that opens a target; its inputs are written to the file `inputs`."""
    np.savez(inputs, *target.inputs)
    return Child(
        target.name,
        Path(target.folder),
        inputs,
        threads=threads,
        cpus=processors()[:threads],
        opener=opener,
        opening_s=time_limits.opening_s(Path(target.folder)),
        call_s=time_limits.call_s(target.inputs),
    )


def _windows(
    children: Sequence[Child],
    targets: Sequence[Target],
    threads: int,
    seconds: float,
    rounds: int,
    patience: int,
    events: Callable[..., None] | None,
) -> list[list[Latency]]:
    """Latencies of the targets for every window of `rounds` consecutive rounds; stops after the first steady window."""
    turns: dict[str, list[list[float]]] = {target.name: [] for target in targets}
    windows: list[list[Latency]] = []
    done = 0
    for number, turn in enumerate(order(len(children), rounds * max(1, patience)), start=1):
        for child in (children[i] for i in turn):
            time.sleep(PAUSE_S)
            times = child.run(seconds=seconds / rounds, max_calls=MAX_CALLS, min_calls=MIN_CALLS, skip=1)
            turns[child.name].append(times)
            done += 1
            if events is not None:
                total = max(rounds, number) * len(children)
                events("progress", label="latency", done=done, total=total, name=child.name)
        if number >= rounds:
            windows.append([_latency(turns[t.name][-rounds:], batch=t.batch, threads=threads) for t in targets])
            if not any(steadiness.doubt(windows[-1][0], latency) for latency in windows[-1]):
                break
    return windows


def ratio(a: Timing, b: Timing) -> float:
    """Latency of `a` relative to `b`: the median over rounds of the ratio of their medians."""
    return steadiness.speedup(a.latency, b.latency)


def order(count: int, rounds: int) -> list[tuple[int, ...]]:
    """The order of targets in each round: reversed every other round, rotated after each pair of rounds.

    >>> order(3, 4)
    [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)]
    """
    turns = []
    for index in range(rounds):
        shift = index // 2 % count
        row = (*range(shift, count), *range(shift))
        turns.append(row[::-1] if index % 2 else row)
    return turns


def _latency(turns: list[list[float]], *, batch: int, threads: int) -> Latency:
    times = np.concatenate([np.asarray(turn) for turn in turns])
    low, median, high, p95 = (float(p) for p in np.percentile(times, [25, 50, 75, 95]))
    return Latency(
        median=median,
        p95=p95,
        spread=(high - low) / median if median else 0.0,
        batch=batch,
        threads=threads,
        calls=len(times),
        rounds=tuple(float(np.median(turn)) for turn in turns),
    )


def _check(targets: Sequence[Target], *, threads: int, rounds: int, seconds: float) -> None:
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names):
        raise UsageError(
            "nothing can be compared", code="targets", got=f"targets {names}", expected="one target or more, each named"
        )
    for what, value, least in (("threads", threads, 1), ("rounds", rounds, 1), ("seconds", seconds, 0)):
        if value < least:
            raise UsageError(f"{what} is too small", code="too-small", got=value, expected=f"{least} or more")
    for target in targets:
        for port, array in enumerate(target.inputs):
            if array.dtype.kind not in "biufc":
                raise UsageError(
                    f"input {port} of {target.name!r} can't be handed to a runtime",
                    code="dtype",
                    got=f"an array of {array.dtype}",
                    expected="numbers or booleans",
                )
