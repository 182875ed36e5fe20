"""The one way through: source → network → steps → runtime export → measured in the runtime."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing import measure, runtimes
from penjing.analyze.cost import cost
from penjing.errors import OutputError, PenjingError, TaskError, UsageError
from penjing.measure import time_limits
from penjing.pipeline import evidence
from penjing.pipeline.bisecting import first_difference
from penjing.pipeline.building import INTEGER, build, check_integers, executed_rows, float_doubts, float_shares
from penjing.pipeline.causes import doubts
from penjing.pipeline.trial import Trial
from penjing.recipes.recipe import Recipe
from penjing.records import Candidate, LayerRow, Measured, Parity, Rejection, StepCost, from_dict, steadiness
from penjing.records.events import Events
from penjing.records.folder import CANDIDATES, EVIDENCE, SOURCE, STATE, RunFolder
from penjing.records.manifest import Manifest, read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.stages import STAGES
from penjing.steps.step import Context, Step
from penjing.storage import checkpoint
from penjing.tasks import finite
from penjing.tasks.outputs import flatten_outputs, numpy_predictor
from penjing.tasks.task import Task
from penjing.tasks.usercode import line_of
from penjing.tasks.witness import Witness


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
    """One run while it goes on: what every stage needs, and what they found.

    Attributes:
        network: The source, raised.
        start: The draft that the steps begin with, where it is more than the source: with a plan and edits.
    """

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
    start: Draft | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    costs: list[StepCost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Say something that the user should know, now and in the record."""
        self.warnings.append(text)
        self.events("warning", text=text)

    def context(self, runtime: str | None, folder: Path | None) -> Context:
        """What a step is told."""
        accelerates = runtimes.get(runtime).accelerates(self.instruction_sets) if runtime else None
        trial = Trial(
            runtime=runtime or "torch",
            source=self.network,
            stored=self.folder.path / SOURCE,
            task=self.task,
            threads=self.threads,
            batch=self.batch,
            seconds=self.seconds,
        )
        return Context(
            task=self.task,
            seed=self.seed,
            device=self.device,
            accelerates=accelerates,
            events=self.events,
            folder=folder,
            source=self.network,
            memo=self.memo,
            latency=trial.latency if runtime else None,
            profile=trial.profile if runtime and runtimes.SPECS[runtime].times_operators else None,
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
    args, kwargs = evidence.one_call(run.task, evidence.SAMPLES)
    start = time.perf_counter()
    with torch.no_grad():
        leaves, structure = flatten_outputs(run.network(*args, **kwargs))
    time_limits.expect(time.perf_counter() - start, sum(t.numel() for t in (*args, *kwargs.values())))
    finite.check_answers(leaves, structure)
    if not (run.folder.path / SOURCE).exists():
        with run.costing("export source"), run.folder.building(SOURCE) as aside:
            build(Draft(run.network), "torch", "fp32", run.task, structure, aside)
    manifest = read_manifest(run.folder.path / SOURCE)
    if not (run.folder.path / EVIDENCE).exists():
        evidence.store_source(run.folder, run.task, manifest, leaves)
    return manifest, structure


def ends_run(error: Exception) -> bool:
    """Whether an error is not of a candidate's own making: the request, the folder, the disk. All else loses it alone.

    A runtime's process that broke off or took too long is a candidate's failure.
    """
    lost = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OutputError | UsageError | OSError) and not lost


def draft(run: Run, recipe: Recipe, variant: Variant) -> Draft:
    """The draft after all steps; steps before the first that depends on the runtime run once for all runtimes.

    A floating-point variant takes those alone: what is made for one runtime's integers (ranges, corrected biases) is
    of no use to it. Where a step fails that is for integers alone, it goes on without that step.
    """
    floats = variant.precision not in INTEGER
    current = Draft(run.network) if run.start is None else run.start
    where, branch = "all", ""
    for position, step in enumerate(recipe):
        if step.per_runtime:
            if floats and not step.for_floats:
                break
            where = variant.runtime
        try:
            current = _once(run, step, current, where, position, branch)
        except Exception as error:
            if ends_run(error) or not floats or not STAGES[step.stage].only_prepares:
                raise
            branch = "-floats"
    return current


