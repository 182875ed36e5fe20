"""From a goal alone to the best artifact that meets it: what users call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from penjing import watch
from penjing.errors import UsageError
from penjing.goals.goal import Goal
from penjing.pipeline.compress import Result, carry_out, order_of
from penjing.recipes.recipe import Recipe
from penjing.records.events import Listener
from penjing.search.search import Budget, search
from penjing.sources.source import Source
from penjing.steps.step import Step
from penjing.targets import Target
from penjing.tasks.keywords import suggesting
from penjing.tasks.task import Task
from penjing.tasks.undisturbed import same_process
from penjing.tasks.usercode import never_exiting


# Twenty-two arguments: the public contract of a run. The body is short; its length is their documentation.
@suggesting
@never_exiting()
@same_process()
def compress(
    model: str | nn.Module | ExportedProgram | Source,
    task: Task | str | Path,
    goal: Goal | str | None = None,
    *,
    minutes: float | None = None,
    trials: int | None = None,
    study: str | None = None,
    cluster: str | None = None,
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
    log: str | Sequence[str] = (),
    reference: str | nn.Module | ExportedProgram | None = None,
    target: str | Path | Target | None = None,
) -> Result:
    """Find the best artifact that meets a goal.

    With `minutes` or `trials`, recipes are searched: pruning, low rank, training, integers of 8 and 4 bits, and the
    network as it is, each tried in the runtimes and measured. Without, one recipe is carried out. Every precision of
    every runtime that is installed is built, opened in its own runtime and measured: the task's metric, latency side
    by side with the source, size, memory, parity. The measured best that meets the goal becomes the artifact. When
    none does, the nearest is kept, with the Pareto set and the reason.

    Args:
        model: The network, or a SOURCE as on the command line.
        task: The user's data and metric, or TASK as on the command line.
        goal: For example ``"minimize latency_ms, drop<=1%"``; `drop` is in the metric's own unit (1% is 0.01).
            None is that, or the smallest file for a `target`.
        minutes: Search for so long: the artifact is there within a fifth more.
        trials: Search until so many recipes were tried.
        study: The URL of a database for the study of a search (``postgresql://…``); None keeps it in `out`.
        cluster: Where the trials of a search run: "auto" starts Ray on this machine, with as many processes as its
            cores allow for `threads`; else the address of a running cluster that sees `out`.
        runtime: One or several of ``penjing runtimes``. None considers those that it lists without a star, "all" the
            others too, and "auto" picks one by timing the source in each.
        recipe: Steps to take, or one step; None is post-training static quantization with adaptive rounding.
        out: The run folder.
        seed: Same seed, data, machine kind and threads: same artifact.
        threads: Threads of the runtimes; None takes every core.
        batch: Samples of a timed call.
        device: Where training steps run.
        exclude: Name patterns that stay in floating point, when `recipe` is None and nothing is searched.
        seconds: Timed seconds per artifact.
        resume: Go on with the run in `out`.
        force: Replace the run in `out`.
        listeners: Called with every event (a dict).
        log: What watches the run from outside, one or several: ``mlflow:URI``, ``tensorboard:DIR``, ``wandb:PROJECT``.
        reference: The network that `drop` is against, where that is not `model`: for a second run on a pruned
            network, the one before pruning. Parity stays against `model`.
        target: One of ``penjing targets``, or a profile of your own (``mine.yaml``): formats are chosen for that
            device and its limits hold. What is timed on this machine is none of its figures.

    Raises:
        PenjingError: With what, got, expected and remedy; nothing half-written is left in place of an artifact.
    """
    order = order_of(
        model, task, goal, runtime=runtime, recipe=recipe, seed=seed, threads=threads, batch=batch, device=device,
        exclude=exclude, seconds=seconds, listeners=listeners, reference=reference, target=target,
    )  # fmt: skip
    if minutes is None and trials is None:
        if study is not None or cluster is not None:
            raise UsageError(
                "a study and a cluster belong to a search",
                code="no-budget", got=study or cluster, expected="minutes or trials beside it",
                remedy="minutes=10 searches for ten minutes",
            )  # fmt: skip
        with watch.logging(log, listeners) as heard:
            return carry_out(replace(order, listeners=heard), out, resume=resume, force=force)
    if recipe is not None or exclude:
        raise UsageError(
            "a search chooses the recipe itself",
            code="recipe",
            got="a recipe and a budget" if recipe is not None else f"exclude {', '.join(exclude)} and a budget",
            expected="one of both",
            remedy="leave minutes and trials out to carry one recipe out",
        )
    budget = Budget(minutes=minutes, trials=trials, study=study, cluster=cluster)
    with watch.logging(log, listeners) as heard:
        return search(replace(order, listeners=heard), budget, out, resume=resume, force=force)
