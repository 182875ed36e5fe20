"""What a run is asked for: checked before anything is computed or written, and compared when a run goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from penjing import checkpoint
from penjing.errors import TaskError
from penjing.graph import sites
from penjing.pipeline import Run
from penjing.quantize import Static
from penjing.quantize.static import matches
from penjing.recipe import Recipe
from penjing.records import Record
from penjing.search.goal import Goal, needs_metric
from penjing.task import Task, calibration_calls, fingerprint


def check_goal(goal: Goal, task: Task) -> None:
    """Raise TaskError where a goal speaks of a metric that nothing can give."""
    if task.evaluate is None and task.calibration is None and needs_metric(goal):
        raise TaskError(
            "the goal speaks of the metric, and the task has none",
            got=f"goal {goal.text()!r}; Task.evaluate and Task.calibration are None",
            expected="Task(evaluate=...), or calibration data, on which agreement with the source is measured",
            remedy="give the task an evaluate(predict) -> float, or leave the metric and its drop out of the goal",
        )


def check_inputs(task: Task) -> None:
    """Raise TaskError where an input is no tensor: a runtime's programs take nothing else."""
    args, kwargs = task.call()
    for name, value in [*enumerate(args), *kwargs.items()]:
        if not isinstance(value, torch.Tensor):
            raise TaskError(
                f"input {name!r} of the task's example is no tensor",
                got=type(value).__name__,
                expected="one tensor for every input: a runtime takes nothing else",
                remedy="wrap the network in a module whose forward takes tensors, and builds or fixes the rest itself",
            )


def check_recipe(recipe: Recipe, network: fx.GraphModule, task: Task) -> None:
    """Raise CalibrationError where a step would lack its data, RecipeError where it names what is not there."""
    if recipe.quantizes:
        calibration_calls(task)
    names = list(sites(network))
    for step in recipe:
        if isinstance(step, Static):
            for pattern in (*step.exclude, *step.settings):
                matches(pattern, names)


def data_hashes(task: Task) -> dict[str, str]:
    """SHA-256 of the data by its role; reads all of it, and so checks all of it."""
    return {"calibration": fingerprint(calibration_calls(task))} if task.calibration is not None else {}


def request(
    run: Run, name: str, goal: Goal, recipe: Recipe, runtimes: tuple[str, ...], data: dict[str, str]
) -> dict[str, Any]:
    """All that decides what comes out, as plain data: a run goes on only where this is the same."""
    return {
        "source": name,
        "weights": checkpoint.fingerprint(run.network),
        "goal": goal.text(),
        "recipe": recipe.to_data(),
        "runtimes": list(runtimes),
        "seed": run.seed,
        "batch": run.batch,
        "threads": run.threads,
        "data": data,
    }


def asked(record: Record) -> dict[str, Any]:
    """What a finished run was asked for, as far as its record tells."""
    latency = record.source.latency_ms
    return {
        "source": record.name,
        "goal": record.goal.text,
        "recipe": record.recipe,
        "seed": record.seed,
        "batch": latency.batch if latency is not None else 1,
        "threads": record.machine.threads,
        "data": {role: digest for role, digest in record.data.items() if role == "calibration"},
    }
