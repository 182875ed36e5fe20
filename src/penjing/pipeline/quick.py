"""The quick way: one integer file for one runtime, with the defaults of `compress`. Nothing is searched or timed.

Parity is measured in the runtime itself, and a file that does not compute what was planned is not written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from penjing import measure, runtimes
from penjing.errors import OutputError, ParityError, UsageError
from penjing.measure import time_limits
from penjing.pipeline import evidence
from penjing.pipeline import request as requests
from penjing.pipeline.applied import refuse_quantized
from penjing.pipeline.bisecting import located
from penjing.pipeline.building import INTEGER, build, check_integers, executed_rows, float_doubts
from penjing.pipeline.causes import doubts, hidden_samples
from penjing.pipeline.order import default_recipe
from penjing.pipeline.repeatable import capture_repeatable
from penjing.randomness import seed_everything
from penjing.records import STORED, Parity
from penjing.records.events import Events, Listener
from penjing.records.folder import check_writable, writing
from penjing.records.manifest import Manifest
from penjing.report.numbers import figure
from penjing.runtimes import isolated
from penjing.sources.source import Source, check_forward, in_single_precision, open_source, with_declared_axes
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks import finite
from penjing.tasks.keywords import suggesting
from penjing.tasks.outputs import flatten_outputs, to_numpy
from penjing.tasks.task import Task
from penjing.tasks.undisturbed import same_process
from penjing.tasks.unlabelled import calibration_task
from penjing.tasks.usercode import never_exiting

_NAMED = 4  # operators with one reason
_SPACE = "free some space, or choose another place"


@dataclass(frozen=True, kw_only=True)
class QuantizedFile:
    """The result of `quantize_to`.

    Attributes:
        path: The file that the runtime opens.
        files: It and what lies beside it.
        absent: Why it was not run in its runtime here, and what computed its answers; empty where it was.
        inputs: Of the file, with the axes that vary by name: ``images float32 (batch, 3, 64, 64)``.
        runtime: Name of the runtime.
        settings: To open it with: those that its parity was measured with.
        size_bytes: Of all files.
        source_bytes: Of the source's tensors.
        parity: With what was planned, and with the source; measured in the runtime.
        integer_operators: By kind, how many the runtime executes in integers.
        float_operators: By kind, how many it executes in floating point.
        floats: Name of every operator of those → why.
        remedy: What was done about outlier channels; "" where nothing was needed.
        seconds: By stage.
        warnings: What the user should know.
    """

    path: Path
    files: tuple[Path, ...]
    inputs: tuple[str, ...]
    runtime: str
    settings: dict[str, str]
    size_bytes: int
    source_bytes: int
    parity: tuple[Parity, Parity]
    integer_operators: dict[str, int]
    float_operators: dict[str, int]
    floats: dict[str, str]
    remedy: str
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    absent: str = ""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What there is to know: size, inputs, parity, the operators in integers, and how the file is opened."""
        planned, source = self.parity
        share = self.size_bytes / max(1, self.source_bytes)
        planned_so = "planned: " if self.absent else ""
        lines = [
            f"{self.path} for {self.runtime}: {figure(self.size_bytes, 'bytes')}, {share:.0%} of the source's weights",
            f"takes {'; '.join(self.inputs)}",
            f"parity with the source: {decibels(source)}"
            + (f", {source.agreement:.1%} of the samples in the same class" if source.agreement is not None else "")
            + f" ({source.samples} samples); with what was planned: {decibels(planned)}",
            f"{planned_so}in integers: {_counts(self.integer_operators)}; "
            f"in floating point: {_counts(self.float_operators)}",
        ]
        if self.absent:
            lines.insert(1, self.absent)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.floats.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"  {', '.join(names[:_NAMED])}{more}: {reason}")
        if self.remedy:
            lines.append(f"outlier channels: {self.remedy}")
        if self.settings:
            lines.append(f"measured with {', '.join(f'{name}={value}' for name, value in self.settings.items())}")
        return lines


def decibels(parity: Parity) -> str:
    """Of all outputs together, and of the one that comes out worst, such as a detector's scores beside its boxes."""
    if len({row.place for row in parity.rows}) < 2:
        return f"{parity.snr_db:.1f} dB"
    worst = min((row for row in parity.rows if row.equal is None), key=lambda row: row.snr_db, default=None)
    return f"{parity.snr_db:.1f} dB" + ("" if worst is None else f", in {worst.place} {worst.snr_db:.1f} dB")


def _counts(operators: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(operators.items())) or "none"


