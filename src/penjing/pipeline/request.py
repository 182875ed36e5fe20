"""The request of a run: checked before anything is computed or written, and compared when a run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.distill import Student, TeacherCache
from penjing.distill.stored import CachedTeacher
from penjing.distill.teaching import opened
from penjing.errors import MissingDependency, OutputError, TaskError, UsageError
from penjing.goals.goal import Goal, needs_metric, needs_packing
from penjing.network import weights
from penjing.network.graph import sites
from penjing.numerics import compiled
from penjing.pipeline import intact
from penjing.pipeline.reference import Original
from penjing.pipeline.rehearsal import rehearse
from penjing.pipeline.run import Run
from penjing.quantize import QAT, Static
from penjing.quantize.static import matches
from penjing.randomness import preserve_rng_state, seed_everything
from penjing.recipes.recipe import Recipe
from penjing.records import Record
from penjing.steps.identity import identity
from penjing.surgery.taps import Tapped
from penjing.tasks.task import Task, calibration_calls, fingerprint
from penjing.train.data import loader
from penjing.train.finetune import Finetune
from penjing.train.objective import Objective

BEYOND_ONE = 1.5  # a metric above it is not a fraction


def check_goal(goal: Goal, task: Task) -> None:
    """Refuse a goal on a figure that nothing can give here.

    Raises:
        TaskError: It speaks of a metric, and the task has none.
        MissingDependency: It speaks of the packed size, and nothing packs.
    """
    if needs_packing(goal) and not compiled.available():
        raise MissingDependency(
            "the goal names the packed size, and packing needs compiled loops",
            code="not-installed",
            got="numba is not installed",
            expected="numba",
            remedy="pip install 'penjing[pack]', or leave packed_bytes out of the goal",
        )
    if task.evaluate is None and task.calibration is None and needs_metric(goal):
        raise TaskError(
            "the goal names the metric, and the task has none",
            code="no-metric",
            got=f"goal {goal.text()!r}; Task.evaluate and Task.calibration are None",
            expected="Task(evaluate=...), or calibration data, on which agreement with the source is measured",
            remedy="give the task an evaluate(predict) -> float, or leave the metric and its drop out of the goal",
        )


def check_files(folder: Path, record: Record) -> None:
    """Raise OutputError where a finished run's files are not those that it left."""
    differences = intact.differences(folder, record)
    if record.files and not (differences.missing or differences.changed):
        return
    raise OutputError(
        "the files of the finished run in this folder have changed",
        code="changed",
        got=str(differences) or "a record without hashes",
        expected="the files that the record names, with the bytes that they had",
        remedy="--force runs it anew; `penjing verify` tells what still holds",
    )


def small_drop(goal: Goal, metric: float | None) -> str | None:
    """A warning where a drop in hundredths is asked of a metric that goes beyond 1: it is in the metric's own unit.

    Args:
        goal: With `max_drop` or without.
        metric: Of the network that the drop is against.
    """
    if goal.max_drop is None or metric is None or abs(metric) <= BEYOND_ONE or not 0 < goal.max_drop <= 0.1:
        return None
    share = f"{100 * goal.max_drop:g}%"
    return (
        f"the metric is {metric:g}, and a drop of {share} is {goal.max_drop:g} of it in its own unit: write "
        f"relative_drop<={share} for a share of the metric, or drop<={100 * goal.max_drop:g} for points of a hundred"
    )


def check_inputs(task: Task) -> None:
    """Raise TaskError where an input is not a tensor: a runtime's programs take nothing else."""
    args, kwargs = task.call()
    for name, value in [*enumerate(args), *kwargs.items()]:
        if not isinstance(value, torch.Tensor):
            raise TaskError(
                f"input {name!r} of the task's example is not a tensor",
                code="not-a-tensor",
                got=type(value).__name__,
                expected="one tensor for every input: a runtime takes nothing else",
                remedy="wrap the network in a module whose forward takes tensors, and builds or fixes the rest itself",
            )


def check_recipe(recipe: Recipe, network: fx.GraphModule, task: Task, seed: int) -> None:
    """Raise what a step would raise that lacks its data, names what is not there, or can't take it, before any begins.

    Values inside the student are looked for while it is still built as the source is; later steps name what earlier
    ones have made.

    Raises:
        CalibrationError: The calibration data is missing or unfit.
        TaskError: The training data or the loss is missing.
        RecipeError: A pattern fits nothing, or a feature does not exist.
    """
    if recipe.quantizes:
        calibration_calls(task)
    names = list(sites(network))
    changed = False
    for position, step in enumerate(recipe):
        if isinstance(step, Static):
            for pattern in (*step.exclude, *step.settings):
                matches(pattern, names)
        changed = changed or not isinstance(step, Finetune)
        data = dataclasses.replace(task, train=None) if isinstance(step, QAT) and step.data == "calibration" else task
        for training in [step.training(task)] if isinstance(step, QAT) else _trainings(step):
            loader(data, training.task_loss_weight)
            Objective(data, training.losses, training.task_loss_weight, training.label_smoothing)
            features = [pair for way in training.distillations for pair in way.features]
            if training.teacher is None:
                Tapped(network, [theirs for _, theirs in features], "teacher")
            if not changed:
                Tapped(network, [mine for mine, _ in features], "student")
            if position or step is not training or training.teacher is not None:
                rehearse(training, network, data, changed, seed)


def untrained(recipe: Recipe) -> str | None:
    """A warning where a student with random weights is never trained."""
    student = any(isinstance(step, Student) for step in recipe)
    if student and not any(list(_trainings(step)) for step in recipe):
        return "Student has random weights, and no step of the recipe trains it: put Finetune behind it"
    return None


