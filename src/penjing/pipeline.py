"""The one way through: source → network → steps → runtime export → measured in the runtime."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing import checkpoint, measure, runtimes
from penjing.analyze.cost import cost
from penjing.draft import Draft
from penjing.errors import PenjingError, TaskError
from penjing.events import Events
from penjing.folder import CANDIDATES, EVIDENCE, SOURCE, STATE, RunFolder, writing
from penjing.graph import RECURRENT, sites
from penjing.outputs import flatten_outputs, numpy_predictor, to_numpy
from penjing.plan import Plan
from penjing.recipe import Recipe
from penjing.records import Candidate, LayerRow, Measured, Parity, StepCost, from_dict
from penjing.runtimes.artifact import Manifest, arrange, predictor, read_manifest, write_manifest
from penjing.runtimes.loader import write_loader
from penjing.step import Context, Step
from penjing.surgery import freeze, insert
from penjing.surgery.recurrent import weights
from penjing.task import Call, Task, calibration_calls
from penjing.usercode import line_of

EVIDENCE_SAMPLES = 32
INTEGER = ("int8", "int8-bf16")
COUNTED = ("conv", "linear", "add", "matmul", "attention", "conv_transpose", "cat", "avg_pool", *RECURRENT)


@dataclass(frozen=True)
class Variant:
    """One artifact to build: a runtime and a precision of the whole network."""

    runtime: str
    precision: str

    @property
    def name(self) -> str:
        """For example "openvino-int8"."""
        return f"{self.runtime}-{self.precision}"


@dataclass(kw_only=True)
class Run:
    """One run while it goes on: what every stage needs, and what they found."""

    network: fx.GraphModule
    task: Task
    folder: RunFolder
    events: Events
    seed: int
    device: str
    threads: int
    batch: int
    seconds: float
    instruction_sets: tuple[str, ...]
    memo: dict[Any, Any] = field(default_factory=dict)
    costs: list[StepCost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def context(self, runtime: str | None, folder: Path | None) -> Context:
        """What a step is told."""
        accelerates = runtimes.get(runtime).accelerates(self.instruction_sets) if runtime else None
        return Context(
            task=self.task,
            seed=self.seed,
            device=self.device,
            accelerates=accelerates,
            events=self.events,
            folder=folder,
            source=self.network,
            memo=self.memo,
            latency=functools.partial(_side_by_side, self, runtime) if runtime else None,
            profile=functools.partial(_profiled, self, runtime) if runtime == "openvino" else None,
        )

    @contextmanager
    def costing(self, name: str) -> Iterator[None]:
        """Wall time and peak memory of a stage, into the record and the events."""
        kept = self.folder.kept("costs") or []
        self.events("stage", name=name)
        measure.reset_peak()
        start = time.perf_counter()
        yield
        spent = StepCost(
            name=name, wall_s=round(time.perf_counter() - start, 3), peak_memory_bytes=measure.peak_memory_bytes()
        )
        self.costs.append(spent)
        self.folder.keep("costs", [*kept, dataclasses.asdict(spent)])


def source(run: Run) -> tuple[Manifest, Any]:
    """Store the source as a torch artifact and its answers on a few samples; manifest and output structure."""
    args, kwargs = evidence_call(run.task)
    with torch.no_grad():
        leaves, structure = flatten_outputs(run.network(*args, **kwargs))
    if not (run.folder.path / SOURCE).exists():
        with run.costing("export source"), run.folder.building(SOURCE) as aside:
            build(Draft(run.network), "torch", "fp32", run.task, structure, aside)
    manifest = read_manifest(run.folder.path / SOURCE)
    evidence = run.folder.path / EVIDENCE
    if not evidence.exists():
        inputs = arrange(manifest.programs[0].inputs, *_numpy(args, kwargs))
        arrays: dict[str, Any] = _named("input", inputs) | _named("source", [to_numpy(t) for t in leaves])
        aside_file = evidence.with_name(f".{EVIDENCE}.new")
        with writing(run.folder.path):
            with aside_file.open("wb") as file:
                np.savez(file, **arrays)
            os.replace(aside_file, evidence)
    return manifest, structure


def draft(run: Run, recipe: Recipe, variant: Variant) -> Draft:
    """The draft after all steps; steps before the first that depends on the runtime run once for all runtimes.

    A floating-point variant takes those alone: what is made for one runtime's integers (ranges, corrected biases) is
    of no use to it.
    """
    current = Draft(run.network)
    where = "all"
    for position, step in enumerate(recipe):
        if getattr(step, "per_runtime", False):
            if variant.precision not in INTEGER:
                break
            where = variant.runtime
        key = (where, position)
        if key not in run.memo:
            run.memo[key] = _step(run, step, current, where, f"{where}-{position}")
        current = run.memo[key]
    return current


def _side_by_side(run: Run, runtime: str, drafts: Sequence[Draft], precision: str) -> list[float]:
    """Median latencies of drafts in a runtime, in milliseconds, measured in turns."""
    with tempfile.TemporaryDirectory() as aside:
        targets = [
            measure.Target(
                str(i), _built(run, d, runtime, precision, Path(aside) / str(i)), _timed_inputs(run), run.batch
            )
            for i, d in enumerate(drafts)
        ]
        timings = measure.compare(targets, threads=run.threads, seconds=run.seconds, warmup_seconds=0.3)
    return [timings[str(i)].latency.median for i in range(len(drafts))]


def _profiled(run: Run, runtime: str, draft: Draft, precision: str) -> list[tuple[tuple[str, ...], float]]:
    """Times of a draft's operators in a runtime."""
    with tempfile.TemporaryDirectory() as aside:
        folder = _built(run, draft, runtime, precision, Path(aside) / "draft")
        return [(t.sites, t.ms) for t in runtimes.profile(folder, _timed_inputs(run), run.threads)]


