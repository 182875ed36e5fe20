"""From a goal to the best artifact: candidates are built, measured side by side, and the best that meets it wins."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from penjing import measure, records, runtimes
from penjing.errors import MissingDependency, PenjingError, UsageError
from penjing.goals import goal as goals
from penjing.goals.goal import Goal
from penjing.measure import time_limits
from penjing.pipeline import evidence, intact, judging, questions, trainings, zeros
from penjing.pipeline import request as requests
from penjing.pipeline import stages as pipeline
from penjing.pipeline.applied import Applied, drafted, refuse_quantized
from penjing.pipeline.building import INTEGER
from penjing.pipeline.repeatable import raise_repeatable
from penjing.pipeline.stages import Run, Variant
from penjing.quantize import AdaRound, Static
from penjing.randomness import seed_everything
from penjing.recipes.recipe import Recipe
from penjing.records import Candidate, Record, StepCost, Zeros, from_dict, to_json
from penjing.records.events import Events, Listener
from penjing.records.files import write_text
from penjing.records.folder import ARTIFACT, EVENTS, RECORD, RunFolder
from penjing.records.lock import locked
from penjing.records.manifest import read_manifest
from penjing.report import html
from penjing.report import verdict as verdicts
from penjing.runtimes.loader import write_loader
from penjing.sources.source import Source, check_forward, in_single_precision, open_source
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.step import Step
from penjing.storage import checkpoint
from penjing.tasks.keywords import suggesting
from penjing.tasks.opening import as_task
from penjing.tasks.task import Task, agreement_task
from penjing.tasks.undisturbed import same_process
from penjing.tasks.usercode import never_exiting

DEFAULT_GOAL = "minimize latency_ms, drop<=1%"


@dataclass(frozen=True)
class Result:
    """What a run gave back.

    Attributes:
        record: All the evidence.
        folder: The run folder.
    """

    record: Record
    folder: Path

    @property
    def met(self) -> bool:
        """Whether the goal was met."""
        return self.record.goal.met

    @property
    def artifact(self) -> Path:
        """The folder with the chosen artifact."""
        return self.folder / ARTIFACT

    def __str__(self) -> str:
        return f"{self.record.goal.reason}; {verdicts.of(self.record).headline} ({self.folder})"


@suggesting
@never_exiting()
@same_process()
def compress(
    model: str | nn.Module | ExportedProgram,
    task: Task | str | Path,
    goal: Goal | str = DEFAULT_GOAL,
    *,
    runtime: str | Sequence[str] | None = None,
    recipe: Recipe | Step | Sequence[Step] | None = None,
    out: Path | str = "runs/compress",
    seed: int = 0,
    threads: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    exclude: Sequence[str] = (),
    seconds: float = 1.0,
    resume: bool = False,
    force: bool = False,
    listeners: Sequence[Listener] = (),
    reference: str | nn.Module | ExportedProgram | None = None,
) -> Result:
    """Find the best artifact that meets a goal.

    Every precision of every runtime that is installed is built, opened in its own runtime and measured: the task's
    metric, latency side by side with the source, size, memory, parity. The measured best that meets the goal becomes
    the artifact. When none does, the nearest is kept, with the Pareto set and the reason.

    Args:
        model: The network, or a SOURCE as on the command line.
        task: The user's data and metric, or TASK as on the command line.
        goal: For example ``"minimize latency_ms, drop<=0.5%"``; `drop` is in the metric's own unit (1% is 0.01).
        runtime: One or several of ``penjing runtimes``; None takes all that are installed.
        recipe: Steps to take, or one step; None is post-training static quantization with adaptive rounding.
        out: The run folder.
        seed: Same seed, data, machine kind and threads: same artifact.
        threads: Threads of the runtimes; None takes every core.
        batch: Samples of a timed call.
        device: Where training steps run.
        exclude: Name patterns that stay in floating point, when `recipe` is None.
        seconds: Timed seconds per artifact.
        resume: Go on with the run in `out`.
        force: Replace the run in `out`.
        listeners: Called with every event (a dict).
        reference: The network that `drop` is against, where that is not `model`: for a second run on a pruned
            network, the one before pruning. Parity stays against `model`.

    Raises:
        PenjingError: With what, got, expected and remedy; nothing half-written is left in place of an artifact.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    refuse_quantized(model)
    if recipe is not None and exclude:
        raise UsageError(
            "both a recipe and names to exclude were given",
            got=f"exclude {', '.join(exclude)}",
            expected="one of them",
            remedy="write it into the recipe: quantize.Static: {exclude: [...]}",
        )
    plain = (Static(exclude=tuple(exclude), outliers="ease"), AdaRound())
    steps = Recipe.of(recipe) if recipe is not None else Recipe(*plain)
    return _carry_out(
        model, task, goal, steps, reference=reference, runtime=runtime, out=out, seed=seed,
        threads=threads, batch=batch, device=device, seconds=seconds, resume=resume, force=force, listeners=listeners,
    )  # fmt: skip