def undropped(recipe: Recipe, model: object) -> str | None:
    """A warning where layers that the recipe trains lose the dropout that they do by themselves.

    A network is exported in eval mode: what `nn.Dropout` does is found again, what these layers do within is not.
    """
    if not isinstance(model, nn.Module) or not any(list(_trainings(s)) for s in recipe):
        return None
    layers = [
        name
        for name, part in model.named_modules()
        if (isinstance(part, nn.MultiheadAttention) and part.dropout)
        or (isinstance(part, nn.RNNBase) and part.dropout and part.num_layers > 1)
    ]
    if not layers:
        return None
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return (
        f"the dropout within {', '.join(layers[:3])}{more} is left out while the recipe trains: nn.Dropout alone stays"
    )


def _trainings(step: object) -> Iterator[Finetune]:
    """A step that trains, or the trainings within it."""
    if isinstance(step, Finetune):
        yield step
    elif isinstance(step, tuple):
        for one in step:
            yield from _trainings(one)
    elif dataclasses.is_dataclass(step):
        for field in dataclasses.fields(step):
            yield from _trainings(getattr(step, field.name))


def with_teachers(recipe: Recipe, task: Task) -> Recipe:
    """The recipe with every file that it names as a teacher opened, once.

    Raises:
        SourceError: A file is missing, or holds no network.
        CheckpointError: It would run code.
    """
    networks: dict[str, nn.Module] = {}

    def one(teacher: Any) -> Any:
        if isinstance(teacher, TeacherCache):
            return dataclasses.replace(teacher, teacher=one(teacher.teacher))
        if not isinstance(teacher, str) or teacher == "self":
            return teacher
        if teacher not in networks:
            networks[teacher] = opened(teacher, task)
        return networks[teacher]

    def walk(value: Any) -> Any:
        if isinstance(value, Finetune):
            several = value.teacher
            there = tuple(map(one, several)) if isinstance(several, tuple) else one(several)
            return dataclasses.replace(value, teacher=there)
        if isinstance(value, tuple):
            return tuple(map(walk, value))
        if not dataclasses.is_dataclass(value) or not list(_trainings(value)):
            return value
        fields = {field.name: walk(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]

    return Recipe(*map(walk, recipe))


def check_device(device: str) -> None:
    """Raise UsageError where there is no such device, or torch was built without it."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError and others of its own
        raise UsageError(
            "the device can't be used",
            code="device",
            got=f"{device!r}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            expected="'cpu', or a device that this torch knows: 'cuda', 'cuda:1', 'mps', 'xpu'",
            remedy="--device cpu trains everywhere; python -c 'import torch; print(torch.cuda.is_available())' tells",
        ) from None


def data_hashes(task: Task, recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the data by its role, and of the weights of teachers that the recipe names.

    Of the calibration data all is read, and so checked; of the training data the first batch, where it is the same
    again after the same seed.
    """
    hashes = {"calibration": fingerprint(calibration_calls(task))} if task.calibration is not None else {}
    first = _first_batch(task)
    hashes |= {"train": first} if first is not None else {}
    several = pytree.tree_leaves([training.teacher for step in recipe for training in _trainings(step)])
    models = [opened(one, task) for one in several if one is not None and one != "self"]
    taught_by = dict.fromkeys(
        one.name if isinstance(one, CachedTeacher) else weights.fingerprint_by_name([one]) for one in models
    )
    return hashes | {f"teacher {i}" if i > 1 else "teacher": sha for i, sha in enumerate(taught_by, 1)}


def _first_batch(task: Task) -> str | None:
    if task.train is None or isinstance(task.train, Iterator):  # which gives every batch once
        return None
    seen = []
    try:
        with preserve_rng_state():
            for _ in range(2):
                seed_everything(0)
                seen.append(fingerprint([((next(iter(task.train)),), {})]))
    except Exception:  # a loader that fails is told by the training, with the step that it fails at
        return None
    return seen[0] if seen[0] == seen[1] else None


def request(
    run: Run,
    name: str,
    goal: Goal,
    recipe: list[dict[str, Any]],
    runtimes: tuple[str, ...],
    data: dict[str, str],
    original: Original | None,
) -> dict[str, Any]:
    """Everything that determines the result, as plain data: a run is resumed only if it is unchanged."""
    return {
        "source": name,
        "weights": weights.fingerprint(run.network),
        "goal": goal.text(),
        "recipe": recipe,
        "runtimes": list(runtimes),
        "seed": run.seed,
        "batch": run.batch,
        "threads": run.threads,
        "data": data,
        "loss": identity(run.task.loss),
        "reference": None if original is None else original.weights,
        "target": None if run.target is None else run.target.sha256,
        "plan": None if run.start is None else hashlib.sha256(run.start.plan.to_json().encode()).hexdigest(),
    }


def asked(record: Record) -> dict[str, Any]:
    """The request of a finished run, as far as its record tells."""
    latency = record.source.latency_ms
    return {
        "source": record.name,
        "goal": record.goal.text,
        "recipe": record.recipe if record.search is None else [],
        "searches": record.search is not None,
        "seed": record.seed,
        "reference": None if record.reference is None else record.reference.weights,
        "target": None if record.target is None else record.target.sha256,
        "batch": latency.batch if latency is not None else 1,
        "threads": record.machine.threads,
        "data": {
            role: sha
            for role, sha in record.data.items()
            if role.split()[0] in ("calibration", "train", "teacher", "weights")
        },
    }
