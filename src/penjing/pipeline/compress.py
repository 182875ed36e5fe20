"""One recipe, all the way: candidates are built, measured side by side, and the best that meets the goal wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from penjing import measure, watch
from penjing.errors import UsageError
from penjing.goals.goal import Goal
from penjing.measure import time_limits
from penjing.pipeline import pretrained, targeting
from penjing.pipeline import request as requests
from penjing.pipeline.applied import drafted, refuse_quantized
from penjing.pipeline.candidates import build
from penjing.pipeline.delivery import deliver as deliver_all
from penjing.pipeline.judging import judge
from penjing.pipeline.order import Bench, Order, as_goal, default_recipe, is_auto, runtime_names
from penjing.pipeline.prepare import prepare
from penjing.pipeline.timing import measure_all
from penjing.recipes.recipe import Recipe
from penjing.records import Record
from penjing.records.events import Listener
from penjing.records.folder import ARTIFACT, RunFolder
from penjing.records.lock import locked
from penjing.report import verdict as verdicts
from penjing.sources.source import Source
from penjing.steps.draft import Draft
from penjing.steps.step import Step
from penjing.targets import Target
from penjing.tasks.keywords import check_keywords, suggesting
from penjing.tasks.opening import as_task
from penjing.tasks.task import Task
from penjing.tasks.undisturbed import same_process
from penjing.tasks.usercode import never_exiting

DEFAULT_GOAL = "minimize latency_ms, drop<=1%"
OPTIONS = ["seed", "threads", "batch", "device", "seconds", "listeners", "reference", "target"]  # of `run`


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        record: All the evidence.
        folder: The run folder.
        pretrained: The Hugging Face folder that the source was opened from; None where it came from elsewhere.
    """

    record: Record
    folder: Path
    pretrained: Path | None = None

    @property
    def met(self) -> bool:
        """Whether the goal was met."""
        return self.record.goal.met

    @property
    def artifact(self) -> Path:
        """The folder with the chosen artifact."""
        return self.folder / ARTIFACT

    def save_pretrained(self, folder: Path | str, source: Path | str | None = None) -> Path:
        """Write the chosen artifact in the layout of a Hugging Face folder, for the classes of optimum.

        Beside the file (``model.onnx``, or ``openvino_model.xml`` and ``.bin``) lie copies of the source's
        configuration, tokenizer and preprocessor, and a README with the line that opens it.

        Args:
            folder: New or empty.
            source: The Hugging Face folder of the network, where `compress` was not given one.

        Returns:
            The folder.

        Raises:
            SourceError: The source is not a Hugging Face folder.
            ArtifactError: The artifact is of a runtime that optimum does not know.
            OutputError: The folder is not empty, or can't be written.
        """
        return pretrained.save(self.artifact, Path(source) if source is not None else self.pretrained, Path(folder))

    def __str__(self) -> str:
        return f"{self.record.goal.reason}; {verdicts.of(self.record).headline} ({self.folder})"


# Fourteen arguments: those of `penjing.search.compress.compress` that say what is asked for.
def order_of(
    model: str | nn.Module | ExportedProgram | Source,
    task: Task | str | Path,
    goal: Goal | str | None = None,
    *,
    runtime: str | Sequence[str] | None = None,
    recipe: Recipe | Step | Sequence[Step] | None = None,
    seed: int = 0,
    threads: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    exclude: Sequence[str] = (),
    seconds: float = 1.0,
    listeners: Sequence[Listener] = (),
    reference: str | nn.Module | ExportedProgram | None = None,
    target: str | Path | Target | None = None,
) -> Order:
    """The request of a run as a value, with everything that needs no data checked; see `compress` for the arguments.

    Raises:
        UsageError: Arguments that do not fit together.
        PenjingError: One of them can't be used here.
    """
    refuse_quantized(model)
    if recipe is not None and exclude:
        raise UsageError(
            "both a recipe and names to exclude were given",
            code="exclude",
            got=f"exclude {', '.join(exclude)}",
            expected="one of them",
            remedy="write it into the recipe: quantize.Static: {exclude: [...]}",
        )
    steps = Recipe.of(recipe) if recipe is not None else default_recipe(exclude)
    requests.check_device(device)
    device_profile = targeting.as_target(target)
    return Order(
        goal=as_goal(goal or (DEFAULT_GOAL if device_profile is None else targeting.GOAL)),
        model=model,
        task=as_task(task),
        recipe=steps,
        reference=reference,
        runtimes=runtime_names(runtime, device_profile),
        seed=seed,
        device=device,
        bench=_bench(threads, batch, seconds),
        listeners=tuple(listeners),
        target=device_profile,
        auto=is_auto(runtime) and device_profile is None,
    )


def carry_out(order: Order, out: Path | str, *, resume: bool, force: bool) -> Result:
    """Run all stages, from a source or from an applied draft."""
    with locked(out):
        folder = RunFolder(out, resume=resume, force=force)
        try:
            prepared = prepare(order, folder)
            opened_from = pretrained_folder(order)
            if isinstance(prepared, Record):
                return Result(prepared, folder.path, opened_from)
            built = build(prepared)
            timed = measure_all(prepared, built)
            judged = judge(prepared, timed)
            return Result(deliver_all(prepared, judged), folder.path, opened_from)
        finally:
            time_limits.expect_nothing()


def pretrained_folder(order: Order) -> Path | None:
    """The folder that the source was opened from."""
    spec = order.model.spec if isinstance(order.model, Source) else order.model
    return Path(spec).resolve() if isinstance(spec, str) and Path(spec).is_dir() else None


@never_exiting()
@same_process()
def run(
    recipe: Recipe | Step | Sequence[Step],
    model: str | nn.Module | ExportedProgram,
    task: Task,
    *,
    runtime: str,
    goal: Goal | str | None = None,
    out: Path | str = "runs/compress",
    resume: bool = False,
    force: bool = False,
    log: str | Sequence[str] = (),
    **options: Any,
) -> Result:
    """Run one recipe for one runtime; `options` and the others as in `compress`.

    Without a goal, the smallest latency is chosen, or the smallest file for a `target`.
    """
    check_keywords("run", options, OPTIONS)
    if goal is None and options.get("target") is None:
        goal = Goal(minimize="latency_ms")
    order = order_of(model, task, goal, runtime=runtime, recipe=recipe, **options)
    with watch.logging(log, order.listeners) as heard:
        return carry_out(replace(order, listeners=heard), out, resume=resume, force=force)


# Thirteen arguments: the public contract, as of `compress`.
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
    """Export what `apply` returned, after custom training, with record and verdict.

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
    order = Order(
        model=drafted(module),
        goal=as_goal(goal),
        task=as_task(task),
        recipe=Recipe(),
        reference=reference,
        runtimes=runtime_names(runtime),
        seed=seed,
        device="cpu",
        bench=_bench(threads, batch, seconds),
        listeners=tuple(listeners),
        auto=is_auto(runtime),
    )
    return carry_out(order, out, resume=resume, force=force)


def _bench(threads: int | None, batch: int, seconds: float) -> Bench:
    return Bench(threads=measure.check_threads(threads or measure.machine(1).cores), batch=batch, seconds=seconds)