def _carry_out(
    model: str | nn.Module | ExportedProgram | Applied,
    task: Task | str | Path,
    goal: Goal,
    steps: Recipe,
    *,
    reference: str | nn.Module | ExportedProgram | None,
    runtime: str | Sequence[str] | None,
    out: Path | str,
    seed: int,
    threads: int | None,
    batch: int,
    device: str,
    seconds: float,
    resume: bool,
    force: bool,
    listeners: Sequence[Listener],
) -> Result:
    """The one way through, from a source, or from what was made and trained already."""
    task = as_task(task)
    names = _runtimes(runtime)
    requests.check_device(device)
    threads = measure.check_threads(threads or measure.machine(1).cores)
    with locked(out):
        folder = RunFolder(out, resume=resume, force=force)
        try:
            return _compress(
                folder, model, task, goal, steps, reference, names, seed, threads, batch, device, seconds,
                tuple(listeners),
            )  # fmt: skip
        finally:
            time_limits.expect_nothing()


def _compress(
    folder: RunFolder,
    model: str | nn.Module | ExportedProgram | Applied,
    task: Task,
    goal: Goal,
    steps: Recipe,
    reference: str | nn.Module | ExportedProgram | None,
    names: tuple[str, ...],
    seed: int,
    threads: int,
    batch: int,
    device: str,
    seconds: float,
    listeners: tuple[Listener, ...],
) -> Result:
    """`compress` and `deliver` in a folder that is held."""
    start = model.draft if isinstance(model, Applied) else None
    told: str | None = None
    before = model.recipe if isinstance(model, Applied) else []
    machine = measure.machine(threads)
    events = Events(listeners=listeners)
    torch.set_num_threads(threads)
    seed_everything(seed)
    requests.check_goal(goal, task)
    requests.check_inputs(task)
    question = questions.check_direction(task)
    if isinstance(model, Applied):
        opened = replace(open_source(model.draft.network, task=task), name=model.name)
    else:
        opened, task, told = in_single_precision(open_source(model), task)
        check_forward(opened, task)
    original = judging.original(reference, task)
    run, task = _start(
        opened, start, original, task, folder, events, seed, device, threads, batch, seconds, machine.instruction_sets
    )
    taken = requests.with_teachers(steps, task)
    requests.check_recipe(taken, run.network, task, seed)
    data = requests.data_hashes(task, taken)
    kept = records.read(folder.path) if folder.resumed and (folder.path / RECORD).exists() else None
    recipe = before + steps.to_data()
    wanted = requests.request(run, opened.name, goal, recipe, names, data, original)
    folder.claim(wanted, requests.asked(kept) if kept is not None else None)
    if kept is not None:
        folder.finish()
        requests.check_files(folder.path, kept)
        return Result(kept, folder.path)
    events.into(folder.path / EVENTS)
    for text in filter(None, (requests.untrained(steps), requests.undropped(steps, opened.module), told)):
        run.warn(text)
    if question is not None:
        run.warn(question.text)
    if isinstance(model, Applied) and (other := model.planned_for_another(names)):
        run.warn(other)
    _, structure = pipeline.source(run)
    source, source_rows = pipeline.source_figures(run)
    metrics, destroyed = questions.source_metrics(run, task, data)
    beside = metrics if original is None else judging.reference_metrics(run, task, original)
    events("source", name=opened.name, metric=metrics["evaluate"], metric_name=task.metric_name)
    looked_at = "select" if task.select is not None else "evaluate"
    if small := requests.small_drop(goal, beside["evaluate"]):
        run.warn(small)
    quantizes = steps.quantizes or (start is not None and bool(start.plan))
    variants = [v for name in names for v in _variants(name, quantizes, machine.instruction_sets)]
    if not all(folder.kept(variant.name) for variant in variants):
        pipeline.shared(run, taken)  # what all candidates need fails once, and by its own name
    found = _candidates(run, taken, variants, structure, getattr(task, looked_at))
    differs = questions.other_data(run, {c.name: folder.kept(f"shown-{c.name}") for c in found}, looked_at)
    timed = [c for c in found if c.rejection is None] or found
    floors = pipeline.floors(run, found, source, structure)
    timings = pipeline.latencies(run, timed, floors)
    seen = {runtime: timings[name] for runtime in floors if (name := f"floor-{runtime}") in timings}
    floors = {runtime: pipeline.timed(floors[runtime], timing) for runtime, timing in seen.items()}
    source = replace(pipeline.timed(source, timings["source"]), metric=metrics["evaluate"])
    found = [c for c in found if c.name in timings or c.rejection is not None]
    found = [judging.judged(c, goal, timings.get(c.name), beside[looked_at], task) for c in found]
    verdict = goals.choose(goal, found)
    artifact, verdict, last = judging.final(run, goal, verdict, found, beside, looked_at)
    verdict = judging.doubted(verdict, (question, destroyed, differs, last))
    gained = _zeros(run, taken, next((c for c in found if c.name == verdict.chosen), None), structure)
    _tell_of_plan(run, taken, next((c for c in found if c.name == verdict.chosen), None))
    record = Record(
        penjing=measure.versions()["penjing"],
        versions=measure.versions(),
        machine=machine,
        seed=seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        name=opened.name,
        task=task.name,
        data=data,
        recipe=recipe,
        metric_name=task.metric_name,
        higher_is_better=task.higher_is_better,
        source=source,
        artifact=artifact,
        candidates=tuple(c for c in found if c.rejection is None),
        goal=verdict,
        layers=source_rows,
        steps=_costs(run),
        warnings=tuple(run.warnings),
        zeros=gained,
        trainings=trainings.read(folder.path / EVENTS),
        selected=metrics["select"],
        floors=floors,
        reference=None if original is None else original.row(beside),
        rejected=tuple(c for c in found if c.rejection is not None),
    )
    return Result(_deliver(run, taken, record), folder.path)


