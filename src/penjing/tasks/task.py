"""Task: the user's data, metric and loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.errors import CalibrationError, TaskError
from penjing.tasks.calibration import checked_calls
from penjing.tasks.call import Call, as_call, as_inputs, fingerprint, leaves, map_leaves, to_tensors
from penjing.tasks.keywords import suggesting
from penjing.tasks.outputs import (
    first_output,
    flatten_outputs,
    numpy_predictor,
    output_names,
    to_numpy,
    unflatten_outputs,
)
from penjing.tasks.sample_axes import along_samples, size_of

__all__ = [
    "Call",
    "Task",
    "agreement_task",
    "as_call",
    "calibration_calls",
    "fingerprint",
    "flatten_outputs",
    "numpy_predictor",
    "output_names",
    "unflatten_outputs",
]

_HELD_OUT = 3  # every third calibration batch (or sample) is held out


@suggesting
@dataclass(frozen=True, kw_only=True)
class Task:
    """The user's data, metric and loss. Everything but `example` is optional; a recipe asks for what it needs.

    Attributes:
        example: Example inputs of a forward pass, batch first: a tensor, a tuple of tensors, or a dict of
            keyword tensors. The batch size does not matter. NumPy arrays are accepted.
        calibration: Iterable of inputs, each of the same form as `example`, batched; no labels. It is read several
            times, so it must start over on every pass.
        train: Iterable of (inputs, target).
        evaluate: ``evaluate(predict) -> float``. `predict` maps NumPy inputs (called like the network)
            to NumPy outputs, in the structure that the network returns.
        select: Same form as `evaluate`; used by search, rollback and repair, so that `evaluate` is used only once.
        loss: ``loss(output, target) -> scalar tensor``.
        higher_is_better: Whether a larger metric is better.
        metric_name: Name of the metric in tables.
        dynamic: Axes that vary, input name (or position) → {axis: name}. None: axis 0 of every input is "batch".
            An empty dict: every axis is fixed to the example's size.
        name: Name of the task in tables.

    Raises:
        TaskError: The example has no tensor, or an argument has the wrong type.

    >>> import torch
    >>> Task(example=torch.zeros(1, 3, 8, 8)).call()[0][0].shape
    torch.Size([1, 3, 8, 8])
    """

    example: Any
    calibration: Iterable[Any] | None = None
    train: Iterable[tuple[Any, Any]] | None = None
    evaluate: Callable[[Callable[..., Any]], float] | None = None
    select: Callable[[Callable[..., Any]], float] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    higher_is_better: bool = True
    metric_name: str = "metric"
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        """Check what can be checked without running anything."""
        types = [type(value).__name__ for _, _, value in leaves(as_call(self.example))]
        if not any(isinstance(v, torch.Tensor | np.ndarray) for _, _, v in leaves(as_call(self.example))):
            raise TaskError(
                "the task's example holds no tensor",
                code="no-tensor",
                got=", ".join(types) or repr(self.example),
                expected="a tensor, a tuple of tensors or a dict of keyword tensors, batch first",
                remedy="for example Task(example=torch.zeros(1, 3, 224, 224))",
            )
        for part in ("evaluate", "select", "loss"):
            if getattr(self, part) is not None and not callable(getattr(self, part)):
                raise TaskError(
                    f"the task's {part} can't be called",
                    code="not-callable",
                    got=type(getattr(self, part)).__name__,
                    expected="a function: evaluate(predict) -> float, loss(output, target) -> tensor",
                    remedy=f"give the function itself: Task({part}={part})",
                )
        for key, axes in (self.dynamic or {}).items():
            if not isinstance(axes, Mapping) or not all(isinstance(axis, int) for axis in axes):
                raise TaskError(
                    f"Task.dynamic of input {key!r} is not a mapping of axes",
                    code="axes",
                    got=repr(axes),
                    expected='{axis: name}, for example {0: "batch", 1: "length"}',
                    remedy='write dynamic={"input_ids": {0: "batch", 1: "length"}}',
                )

    def call(self) -> Call:
        """Return the example as positional and keyword arguments, arrays as tensors."""
        return to_tensors(as_call(self.example))


def calibration_calls(task: Task, *, limit: int | None = None) -> Iterator[Call]:
    """Iterate the calibration data as calls of tensors, batch by batch, each checked against the example.

    Args:
        task: Its `calibration` is read once, from the start.
        limit: Most batches (not samples) to read; None reads all.

    Raises:
        CalibrationError: At once if the task has no calibration data; while iterating if a batch differs from the
            example in inputs, dtypes, ranks or fixed sizes, or has values that are not finite, if there is no batch,
            or if a one-shot iterator is read a second time.
    """
    if task.calibration is None:
        raise CalibrationError(
            "the task has no calibration data",
            code="no-calibration",
            got="Task.calibration is None",
            expected="an iterable of input batches (no labels)",
            remedy="give Task(calibration=batches); a few hundred samples are usual",
        )
    return checked_calls(task.calibration, task.call(), task.dynamic, limit)


def agreement_task(task: Task, source_module: nn.Module, name: str = "the source") -> Task:
    """Return the task with a label-free metric: agreement with the source network.

    Every third calibration batch (the second of two; every third sample of a single batch) is held out for the metric,
    and the rest is used for calibration. If the network's first output is floating point with at least two axes and
    more than one column, the metric is the share of rows (over all axes but the last) with the same argmax as the
    source. Otherwise it is the mean cosine similarity per sample between the first output and the source's. Both are 1
    for the source itself.

    Args:
        task: A task with calibration data; its `evaluate` is ignored.
        source_module: The source network; it is run again for every evaluation.
        name: Name of the source in the metric's name.

    Raises:
        CalibrationError: There is no calibration data, or too little to hold out a part.
    """
    first = list(itertools.islice(calibration_calls(task), _HELD_OUT))
    if len(first) == 1:
        rest, held_out = _split_samples(first[0], task)
        calibration: Iterable[Any] = [as_inputs(rest)]
        judges: Iterable[Call] = [held_out]
    else:
        every = _HELD_OUT if len(first) == _HELD_OUT else 2
        calibration = _Part(task, every, held_out=False)
        judges = _Part(task, every, held_out=True).calls()
    source = numpy_predictor(source_module)
    sample = first_output(source(*map_leaves(_array, list(first[0][0])), **map_leaves(_array, first[0][1])))
    classes = sample.ndim >= 2 and sample.shape[-1] > 1 and np.issubdtype(sample.dtype, np.floating)
    compare = _same_class if classes else _cosine

    def evaluate(predict: Callable[..., Any]) -> float:
        total, count = 0.0, 0
        for args, kwargs in judges:
            arrays, named = map_leaves(_array, list(args)), map_leaves(_array, kwargs)
            scores = compare(first_output(predict(*arrays, **named)), first_output(source(*arrays, **named)))
            total, count = total + float(scores.sum()), count + scores.size
        return total / count

    kind = "agreement" if classes else "cosine similarity"
    return replace(
        task,
        calibration=calibration,
        evaluate=evaluate,
        higher_is_better=True,
        metric_name=f"{kind} with {name}",
    )


@dataclass(frozen=True)
class _Calls:
    """Calls that start over on every pass."""

    start: Callable[[], Iterator[Call]]

    def __iter__(self) -> Iterator[Call]:
        return self.start()


@dataclass(frozen=True)
class _Part:
    """The calibration batches of a task that are (or are not) the last of every `every`."""

    task: Task
    every: int
    held_out: bool

    def _read(self) -> Iterator[Call]:
        for i, call in enumerate(calibration_calls(self.task)):
            if (i % self.every == self.every - 1) == self.held_out:
                yield call

    def __iter__(self) -> Iterator[Any]:
        return (as_inputs(call) for call in self._read())

    def calls(self) -> Iterable[Call]:
        return _Calls(self._read)


def _array(value: Any) -> Any:
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def _split_samples(call: Call, task: Task) -> tuple[Call, Call]:
    """Split a batch into (calibration, held-out) along the samples of every tensor."""
    fixed = task.dynamic is not None and not any(0 in axes for axes in task.dynamic.values())
    samples = size_of(call)
    if fixed or samples < 2:
        raise CalibrationError(
            "there is too little calibration data to hold out a part",
            code="too-little",
            got=f"one batch of {samples}" + (" and a fixed batch size" if fixed else ""),
            expected="two batches, or one batch of two samples",
            remedy="give more calibration data, or a metric: Task(evaluate=...)",
        )
    selected = torch.arange(samples) % _HELD_OUT == _HELD_OUT - 1
    selected[-1] |= not bool(selected.any())

    def cut(mask: torch.Tensor) -> Call:
        rows = mask.nonzero()[:, 0]
        return along_samples(call, task.dynamic, lambda value, axis: value.index_select(axis, rows))

    return cut(~selected), cut(selected)


def _same_class(mine: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    same = np.argmax(mine, axis=-1) == np.argmax(source, axis=-1)
    finite = np.isfinite(mine).all(axis=-1)  # argmax of NaN is a class, which must not count as agreement
    return np.asarray((same & finite).astype(np.float64)).reshape(-1)


def _cosine(mine: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows = source.shape[0] if source.ndim else 1
    a, b = (np.nan_to_num(x.astype(np.float64).reshape(rows, -1)) for x in (mine, source))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.linalg.norm(a, axis=1) == 0) & (np.linalg.norm(b, axis=1) == 0)
    cosine = (a * b).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)
    return np.asarray(np.where(both_zero, 1.0, cosine))
