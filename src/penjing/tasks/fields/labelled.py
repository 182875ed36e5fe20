"""Labelled data in the forms that the fields accept, as batches that start over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penjing.errors import TaskError
from penjing.tasks.call import as_call, leaves, map_leaves
from penjing.tasks.outputs import first_output, flatten_outputs, output_names, to_numpy

Array = np.ndarray[Any, Any]
Predict = Callable[..., Any]
Metric = Callable[[Predict], float]


@dataclass(frozen=True)
class Whole:
    """All samples at once, cut into batches.

    Attributes:
        inputs: An array, or a tuple or dict of arrays, with the samples on axis 0.
        targets: One per sample: an array or a list.
        size: Samples of a batch.
        shuffled: Whether every pass has another order, from torch's global generator.
    """

    inputs: Any
    targets: Any
    size: int
    shuffled: bool = False

    def __len__(self) -> int:
        return -(-sample_count(self.inputs) // self.size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        count = sample_count(self.inputs)
        order = torch.randperm(count).numpy() if self.shuffled else np.arange(count)
        for start in range(0, count, self.size):
            rows = order[start : start + self.size]
            yield map_leaves(_taking(rows), self.inputs), _some(self.targets, rows)


@dataclass(frozen=True)
class Inputs:
    """The inputs of labelled batches, for calibration: whole batches until `most` samples are reached."""

    batches: Iterable[tuple[Any, Any]]
    most: int

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for inputs, _ in self.batches:
            yield inputs
            seen += sample_count(inputs)
            if seen >= self.most:
                return


def labelled(data: Any, batch: int, *, what: str, shuffled: bool = False) -> Iterable[tuple[Any, Any]]:
    """Batches of (inputs, targets) from a tuple (all inputs, all targets), or from batches themselves.

    Args:
        data: A tuple of two: everything at once, with one target per sample. Otherwise an iterable of batches, such as
            a list or a DataLoader, that starts over on every pass.
        batch: Samples of a batch where the data is whole.
        what: Name of the argument, for errors.
        shuffled: Whether whole data is put in another order on every pass.

    Raises:
        TaskError: The data is of another form, or inputs and targets differ in number.
    """
    if isinstance(data, tuple) and len(data) == 2:
        inputs, targets = data
        counts = {path: len(value) for _, path, value in leaves(as_call(inputs)) if np.ndim(value)}
        expected = len(targets)
        wrong = {path: count for path, count in counts.items() if count != expected}
        if wrong or not counts or not expected:
            raise TaskError(
                f"{what} has another number of inputs than of targets" if expected else f"{what} is empty",
                code="lengths" if expected else "empty",
                got=", ".join(f"{path}: {count} samples" for path, count in counts.items()) + f"; {expected} targets",
                expected="one target per sample, samples on axis 0, at least one",
                remedy="give (inputs, targets) of the same samples, in the same order",
            )
        return Whole(inputs, targets, batch, shuffled)
    if isinstance(data, np.ndarray | torch.Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TaskError(
            f"{what} holds no targets",
            code="no-targets",
            got=type(data).__name__,
            expected="a tuple (inputs, targets), or an iterable of such batches",
            remedy=f"write {what}=(inputs, targets)",
        )
    if iter(data) is data:
        raise TaskError(
            f"{what} can be read only once",
            code="read-once",
            got=f"a {type(data).__name__}",
            expected="data that starts over on every pass: the metric is read for every candidate",
            remedy="give a list, a DataLoader, or an object whose __iter__ starts over",
        )
    return data


def pairs(batches: Iterable[tuple[Any, Any]], what: str) -> Iterator[tuple[Any, Any]]:
    """Iterate batches with arrays in the place of tensors, after checking their form."""
    empty = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TaskError(
                f"a batch of {what} is not (inputs, targets)",
                code="no-targets",
                got=f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else ""),
                expected="a tuple of two: the inputs, and one target per sample",
                remedy="several inputs go into a tuple or dict of their own: ((ids, mask), targets)",
            )
        inputs, targets = batch
        count = sample_count(inputs)
        if len(targets) != count:
            raise TaskError(
                f"a batch of {what} has another number of inputs than of targets",
                code="lengths",
                got=f"{count} samples and {len(targets)} targets",
                expected="one target per sample",
            )
        empty = False
        yield map_leaves(_as_array, inputs), _numbers(targets)
    if empty:
        raise TaskError(f"{what} is empty", code="empty", got="no batch", expected="at least one batch")


def called(predict: Predict, inputs: Any) -> Any:
    """Call `predict` with inputs in any accepted form."""
    args, kwargs = as_call(inputs)
    return predict(*args, **kwargs)


def example_of(batches: Iterable[tuple[Any, Any]], what: str) -> Any:
    """The first one or two samples' inputs."""
    inputs, _ = next(pairs(batches, what))
    return map_leaves(lambda array: array[:2], inputs)