@suggesting
@never_exiting()
@same_process()
def quantize_to(
    model: str | Path | nn.Module | ExportedProgram | Source,
    calibration: Any,
    out: Path | str,
    *,
    runtime: str | None = None,
    fast: bool = False,
    exclude: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    listeners: Sequence[Listener] = (),
) -> QuantizedFile:
    """Quantize a network to one file.

    The steps are those of `compress` without a recipe: ranges from the calibration data, outlier channels mitigated,
    weights rounded layer by layer.

    Args:
        model: The network, or a SOURCE as on the command line.
        calibration: A few hundred inputs without labels: a `Task`, an array of samples, an iterable of batches, a
            folder of images, an ``.npy`` or ``.npz`` file, ``file.py:task``.
        out: The file to write: ``small.onnx`` for ONNX Runtime, ``small.xml`` (and ``small.bin``) for OpenVINO.
        runtime: Its name, where the file's suffix does not tell.
        fast: Correct biases instead of searching the rounding of every weight, and read 150 calibration samples.
        exclude: Name patterns of operators that stay in floating point.
        seed: Same seed, data, machine kind and threads: same file.
        threads: None takes every core.
        force: Replace the file.
        listeners: Called with every event (a dict).

    Raises:
        ParityError: The file does not compute what was planned; nothing is written.
        OutputError: The file exists, or can't be written.
        PenjingError: Anything else, with what, got, expected and remedy.
    """
    target = _Target(Path(out), runtime, force)
    clock = Clock(Events(listeners=tuple(listeners)))
    used = measure.check_threads(threads or measure.machine(1).cores)
    try:
        context, network, told = opened(clock, model, calibration, target.runtime, used, seed)
        recipe = default_recipe(exclude, rounding=not fast)
        requests.check_recipe(recipe, network, context.task, seed)
        draft = Draft(network)
        for step in recipe:
            with clock(type(step).__name__):
                draft = step(draft, context)
        check_integers(target.path.name, draft.plan)
        with writing(target.path.parent, what="the folder of the file", remedy=_SPACE):
            target.path.parent.mkdir(parents=True, exist_ok=True)
            aside = tempfile.TemporaryDirectory(prefix=f".{target.path.stem}-", dir=target.path.parent)
        with aside as folder:
            return _written(target, draft, network, context.task, used, clock, Path(folder), told)
    finally:
        time_limits.expect_nothing()


def opened(
    clock: Clock, model: Any, calibration: Any, runtime: str, threads: int, seed: int
) -> tuple[Context, fx.GraphModule, list[str]]:
    """What steps are told, the captured network, and what the user should know of it."""
    refuse_quantized(model)
    torch.set_num_threads(threads)
    seed_everything(seed)
    with clock("open"):
        source = open_source(model)
        task = calibration_task(calibration, source.example, source.dynamic)
        requests.check_inputs(task)
        source, task, told = in_single_precision(source, with_declared_axes(source, task))
        check_forward(source, task)
    isolated.begin(runtime)
    with clock("capture"):
        network = capture_repeatable(source, task)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(threads).instruction_sets)
    context = Context(task=task, seed=seed, capabilities=capabilities, events=clock.events, source=network)
    return context, network, [told] if told else []


@dataclass(frozen=True)
class Exported:
    """An artifact that computes what was planned, with the network's answers, its own, and how outputs are nested."""

    manifest: Manifest
    parity: tuple[Parity, Parity]
    original: list[np.ndarray]
    answers: Sequence[np.ndarray]
    structure: Any


def exported(
    draft: Draft, network: fx.GraphModule, task: Task, runtime: str, precision: str, threads: int, clock: Clock,
    folder: Path,
) -> Exported:  # fmt: skip
    """Export into a folder, and compare in the runtime.

    Raises:
        ParityError: The artifact does not compute what was planned.
    """
    args, kwargs = evidence.one_call(task, evidence.SAMPLES)
    start = time.perf_counter()
    with torch.no_grad():
        leaves, structure = flatten_outputs(network(*args, **kwargs))
    time_limits.expect(time.perf_counter() - start, sum(t.numel() for t in (*args, *kwargs.values())))
    finite.check_answers(leaves, structure)
    with clock("export"):
        manifest = build(draft, runtime, precision, task, structure, folder)
    with clock("compare"):
        session = isolated.open_artifact(folder, threads)
        answers = session.run(evidence.arrays(manifest, (args, kwargs)))
        original = [to_numpy(leaf) for leaf in leaves]
        simulated = insert(draft.network, draft.plan)
        parity = evidence.compared(original, task, session, answers, simulated, network, manifest)
        del session
        _check(parity, draft, task, folder, manifest, threads)
    return Exported(manifest, parity, original, answers, structure)