def shared(run: Run, recipe: Recipe) -> None:
    """Run the steps that all candidates need, so that they fail once, and by their own name."""
    current = Draft(run.network) if run.start is None else run.start
    for position, step in enumerate(recipe):
        if step.per_runtime:
            break
        try:
            current = _once(run, step, current, "all", position)
        except Exception as error:
            if ends_run(error) or not STAGES[step.stage].only_prepares:
                raise
            break  # it fails for integers again, and floating-point candidates go on without it


def _once(run: Run, step: Step, current: Draft, where: str, position: int, branch: str = "") -> Draft:
    """What a step makes, or how it fails: neither is computed twice."""
    key = (where, position, branch)
    if key not in run.memo:
        try:
            run.memo[key] = _step(run, step, current, where, f"{where}-{position}{branch}")
        except Exception as error:
            if ends_run(error):
                raise
            run.memo[key] = error
    if isinstance(run.memo[key], Exception):
        raise run.memo[key]
    made: Draft = run.memo[key]
    return made


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


def candidate(
    run: Run, recipe: Recipe, variant: Variant, structure: Any, metric: Callable[[Any], float] | None
) -> Candidate | None:
    """Build one artifact and measure all but its latency, which is measured side by side with the others.

    None where the plan was chosen for another precision of the same runtime, and is not what was measured then.
    """
    if kept := run.folder.kept(variant.name):
        run.events("resumed", candidate=variant.name)
        return from_dict(Candidate, kept)
    made = draft(run, recipe, variant)
    if variant.precision in INTEGER and made.plan.precision not in ("", variant.precision):
        return None
    if variant.precision in INTEGER:
        check_integers(variant.name, made.plan)
    where = f"{CANDIDATES}/{variant.name}"
    with run.costing(f"export {variant.name}"), run.folder.building(where) as aside:
        build(made, variant.runtime, variant.precision, run.task, structure, aside)
    folder = run.folder.path / where
    with run.costing(f"evaluate {variant.name}"):
        manifest = read_manifest(folder)
        session = isolated.open_artifact(folder, run.threads)
        made = made if variant.precision in INTEGER else replace(made, plan=Plan())
        answers = evidence.answers(run.folder, session)
        value: float | TaskError | None = None
        witness = Witness(predictor(session, manifest))
        try:
            value = metric_of(metric, witness, variant.name) if metric else None
            run.folder.keep(f"shown-{variant.name}", witness.shown if metric else None)
        except TaskError as error:  # of an artifact that answers NaN it may have none
            value = error
        parity = evidence.parity(run.folder, run.task, session, answers, made, run.network, manifest)
        del session, witness
        rejection = rejected(run, made, manifest, folder, parity)
        if isinstance(value, TaskError):
            if rejection is None:
                raise value
            value = None
        rows, integer, floating = executed_rows(made.network, made.plan, run.task.call(), manifest, folder)
        packed = _packed(run, folder, manifest)
    shares = float_shares(rows) if variant.precision in INTEGER else (None, None)
    told: tuple[str, ...] = ()
    if rejection is None:
        told = doubts(variant.name, variant.precision, parity, made, run.task)
        told += float_doubts(variant.name, rows) if variant.precision in INTEGER else ()
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
        rejection=rejection,
        float_macs_share=shares[0],
        float_bytes_share=shares[1],
        doubts=told,
    )
    run.folder.keep(variant.name, dataclasses.asdict(found))
    run.events("candidate", name=variant.name, metric=value, size_bytes=found.measured.size_bytes)
    if rejection is not None:
        run.events("rejected", candidate=variant.name, reason=rejection.reason, operator=rejection.operator)
    return found


