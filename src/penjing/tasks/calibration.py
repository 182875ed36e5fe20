"""Calibration data: read batch by batch and checked against the task's example."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from penjing.errors import CalibrationError
from penjing.tasks.call import Call, as_call, leaves, map_leaves, to_tensors

Dynamic = Mapping[str | int, Mapping[int, str]] | None
_AGAIN = "give a list, a DataLoader, or an object whose __iter__ starts over"
_started: weakref.WeakSet[Any] = weakref.WeakSet()  # one-shot iterators that have been read from


def checked_calls(batches: Iterable[Any], example: Call, dynamic: Dynamic, limit: int | None = None) -> Iterator[Call]:
    """Yield each batch as a call of tensors, in the example's types, after checking it.

    A batch has the example's inputs, the same kind of numbers, the same rank, the same sizes on every axis that is
    not dynamic, only finite values and at least one sample. A type of the same kind (float64 for float32) is cast.

    Args:
        batches: The calibration data in the form of the example.
        example: The example's call, of tensors.
        dynamic: Axes that vary (see `Task.dynamic`).
        limit: Most batches to read; None reads all.

    Raises:
        CalibrationError: A batch does not match; the error names the batch and the input.
    """
    iterator = _restart(batches)
    count = 0
    while limit is None or count < limit:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        yield _checked(batch, count, example, dynamic)
        count += 1
    if count == 0 and limit != 0:
        raise _empty(batches, one_shot=iterator is batches)


def _restart(batches: Iterable[Any]) -> Iterator[Any]:
    try:
        iterator = iter(batches)
    except TypeError:
        raise CalibrationError(
            "the calibration data can't be iterated",
            code="not-iterable",
            got=type(batches).__name__,
            expected="an iterable of batches",
            remedy="give a list of batches or a DataLoader; a single batch as [batch]",
        ) from None
    if iterator is batches:  # a generator, map or file can be read only once
        try:
            if iterator in _started:
                raise _exhausted(batches)
            _started.add(iterator)
        except TypeError:  # map and zip have no weak references; an empty second pass still reveals it
            pass
    return iterator


def _exhausted(batches: Any) -> CalibrationError:
    return CalibrationError(
        "the calibration data can be read only once, and has been read",
        code="read-once",
        got=f"a {type(batches).__name__}",
        expected="data that starts over on every pass (ranges, metric and record each read it)",
        remedy=_AGAIN,
    )


def _empty(batches: Any, *, one_shot: bool) -> CalibrationError:
    seen = one_shot and not hasattr(batches, "gi_frame")  # for a map or zip it is unknown whether it was read before
    return CalibrationError(
        "the calibration data is empty" + (", or was read before" if seen else ""),
        code="empty-or-read" if seen else "empty",
        got=f"no batch in a {type(batches).__name__}",
        expected="at least one batch of inputs (a few hundred samples are usual)",
        remedy=_AGAIN if seen else "check the loader's path and filters",
    )


def _checked(batch: Any, index: int, example: Call, dynamic: Dynamic) -> Call:
    call = as_call(batch)
    where = f"calibration batch {index}"
    _check_names(batch, call, where, example)
    try:
        call = to_tensors(call)
    except CalibrationError as error:
        raise CalibrationError(
            f"{where} holds no numbers", code="no-numbers", got=error.got, expected=error.expected, remedy=error.remedy
        ) from None
    examples = {name: (key, value) for key, name, value in leaves(example)}
    values = {name: value for _, name, value in leaves(call)}
    if values.keys() != examples.keys():
        raise CalibrationError(
            f"{where} is nested differently from the example",
            code="nesting",
            got=", ".join(values) or "nothing",
            expected=", ".join(examples),
            remedy="give every batch in the form of Task.example",
        )
    ready = []
    for name, value in values.items():
        key, like = examples[name]
        place = f"{where}, {name}"
        if isinstance(like, torch.Tensor):
            _check_tensor(place, value, like, _free_axes(dynamic, key, example))
            ready.append(value.to(like.dtype))
        else:
            _check_constant(place, value, like)
            ready.append(value)
    source = iter(ready)  # leaves and map_leaves have the same order
    args = tuple(map_leaves(lambda _: next(source), arg) for arg in call[0])
    kwargs = {name: map_leaves(lambda _: next(source), value) for name, value in call[1].items()}
    return args, {name: kwargs[name] for name in example[1]}


def _check_names(batch: Any, call: Call, where: str, example: Call) -> None:
    args, kwargs = call
    if len(args) == len(example[0]) and kwargs.keys() == example[1].keys():
        return
    one_more = len(args) == len(example[0]) + 1 and not kwargs and not example[1]
    nested = len(args) == 2 and isinstance(args[0], Mapping | tuple | list)
    labelled = "labels" in kwargs or "label" in kwargs
    if one_more or nested:
        remedy = "this looks like (inputs, target) of a training loader: leave the target out, " + (
            "for example [inputs for inputs, _ in loader]"
        )
    elif labelled:
        remedy = "calibration needs no labels: leave them out of the batch, or put them into Task.example as well"
    else:
        remedy = "give every batch in the form of Task.example"
    raise CalibrationError(
        f"{where} has different inputs from the example",
        code="inputs",
        got=_names(call) + (f" in a {type(batch).__name__}" if args else ""),
        expected=_names(example),
        remedy=remedy,
    )


def _names(call: Call) -> str:
    args, kwargs = call
    words = [f"{len(args)} positional input{'s' if len(args) != 1 else ''}"] if args or not kwargs else []
    return " and ".join(words + ([f"keywords {', '.join(map(str, kwargs))}"] if kwargs else []))


def _check_constant(place: str, value: Any, want: Any) -> None:
    same = type(value) is type(want) and bool(np.all(value == want))
    if not same:
        raise CalibrationError(
            f"{place} differs from the example, and is not a tensor",
            code="constant",
            got=repr(value)[:80],
            expected=repr(want)[:80],
            remedy="what is not a tensor is fixed when the network is exported; give it as a tensor if it varies",
        )


def _check_tensor(place: str, value: Any, want: torch.Tensor, free: frozenset[int]) -> None:
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(
            f"{place} is not a tensor",
            code="not-a-tensor",
            got=type(value).__name__,
            expected=f"a tensor or NumPy array of {_type(want)}",
            remedy="stack the samples of a batch into one array first",
        )
    if _kind(value) != _kind(want):
        raise CalibrationError(
            f"{place} has a different dtype",
            code="dtype",
            got=_type(value),
            expected=_type(want),
            remedy="preprocess it as for training: images as scaled floats, token ids as integers",
        )
    fits = value.dim() == want.dim() and all(
        a == b or i in free for i, (a, b) in enumerate(zip(value.shape, want.shape, strict=True))
    )
    if not fits:
        expected = ", ".join("any" if i in free else str(n) for i, n in enumerate(want.shape))
        missing_batch = list(value.shape) == list(want.shape)[1:]
        remedy = "preprocess it like the example; name axes that vary in Task.dynamic"
        if missing_batch:
            remedy = "stack the samples into a batch: axis 0 is the batch"
        elif value.dim() == want.dim() and all(
            a == b or i in free or i == 0 for i, (a, b) in enumerate(zip(value.shape, want.shape, strict=True))
        ):
            remedy = (
                "Task.dynamic has to name axis 0 as well, the number of samples, beside other axes that vary: "
                "{0: 'batch', …}; or give batches of the example's size"
            )
        raise CalibrationError(
            f"{place} has a different shape",
            code="shape",
            got=f"({', '.join(map(str, value.shape))})",
            expected=f"({expected})",
            remedy=remedy,
        )
    if value.numel() == 0:
        raise CalibrationError(
            f"{place} holds no sample",
            code="no-sample",
            got=f"shape ({', '.join(map(str, value.shape))})",
            expected="at least one sample",
            remedy="drop empty batches",
        )
    if value.is_floating_point() or value.is_complex():
        bad = ~torch.isfinite(value)
        if bad.any():
            spot = tuple(int(i) for i in bad.nonzero()[0])
            raise CalibrationError(
                f"{place} holds values that are not finite",
                code="not-finite",
                got=f"{int(bad.sum())} of {value.numel()}, the first is {value[spot].item()} at {list(spot)}",
                expected="finite numbers",
                remedy="drop or fix these samples: a single infinity would determine the range",
            )


def _free_axes(dynamic: Dynamic, key: str | int, example: Call) -> frozenset[int]:
    """Axes of an input whose size may differ from the example's."""
    if dynamic is None:
        return frozenset({0})
    if key in dynamic:
        return frozenset(dynamic[key])
    if isinstance(key, str):
        position = len(example[0]) + list(example[1]).index(key)
        return frozenset(dynamic.get(position, ()))
    # a positional input may be named by the forward's parameter, which is not known here
    unplaced = [axes for name, axes in dynamic.items() if isinstance(name, str) and name not in example[1]]
    return frozenset(axis for axes in unplaced for axis in axes)


def _kind(value: torch.Tensor) -> str:
    if value.is_complex():
        return "complex"
    if value.is_floating_point():
        return "float"
    return "bool" if value.dtype == torch.bool else "integer"


def _type(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