def run(
    recipe: Recipe | Step | Sequence[Step],
    model: str | nn.Module | ExportedProgram,
    task: Task,
    *,
    runtime: str,
    goal: Goal | str | None = None,
    **options: Any,
) -> Result:
    """Run one recipe for one runtime; `options` as in `compress`. Without a goal, the smallest latency is chosen."""
    return compress(model, task, goal or Goal(minimize="latency_ms"), runtime=runtime, recipe=recipe, **options)


@suggesting
@never_exiting()
@same_process()
def deliver(
    module: nn.Module | Draft,
    task: Task | str | Path,
    goal: Goal | str = DEFAULT_GOAL,
    *,
    reference: str | nn.Module | ExportedProgram | None = None,
    runtime: str | Sequence[str] | None = None,
    out: Path | str = "runs/deliver",
    seed: int = 0,
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 1.0,
    resume: bool = False,
    force: bool = False,
    listeners: Sequence[Listener] = (),
) -> Result:
    """Export what `apply` returned, after a training of one's own, with record and verdict.

    The integers are those of the module's fake quantizers, with the ranges that they have now. Everything is measured
    and judged as in `compress`; the source beside which it is seen is the module itself in floating point.

    Args:
        module: What `apply` returned, trained or not; or a draft, such as `load_checkpoint` gives.
        task: The user's data and metric.
        goal: As in `compress`.
        reference: As in `compress`; for example the network that `apply` was given.
        runtime: As in `compress`.
        out: The run folder.
        seed: As in `compress`.
        threads: As in `compress`.
        batch: As in `compress`.
        seconds: As in `compress`.
        resume: As in `compress`.
        force: As in `compress`.
        listeners: As in `compress`.

    Raises:
        PenjingError: With what, got, expected and remedy; nothing half-written is left in place of an artifact.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    return _carry_out(
        drafted(module), task, goal, Recipe(), reference=reference, runtime=runtime, out=out, seed=seed,
        threads=threads, batch=batch, device="cpu", seconds=seconds, resume=resume, force=force, listeners=listeners,
    )  # fmt: skip


def _runtimes(wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    if wanted is None:
        found = tuple(name for name in runtimes.DEPLOYED if runtimes.installed(name))
        if not found:
            raise MissingDependency(
                "no runtime is installed",
                got="torch alone",
                expected=f"one of {', '.join(runtimes.DEPLOYED)}",
                remedy=" or ".join(f"pip install 'penjing[{name}]'" for name in runtimes.DEPLOYED),
            )
        return found
    names = tuple(wanted.replace(",", " ").split()) if isinstance(wanted, str) else tuple(wanted)
    for name in names:
        runtimes.get(name)
    return names


def _start(
    opened: Source,
    start: Draft | None,
    original: judging.Original | None,
    task: Task,
    folder: RunFolder,
    events: Events,
    seed: int,
    device: str,
    threads: int,
    batch: int,
    seconds: float,
    instruction_sets: tuple[str, ...],
) -> tuple[Run, Task]:
    events("stage", name="raise")
    network = start.network if start is not None else raise_repeatable(opened, task)
    if task.evaluate is None and task.calibration is not None:
        agrees = (network, "the source") if original is None else (original.network, "the reference")
        task = agreement_task(task, *agrees)
    made = Run(
        network=network,
        start=start,
        task=task,
        folder=folder,
        events=events,
        seed=seed,
        device=device,
        threads=threads,
        batch=evidence.batch_size(task, batch),
        seconds=seconds,
        instruction_sets=instruction_sets,
    )
    return made, task


def _variants(name: str, quantizes: bool, instruction_sets: tuple[str, ...]) -> list[Variant]:
    precisions = runtimes.get(name).accelerates(instruction_sets).precisions
    return [Variant(name, p) for p in precisions if quantizes or p not in INTEGER]


def _candidates(
    run: Run,
    recipe: Recipe,
    variants: list[Variant],
    structure: Any,
    metric: Callable[[Any], float] | None,
) -> list[Candidate]:
    """All candidates that could be built, rejected ones among them; one that can't is a warning, and the first failure
    an error only when none is left.

    One whose plan was chosen for another precision is none.
    """
    found: list[Candidate] = []
    failure: Exception | None = None
    for position, variant in enumerate(variants):
        run.events("progress", label="candidates", done=position, total=len(variants), name=variant.name)
        try:
            made = pipeline.candidate(run, recipe, variant, structure, metric)
            found += [made] if made else []
        except Exception as error:  # each runtime, exporter and step has exceptions of its own
            if pipeline.ends_run(error):
                raise
            failure = failure or error
            run.warn(f"{variant.name} could not be built: {_told(error)}")
    run.events("progress", label="candidates", done=len(variants), total=len(variants), name="")
    if not found:
        assert failure is not None
        raise failure
    for candidate in found:
        if candidate.rejection is not None:
            run.warn(f"{candidate.name} is not offered: {candidate.rejection.reason}")
        for text in candidate.doubts:
            run.warn(text)
    return found


def _told(error: Exception) -> str:
    if isinstance(error, PenjingError):
        return error.what + (f" ({error.got})" if error.got else "")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _zeros(run: Run, recipe: Recipe, chosen: Candidate | None, structure: Any) -> Zeros | None:
    """What the chosen candidate's zeros gain, where it has any; a warning where that is nothing."""
    if chosen is None:
        return None
    made = pipeline.draft(run, recipe, Variant(chosen.runtime, chosen.precision))
    found = zeros.gained(run, made, chosen, structure)
    if found is not None and (text := verdicts.idle_zeros(found, chosen)):
        run.warnings.append(text)
        run.events("warning", text=text)
    return found


