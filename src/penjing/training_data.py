"""Batches to train on: where they come from, and what is said of one that a network or a loss can't take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from penjing.errors import PenjingError, TaskError, TrainingError
from penjing.task import Task, calibration_calls


class Unlabelled:
    """Calibration data as a loader without labels."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for args, kwargs in calibration_calls(self.task):
            yield kwargs or args, None


def loader(task: Task, labels: float) -> Any:
    """What is trained on: `task.train`, or the calibration data where no labels are needed and nothing else is there.

    Args:
        task: The user's.
        labels: Their weight in the loss.

    Raises:
        TaskError: There is none, or it is no loader.
    """
    data = task.train
    if data is None and not labels and task.calibration is not None:
        return Unlabelled(task)
    if data is None:
        raise TaskError(
            "fine-tuning needs training data",
            got="Task.train is None" + ("" if labels else ", and Task.calibration too"),
            expected="an iterable of (inputs, target)" if labels else "an iterable of (inputs, target), or calibration",
            remedy="give Task(train=loader, loss=...), or leave fine-tuning out of the recipe"
            if labels
            else "give Task(calibration=batches), which need no labels",
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TaskError(
            "the training data is no loader",
            got=type(data).__name__,
            expected="a list, a DataLoader, or an object whose __iter__ starts anew",
        )
    return data


@contextmanager
def explained(who: str, inputs: Any, target: Any, task: Task) -> Iterator[None]:
    """What the user's network or loss raises on a batch, as a TaskError that shows the batch beside the example."""
    try:
        yield
    except (PenjingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        args, kwargs = task.call()
        said = next(iter(str(error).strip().splitlines()), "")
        raise TaskError(
            f"{who} can't take a training batch",
            got=f"{type(error).__name__}: {said[:300]} (inputs {_shown(inputs)}, labels {_shown(target)})",
            expected=f"inputs as in Task.example: {_shown((args, kwargs))}, and the labels that Task.loss takes",
            remedy="try one: inputs, labels = next(iter(task.train)); task.loss(network(inputs), labels)",
        ) from error


def not_finite(step: int, call: Any, terms: dict[str, torch.Tensor], value: float) -> TrainingError:
    """Why a loss is not finite: a batch without samples, inputs that are not finite, or a training that diverged."""
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor)]
    if any(x.numel() == 0 for x in tensors):
        return TrainingError(
            f"the training data has a batch without samples, at step {step}", got=_shown(call), expected="(samples, …)"
        )
    if any(x.is_floating_point() and not torch.isfinite(x).all() for x in tensors):
        return TrainingError(
            f"the training data has values that are not finite, at step {step}",
            got=_shown(call),
            expected="finite numbers",
            remedy="look for NaN in the samples, and for a division by a deviation of 0",
        )
    told = {name: float(term) for name, term in terms.items()}
    broken = ", ".join(f"{name} is {number:g}" for name, number in told.items()) if len(told) > 1 else f"{value:g}"
    return diverged(f"the loss is not finite at step {step}", broken)


def diverged(what: str, got: object) -> TrainingError:
    """A training whose numbers have left all bounds."""
    remedy = "clip=penjing.Clip(threshold=1.0), a lower learning_rate, or autocast='off'"
    return TrainingError(what, got=got, expected="finite numbers", remedy=remedy)


def _shown(value: Any) -> str:
    """
    >>> _shown((torch.zeros(2, 3), {"mask": torch.ones(2).bool()}))
    'float32 (2, 3), bool (2,)'
    """
    leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
    return (
        ", ".join(
            f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            if isinstance(x, torch.Tensor | np.ndarray)
            else type(x).__name__
            for x in leaves
        )
        or "None"
    )