def _written(
    target: _Target, draft: Draft, network: fx.GraphModule, task: Task, threads: int, clock: Clock, folder: Path,
    told: list[str],
) -> QuantizedFile:  # fmt: skip
    """Export into a folder, compare, and put the files in their place."""
    precision = integers_of(target.runtime)
    done = exported(draft, network, task, target.runtime, precision, threads, clock, folder)
    manifest, parity = done.manifest, done.parity
    rows, integer, floating = executed_rows(draft.network, draft.plan, task.call(), manifest, folder)
    name = target.path.name
    lost = doubts(name, precision, parity, draft, task) or hidden_samples(name, done.original, done.answers)
    alone: tuple[str, ...] = ()
    if floating and not any(integer.values()) and any(row.stored for row in rows):
        alone = (f"{name}: {STORED}",)
    warnings = (*told, *lost, *alone, *float_doubts(name, rows))
    for text in warnings:
        clock.events("warning", text=text)
    size = measure.size_bytes(folder, manifest.files())
    target.take(folder, manifest)
    return QuantizedFile(
        path=target.path,
        files=target.files,
        inputs=tuple(
            f"{port.name} {port.dtype} ({', '.join(map(str, port.shape))})" for port in manifest.programs[0].inputs
        ),
        runtime=target.runtime,
        settings=dict(manifest.settings),
        size_bytes=size,
        source_bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
        parity=parity,
        integer_operators=integer,
        float_operators=floating,
        floats={r.name: r.reason for r in rows if r.kind in floating and r.executed not in (None, "int8") and r.reason},
        remedy=draft.plan.remedy,
        seconds=clock.seconds,
        warnings=warnings,
        absent=runtimes.absent(target.runtime),
    )


def integers_of(runtime: str) -> str:
    """The precision of integer files that a runtime puts first."""
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return next((p for p in capabilities.precisions if p in INTEGER), "int8")


def _check(parity: Sequence[Parity], draft: Draft, task: Task, folder: Path, manifest: Manifest, threads: int) -> None:
    """Raise ParityError where a limit does not hold, with the operator that is to blame."""
    rejection = measure.limits.rejection(parity)
    if rejection is None:
        return
    rejection = located(rejection, parity, draft, task, folder, manifest, threads)
    raise ParityError(
        f"{manifest.runtime} does not compute what was planned",
        code="parity",
        field=rejection.operator or "",
        got=rejection.reason,
        expected="the answers of the quantized network, computed in torch",
        remedy=f"keep it in floating point: exclude {rejection.operator!r}"
        if rejection.operator
        else "another runtime; `penjing compress` tries all of them",
    )


class _Target:
    """The file to write, looked at before anything is computed."""

    def __init__(self, path: Path, runtime: str | None, force: bool) -> None:
        self.path = path
        specs = {n: spec for n, spec in runtimes.SPECS.items() if spec.suffixes}
        by_suffix = {spec.suffixes[0]: name for name, spec in reversed(specs.items())}  # of two the first
        self.runtime = by_suffix.get(path.suffix.lower(), "")
        if runtime is not None:
            runtimes.get(runtime)
            if runtime in specs and specs[runtime].suffixes[0] == path.suffix.lower():
                self.runtime = runtime
        if not self.runtime or runtime not in (None, self.runtime):
            right = specs[runtime].suffixes[0] if runtime in specs else None
            raise UsageError(
                f"{runtime} does not open such a file" if runtime else "the name of the file does not tell its runtime",
                code="suffix",
                got=str(path),
                expected=", ".join(f"{suffix} for {name}" for suffix, name in by_suffix.items()),
                remedy=f"--out {path.with_suffix(right)}" if right else None,
            )
        runtimes.get(self.runtime)
        self.files = tuple(path.with_suffix(suffix) for suffix in runtimes.SPECS[self.runtime].suffixes)
        taken = [str(file) for file in self.files if file.exists()]
        check_writable(path)
        if taken and not force:
            raise OutputError(
                "the file exists already",
                code="exists",
                got=", ".join(taken),
                expected="a new name",
                remedy="--force replaces it",
            )

    def take(self, folder: Path, manifest: Manifest) -> None:
        """Put an artifact's files in their place, the one that is opened last: until then there is none to open.

        A folder, such as a Core ML package, counts as a file.
        """
        by_suffix = {Path(part).suffix: folder / part for part in (name.split("/")[0] for name in manifest.files())}
        with writing(self.path.parent, what="the folder of the file", remedy=_SPACE):
            if len(self.files) > 1:
                self.path.unlink(missing_ok=True)
            for file in reversed(self.files):
                if file.is_dir():
                    shutil.rmtree(file)
                os.replace(by_suffix[file.suffix], file)


class Clock:
    """Seconds by stage; each is told when it begins."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block."""
        self.events("stage", name=stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
