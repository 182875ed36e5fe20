"""Training batches: where they come from, and errors for one that a network or a loss can't take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from penjing.errors import PenjingError, TaskError, TrainingError
from penjing.tasks.call import as_call, to_tensors
from penjing.tasks.task import Task, calibration_calls

OTHER_DATA = (
    "the training is resumed with different data, and will not end in the same bits: draw order and "
    "augmentation from the global generators of torch, NumPy or random, and leave out persistent_workers"
)


class Unlabelled:
    """Calibration data as a loader without labels."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for args, kwargs in calibration_calls(self.task):
            yield kwargs or args, None


def loader(task: Task, labels: float) -> Any:
    """The training data: `task.train`, or the calibration data where there is none and no labels are needed.

    Args:
        task: The user's.
        labels: Their weight in the loss.

    Raises:
        TaskError: There is none, or it is not a loader.
    """
    data = task.train
    if data is None and not labels and task.calibration is not None:
        return Unlabelled(task)
    if data is None:
        raise TaskError(
            "fine-tuning needs training data",
            code="no-training-data",
            got="Task.train is None" + ("" if labels else ", and Task.calibration too"),
            expected="an iterable of (inputs, target)" if labels else "an iterable of (inputs, target), or calibration",
            remedy="give Task(train=loader, loss=...), or leave fine-tuning out of the recipe"
            if labels
            else "give Task(calibration=batches), which need no labels",
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TaskError(
            "the training data is not a loader",
            code="not-iterable",
            got=type(data).__name__,
            expected="a list, a DataLoader, or an object whose __iter__ starts anew",
        )
    return data


def count(data: Any, needed: bool, seconds: float = math.inf) -> float:
    """Number of batches per pass; infinite for a stream of unknown length that is not, or not in time, read to its end.

    Raises:
        TaskError: There is none, or the data can be read only once.
    """
    if isinstance(data, Iterator) and not hasattr(data, "__len__"):  # a loader may be its own iterator, and start anew
        raise TaskError(
            "the training data can be read only once",
            code="read-once",
            got=f"a {type(data).__name__}",
            expected="data that starts anew at every pass",
            remedy="give a list, a DataLoader, or an object whose __iter__ starts anew",
        )
    if sized(data):
        length = len(data)
    elif not needed:
        return math.inf
    else:
        length, start = 0, time.perf_counter()
        for _ in data:
            length += 1
            if time.perf_counter() - start > seconds:
                return math.inf
    if length == 0:
        dropped = getattr(data, "drop_last", False)
        raise TaskError(
            "the training data is empty",
            code="empty",
            got="no batch" + (f": drop_last=True, and batches of {data.batch_size}" if dropped else ""),
            expected="batches of (inputs, target)",
            remedy="a smaller batch_size, or drop_last=False" if dropped else "look at len(task.train)",
        )
    return length


def sized(data: Any) -> bool:
    """Whether a loader has a length; a stream's loader has the method too, and raises in it."""
    try:
        len(data)
    except TypeError:
        return False
    return True


def seed_generators(data: Any, seed: int) -> None:
    """Seed the torch generators that a loader and its samplers own; the global ones are seeded elsewhere."""
    for generator in _generators(data):
        generator.manual_seed(seed % 2**63)


@contextmanager
def same_generators(data: Any) -> Iterator[None]:
    """Restore the state of a loader's own generators after the block."""
    before = [(generator, generator.get_state()) for generator in _generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _generators(data: Any) -> list[torch.Generator]:
    batches = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(generators.values())


def check_same(first: Any, again: Any) -> None:
    """Raise TaskError if two passes with the same seed begin with different inputs.

    Cached teacher outputs are looked up by their inputs: the same seed has to give the same samples.
    """
    pairs = zip(*(pytree.tree_leaves(to_tensors(as_call(inputs))) for inputs in (first, again)), strict=True)
    if not all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs):
        raise TaskError(
            "a teacher's answers can't be stored for data that differ at every pass",
            code="unrepeatable",
            got="two passes with one seed, whose first batches differ",
            expected="order and augmentation drawn from the global generators of torch, NumPy or random",
            remedy="seed the augmentation so, or give the network itself as the teacher",
        )


def shares(batches: Sequence[tuple[Any, Any]]) -> list[float]:
    """The weight of each batch in a joint update: its share of the samples, where they can be counted."""
    sizes = [_samples(inputs) for inputs, _ in batches]
    total = sum(sizes)
    return [size / total for size in sizes] if all(sizes) else [1 / len(batches)] * len(batches)


def _samples(inputs: Any) -> int:
    tensors = (x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor | np.ndarray) and len(x.shape))
    return next((len(x) for x in tensors), 0)