def answer(outputs: Any, output: Any, *, what: str, infinite: bool = True) -> Array:
    """The output that the metric reads: the first, the one of a name or number, or what a function makes of them.

    Raises:
        TaskError: There is no such output, or it holds NaN; or infinite values, where the metric can't read them.
    """
    if callable(output):
        value = np.asarray(output(outputs))
    elif output is None:
        value = np.asarray(first_output(outputs))
    else:
        every, structure = flatten_outputs(outputs)
        names = output_names(structure)
        if isinstance(output, int) and -len(every) <= output < len(every):
            value = np.asarray(every[output])
        elif output in names:
            value = np.asarray(every[names.index(output)])
        else:
            raise TaskError(
                f"the network has no output {output!r}",
                code="output",
                got=", ".join(names),
                expected="the name or the number of an output, or a function of the outputs",
                remedy=f"write output={names[0]!r}",
            )
    strange = np.isnan if infinite else _not_finite
    if value.dtype.kind == "f" and strange(value).any():
        raise TaskError(
            f"{what} can't be computed: the outputs hold {'NaN' if infinite else 'values that are not finite'}",
            code="not-finite",
            got=f"{int(strange(value).sum())} of {value.size} values",
            expected="numbers",
            remedy="find the first layer that gives NaN: penjing inspect SOURCE --task TASK",
        )
    return value


def calibration_of(
    calibration: Any, train: Iterable[tuple[Any, Any]] | None, batch: int, most: int
) -> Iterable[Any] | None:
    """Calibration batches: those given (arrays are cut into batches), or the first inputs of the training data."""
    if isinstance(calibration, np.ndarray | torch.Tensor | Mapping | tuple):
        count = sample_count(calibration)
        return Inputs(Whole(calibration, np.zeros(count), batch), count)
    if calibration is None and train is not None:
        return Inputs(Whole(train.inputs, train.targets, batch) if isinstance(train, Whole) else train, most)
    return calibration  # type: ignore[no-any-return]


def sample_count(inputs: Any) -> int:
    """Number of samples of inputs in any accepted form, from the first array's axis 0."""
    return next(len(value) for _, _, value in leaves(as_call(inputs)) if np.ndim(value))


def _not_finite(value: Array) -> Array:
    return ~np.isfinite(value)


def _taking(rows: Array) -> Callable[[Any], Any]:
    return lambda array: _as_array(array)[rows]


def _some(targets: Any, rows: Array) -> Any:
    return targets[rows] if isinstance(targets, np.ndarray | torch.Tensor) else [targets[row] for row in rows]


def _as_array(value: Any) -> Any:
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def _numbers(targets: Any) -> Any:
    if isinstance(targets, torch.Tensor | np.ndarray):
        return _as_array(targets)
    if isinstance(targets, Mapping):
        return map_leaves(_as_array, targets)
    return [map_leaves(_as_array, target) for target in targets]


def integer_targets(targets: Any, *, what: str, shape: Sequence[int] | None = None) -> Array:
    """Targets as integers, checked: whole numbers, and of a shape if one is given.

    Raises:
        TaskError: They are of another kind or shape.
    """
    array = np.asarray(targets)
    if array.dtype.kind not in "iub" or (shape is not None and array.shape != tuple(shape)):
        raise TaskError(
            f"the targets of {what} are not classes",
            code="targets",
            got=f"{array.dtype} of shape {array.shape}",
            expected="integers" + (f" of shape {tuple(shape)}" if shape is not None else ""),
            remedy="one-hot rows: targets.argmax(axis=-1); text: numbers in the order of the network's outputs",
        )
    return array.astype(np.int64)