def _built(run: Run, draft: Draft, runtime: str, precision: str, folder: Path) -> Path:
    folder.mkdir()
    args, kwargs = evidence_call(run.task, 2)
    with torch.no_grad():
        _, structure = flatten_outputs(run.network(*args, **kwargs))
    build(draft, runtime, precision, run.task, structure, folder)
    return folder


def _timed_inputs(run: Run) -> list[np.ndarray]:
    manifest = read_manifest(run.folder.path / SOURCE)
    return arrange(manifest.programs[0].inputs, *_numpy(*one_call(run.task, run.batch)))


def _step(run: Run, step: Step, current: Draft, where: str, name: str) -> Draft:
    folder = run.folder.path / "state" / name
    if (folder / checkpoint.EDITS).exists():
        run.events("resumed", step=type(step).__name__, where=where)
        return checkpoint.load(folder, run.network)
    folder.mkdir(parents=True, exist_ok=True)
    label = type(step).__name__ + ("" if where == "all" else f" for {where}")
    with run.costing(label):
        done = step(current, run.context(None if where == "all" else where, folder))
    checkpoint.save(done, folder)
    return done


def build(draft: Draft, runtime: str, precision: str, task: Task, structure: Any, folder: Path) -> Manifest:
    """Export a draft into an empty folder: the runtime's files, `manifest.json`, `load.py`."""
    network = freeze(draft.network, draft.plan if precision in INTEGER else Plan())
    manifest = runtimes.get(runtime).export(network, task.call(), task.dynamic, precision, structure, folder)
    write_loader(folder / "load.py", manifest, ".", 1)
    write_manifest(folder, manifest)
    return manifest


def candidate(
    run: Run, recipe: Recipe, variant: Variant, structure: Any, metric: Callable[[Any], float] | None
) -> Candidate:
    """Build one artifact and measure all but its latency, which is measured side by side with the others."""
    if kept := run.folder.kept(variant.name):
        run.events("resumed", candidate=variant.name)
        return from_dict(Candidate, kept)
    made = draft(run, recipe, variant)
    where = f"{CANDIDATES}/{variant.name}"
    with run.costing(f"export {variant.name}"), run.folder.building(where) as aside:
        build(made, variant.runtime, variant.precision, run.task, structure, aside)
    folder = run.folder.path / where
    with run.costing(f"evaluate {variant.name}"):
        manifest = read_manifest(folder)
        session = runtimes.open_artifact(folder, run.threads)
        plan = made.plan if variant.precision in INTEGER else Plan()
        parity = _parity(run, session, made.network, plan)
        rows, integer, floating = _layers(run, made, plan, manifest, folder)
        value = metric_of(metric, predictor(session, manifest), variant.name) if metric else None
        del session
        packed = _packed(run, folder, manifest)
    found = Candidate(
        name=variant.name,
        runtime=variant.runtime,
        precision=variant.precision,
        folder=where,
        measured=Measured(
            metric=value,
            size_bytes=measure.size_bytes(folder, manifest.files()),
            packed_bytes=packed,
            parameters=sum(p.numel() for p in made.network.parameters()),
            macs=sum(row.macs for row in rows),
        ),
        parity=parity,
        integer_operators=integer,
        float_operators=floating,
        layers=rows,
        sha256={name: measure.sha256(folder / name) for name in manifest.files()},
    )
    run.folder.keep(variant.name, dataclasses.asdict(found))
    run.events("candidate", name=variant.name, metric=value, size_bytes=found.measured.size_bytes)
    return found