def _tell_of_plan(run: Run, recipe: Recipe, chosen: Candidate | None) -> None:
    """What the chosen integers are that nobody asked for: a remedy that was taken, more bits than the plan has."""
    if chosen is None or chosen.precision not in INTEGER:
        return
    plan = pipeline.draft(run, recipe, Variant(chosen.runtime, chosen.precision)).plan
    if plan.remedy and any(isinstance(step, Static) and step.outliers == "ease" for step in recipe):
        run.warn(f"{chosen.name}: {plan.remedy}")
    own = runtimes.get(chosen.runtime).accelerates(run.instruction_sets).weight.bits
    bits = min((e.spec.bits for edge, e in plan.entries.items() if edge.endswith(":weight")), default=own)
    if bits < own:
        run.warn(verdicts.narrow_weights(bits, 8, chosen))


def _costs(run: Run) -> tuple[StepCost, ...]:
    return tuple(from_dict(StepCost, c) for c in run.folder.kept("costs") or [])


def _deliver(run: Run, recipe: Recipe, record: Record) -> Record:
    """Put the chosen artifact, its checkpoint, the report and the record in place; then drop what was for a resume.

    The record comes last, with the hashes of all the rest.
    """
    chosen = record.chosen
    assert chosen is not None
    path = run.folder.path
    with run.folder.building(ARTIFACT) as aside:
        shutil.copytree(path / chosen.folder, aside, dirs_exist_ok=True)
        write_loader(aside / "load.py", read_manifest(aside), ".", run.threads)
    write_loader(path / "load.py", read_manifest(path / ARTIFACT), ARTIFACT, run.threads)
    made = pipeline.draft(run, recipe, Variant(chosen.runtime, chosen.precision))
    plan = made.plan if chosen.precision in INTEGER else Plan()
    checkpoint.save(replace(made, plan=plan), path)
    evidence.store_planned(run.folder, run.task, made.network, plan)
    html.write(record, path / "report.html")
    run.events("done", met=record.goal.met, reason=record.goal.reason, chosen=record.goal.chosen)
    record = replace(record, files=intact.hashes(path))
    write_text(path / RECORD, to_json(record))
    run.folder.finish()
    return record