def rejected(run: Run, made: Draft, manifest: Manifest, folder: Path, parity: Sequence[Parity]) -> Rejection | None:
    """Why an artifact is not to be offered, with the first operator that differs; None where it may be.

    Args:
        run: For its data and threads.
        made: What it was exported from, its plan empty for a floating-point artifact.
        manifest: Its manifest.
        folder: Where it lies.
        parity: Its comparisons.
    """
    found = measure.limits.rejection(parity)
    if found is None:
        return None
    worst = next(row for p in parity if p.against == found.against for row in p.rows if row.place == found.output)
    with run.costing(f"look for the operator at which {folder.name} differs"):
        site = first_difference(made, run.task, folder, manifest, run.threads, found.snr_db, worst.batch)
    where = (
        f"the first operator that differs is {site}"
        if site
        else "no operator that can be looked at differs by itself; the runtime may join them wrongly"
    )
    return replace(found, reason=f"{found.reason}; {where}", operator=site)


def floors(run: Run, candidates: Sequence[Candidate], source: Measured, structure: Any) -> dict[str, Measured]:
    """The source itself in fp32 in each runtime where the fp32 candidate is another network, built anew; its size.

    What is faster or smaller than this is so by the recipe; what this is faster than torch, by the runtime. Where it
    can't be built, the runtime is left out.
    """
    found = {}
    for runtime in dict.fromkeys(c.runtime for c in candidates):
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
        found[runtime] = Measured(size_bytes=size, parameters=source.parameters, macs=source.macs)
    return found


def _floor(runtime: str) -> str:
    return f"{STATE}/floor-{runtime}"


def latencies(run: Run, candidates: Sequence[Candidate], floors: Collection[str] = ()) -> dict[str, measure.Timing]:
    """Time the source and all candidates side by side, each in a process of its own; "source" is the source.

    The source in fp32 in a runtime of `floors` is called "floor-" and the runtime's name. What a runtime crashes or
    hangs at has none, and a warning says so.
    """
    if kept := run.folder.kept("latency"):
        return {name: from_dict(measure.Timing, value) for name, value in kept.items()}
    inputs = evidence.arrays(read_manifest(run.folder.path / SOURCE), evidence.one_call(run.task, run.batch))
    folders = {"source": run.folder.path / SOURCE} | {c.name: run.folder.path / c.folder for c in candidates}
    folders |= {f"floor-{runtime}": run.folder.path / _floor(runtime) for runtime in floors}
    targets = [measure.Target(name, folder, inputs, run.batch) for name, folder in folders.items()]
    timings: dict[str, measure.Timing] = {}
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
                targets = [target for target in targets if target.name != error.target]
                if error.target == "source" or not {t.name for t in targets} & {c.name for c in candidates}:
                    raise
                run.warn(f"{error.target} could not be timed: {error.what} ({error.got})")
    run.folder.keep("latency", {name: dataclasses.asdict(t) for name, t in timings.items()})
    return timings


def metric_of(metric: Callable[[Any], float], predict: Callable[..., Any], name: str) -> float:
    """The task's metric on one network.

    Args:
        metric: The task's `evaluate` or `select`.
        predict: The network, NumPy in, NumPy out.
        name: What is evaluated, for errors.

    Raises:
        TaskError: It raised (names the line), never called `predict`, or returned what is not a finite number.
    """
    witness = predict if isinstance(predict, Witness) else Witness(predict)
    try:
        value = metric(witness)
    except PenjingError:
        raise
    except (Exception, SystemExit) as error:
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
    if not witness.calls:
        raise TaskError(
            f"the task's metric never called predict on {name}",
            got=f"{value!r}, whatever the network",
            expected="evaluate(predict) -> float, which judges what predict answers",
            remedy="call predict in evaluate, in place of a network or an answer of your own",
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
        load_ms=timing.load_ms,
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


def _packed(run: Run, folder: Path, manifest: Manifest) -> int:
    total = 0
    for name in manifest.files():
        key = ("packed", measure.sha256(folder / name))
        if key not in run.memo:
            run.memo[key] = measure.packed_bytes([folder / name])
        total += run.memo[key]
    return total