def latencies(run: Run, candidates: Sequence[Candidate]) -> dict[str, measure.Timing]:
    """Time the source and all candidates side by side, each in a process of its own; "source" is the source."""
    if kept := run.folder.kept("latency"):
        return {name: from_dict(measure.Timing, value) for name, value in kept.items()}
    inputs = _timed_inputs(run)
    folders = {"source": run.folder.path / SOURCE} | {c.name: run.folder.path / c.folder for c in candidates}
    targets = [measure.Target(name, folder, inputs, run.batch) for name, folder in folders.items()]
    with run.costing("measure latency"):
        timings = measure.compare(
            targets,
            threads=run.threads,
            seconds=run.seconds,
            warmup_seconds=min(0.3, run.seconds),
            events=run.events,
        )
    run.folder.keep("latency", {name: dataclasses.asdict(t) for name, t in timings.items()})
    return timings


def metric_of(metric: Callable[[Any], float], predict: Callable[..., Any], name: str) -> float:
    """The task's metric on one network.

    Args:
        metric: The task's `evaluate` or `select`.
        predict: The network, NumPy in, NumPy out.
        name: What is evaluated, for errors.

    Raises:
        TaskError: It raised (names the line), or what it returned is no finite number.
    """
    try:
        value = metric(predict)
    except PenjingError:
        raise
    except Exception as error:
        raise TaskError(
            f"the task's metric raised {type(error).__name__} on {name}",
            got=f"{error} ({line_of(error)})",
            expected="evaluate(predict) -> float, where predict maps NumPy inputs to NumPy outputs",
            remedy="try it on a predict of your own: evaluate(lambda x: network(torch.from_numpy(x)).numpy())",
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TaskError(
            f"the task's metric of {name} is no finite number",
            got=repr(value),
            expected="evaluate(predict) -> float",
            remedy="return one number from evaluate",
        )
    return number


def timed(measured: Measured, timing: measure.Timing) -> Measured:
    """The figures with latency, throughput and memory filled in."""
    latency = timing.latency
    return replace(
        measured,
        latency_ms=latency,
        throughput_per_s=1000 * latency.batch / latency.median,
        peak_memory_bytes=timing.peak_memory_bytes,
    )


def source_figures(run: Run) -> tuple[Measured, tuple[LayerRow, ...]]:
    """Size, parameters and MACs of the source; its size is that of its weights and buffers alone."""
    rows = cost(run.network, run.task.call())
    state = run.network.state_dict().values()
    packed = run.folder.kept("packed-source")
    if packed is None:
        packed = measure.packed_bytes([run.folder.path / SOURCE / "model.pt2"])
        run.folder.keep("packed-source", packed)
    figures = Measured(
        size_bytes=sum(t.numel() * t.element_size() for t in state),
        packed_bytes=packed,
        parameters=sum(p.numel() for p in run.network.parameters()),
        macs=sum(row.macs for row in rows),
    )
    return figures, rows


def source_predictor(run: Run) -> Callable[..., Any]:
    """`predict` of the source, in torch."""
    return numpy_predictor(run.network)


def evidence_call(task: Task, count: int = EVIDENCE_SAMPLES) -> Call:
    """A few real samples: the first of the calibration data, or the example where there is none."""
    return one_call(task, count)


def one_call(task: Task, batch: int) -> Call:
    """One call of `batch` samples, repeated from real data where there are fewer."""
    call = task.call()
    if task.calibration is not None:
        call = next(iter(calibration_calls(task, limit=1)))
    if task.dynamic is not None and not any(0 in axes for axes in task.dynamic.values()):
        return task.call()  # the batch is fixed

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        times = -(-batch // value.shape[0])
        return torch.cat([value] * times)[:batch].contiguous()

    return tuple(map(resize, call[0])), {k: resize(v) for k, v in call[1].items()}


def batch_size(task: Task, wanted: int) -> int:
    """Samples of one call: as many as are wanted, or the number that the network is fixed to."""
    args, kwargs = one_call(task, wanted)
    first = next(iter([*args, *kwargs.values()]))
    return int(first.shape[0]) if first.dim() else wanted


def _parity(run: Run, session: Any, network: fx.GraphModule, plan: Plan) -> tuple[Parity, ...]:
    stored = _evidence(run)
    original = [stored[k] for k in stored if k.startswith("source_")]
    outputs = session.run([stored[k] for k in stored if k.startswith("input_")])
    planned = _planned(run, network, plan)
    return (measure.parity([planned], [outputs], "planned"), measure.parity([original], [outputs], "source"))


def _planned(run: Run, network: fx.GraphModule, plan: Plan) -> list[np.ndarray]:
    """What the torch network with the plan's quantizers answers to the evidence."""
    args, kwargs = evidence_call(run.task)
    with torch.no_grad():
        return [to_numpy(t) for t in flatten_outputs(insert(network, plan)(*args, **kwargs))[0]]


def _evidence(run: Run) -> dict[str, np.ndarray]:
    with np.load(run.folder.path / EVIDENCE, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def store_planned(run: Run, network: fx.GraphModule, plan: Plan) -> None:
    """Add the chosen network's answers to the evidence, so that `verify` can compare without torch code."""
    stored = {name: x for name, x in _evidence(run).items() if not name.startswith("planned_")}
    stored |= _named("planned", _planned(run, network, plan))
    aside = run.folder.path / STATE / EVIDENCE
    with aside.open("wb") as file:
        np.savez(file, **stored)  # type: ignore[arg-type]
    os.replace(aside, run.folder.path / EVIDENCE)


def _layers(
    run: Run, made: Draft, plan: Plan, manifest: Manifest, folder: Path
) -> tuple[tuple[LayerRow, ...], dict[str, int], dict[str, int]]:
    """Rows with what the runtime really executed, and the operators counted by kind: integer and floating point."""
    precision: dict[str, str] = {}
    for operator in runtimes.executed(folder, manifest):
        for name in operator.sites:
            precision[name] = "int8" if precision.get(name) == "int8" else operator.precision
    found = sites(made.network)
    rows = []
    counts: dict[str, dict[str, int]] = {"int8": {}, "float": {}}
    for row in cost(made.network, run.task.call()):
        executed = precision.get(row.name)
        # The input of a float layer may be quantized too: what counts for a layer is its weight.
        edge = "weight" if row.kind in ("conv", "linear") else "in0"
        planned = "int8" if f"{row.name}:{edge}" in plan.entries else manifest.settings.get("precision", "fp32")
        reason = None
        if row.name in found and row.kind in COUNTED and executed is not None:
            group = counts["int8" if executed == "int8" else "float"]
            group[row.kind] = group.get(row.kind, 0) + 1
        if manifest.precision in INTEGER and executed != "int8" and row.kind in COUNTED:
            reason = plan.floats.get(row.name) or _why_float(planned, executed, manifest.runtime)
        stored = row.weight_bytes // 2 if manifest.precision == "fp16" else _weight_bytes(made.network, row, plan)
        rows.append(replace(row, planned=planned, executed=executed, reason=reason, weight_bytes=stored))
    return tuple(rows), counts["int8"], counts["float"]


def _weight_bytes(network: fx.GraphModule, row: LayerRow, plan: Plan) -> int:
    """Bytes of a layer's parameters as the artifact stores them: integer weights, int32 biases."""
    stored: dict[str, Any] = {}
    if row.kind in RECURRENT and f"{row.name}:in0" in plan.entries:
        stored = weights(network, sites(network)[row.name])
    elif f"{row.name}:weight" in plan.entries and row.weight_bytes:
        stored = {f"{row.name}:weight": network.get_submodule(row.name.split("@")[0]).weight}
    saved = sum(
        w.numel() * w.element_size() - -(-w.numel() * plan.entries[edge].spec.bits // 8) for edge, w in stored.items()
    )
    return row.weight_bytes - int(saved)


def _why_float(planned: str, executed: str | None, runtime: str) -> str:
    if planned != "int8":
        return "no edge of it is quantized"
    if executed is None:
        return f"{runtime} fused or removed it: its optimized graph does not show it"
    return f"{runtime} did not use an integer kernel although its inputs are integers"


def _packed(run: Run, folder: Path, manifest: Manifest) -> int:
    total = 0
    for name in manifest.files():
        key = ("packed", measure.sha256(folder / name))
        if key not in run.memo:
            run.memo[key] = measure.packed_bytes([folder / name])
        total += run.memo[key]
    return total


def _numpy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(t.numpy() for t in args), {k: t.numpy() for k, t in kwargs.items()}


def _named(prefix: str, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{i:03d}": array for i, array in enumerate(arrays)}