def pair(batch: Any, labels: float) -> tuple[Any, Any]:
    """Inputs and target of a batch; without labels to learn from, tensors and dicts are inputs alone.

    Raises:
        TaskError: It is something else.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if not labels and isinstance(batch, torch.Tensor | np.ndarray | Mapping):
        return batch, None
    if not labels and isinstance(batch, tuple | list) and len(batch) == 1:  # what TensorDataset(x) gives
        return batch[0], None
    raise TaskError(
        "a training batch is not a pair",
        code="not-a-pair",
        got=type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else ""),
        expected="(inputs, target)" if labels else "(inputs, None), or a tensor or a dict",
        remedy="put several inputs into a tuple or a dict: ((ids, mask), target)",
    )


@contextmanager
def explained(who: str, inputs: Any, target: Any, task: Task, place: str) -> Iterator[None]:
    """Turn what the user's network or loss raises into a TaskError that shows the batch beside the example."""
    try:
        yield
    except (PenjingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        args, kwargs = task.call()
        said = next(iter(str(error).strip().splitlines()), "")
        remedy = "try one: inputs, labels = next(iter(task.train)); task.loss(network(inputs), labels)"
        if "required positional argument" in said:
            remedy = "the second of two values are the labels: put several inputs into a tuple, ((ids, mask), labels)"
        if "more than 1 value per channel" in said:
            remedy = "batch norms need two samples: DataLoader(..., drop_last=True), or another batch_size"
        raise TaskError(
            f"the {who} can't take {place}",
            code=f"{who}-raised",
            got=f"{type(error).__name__}: {said[:300]} (inputs {_shown(inputs)}, labels {_shown(target)})",
            expected=f"inputs as in Task.example: {_shown((args, kwargs))}, and the labels that Task.loss takes",
            remedy=remedy,
        ) from error


def not_finite(step: int, call: Any, terms: dict[str, float], value: float) -> TrainingError:
    """Why a loss is not finite: a batch without samples, inputs that are not finite, or a training that diverged."""
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor)]
    if any(x.numel() == 0 for x in tensors):
        return TrainingError(
            f"the training data has a batch without samples, at step {step}",
            code="no-sample",
            got=_shown(call),
            expected="(samples, …)",
        )
    if any(x.is_floating_point() and not torch.isfinite(x).all() for x in tensors):
        return TrainingError(
            f"the training data has values that are not finite, at step {step}",
            code="data-not-finite",
            got=_shown(call),
            expected="finite numbers",
            remedy="look for NaN in the samples, and for a division by a deviation of 0",
        )
    broken = ", ".join(f"{name} is {number:g}" for name, number in terms.items()) if len(terms) > 1 else f"{value:g}"
    return diverged("loss-not-finite", f"the loss is not finite at step {step}", broken)


def diverged(code: str, what: str, got: object) -> TrainingError:
    """The error of a training that diverged."""
    remedy = "clip=penjing.Clip(threshold=1.0), a lower learning_rate, or autocast='off'"
    return TrainingError(what, code=code, got=got, expected="finite numbers", remedy=remedy)


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
