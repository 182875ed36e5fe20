"""Task: what only the user knows. Its data, its metric, its loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.errors import CalibrationError, TaskError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one forward


@dataclass(frozen=True, kw_only=True)
class Task:
    """What only the user knows. All but `example` may be left out; a recipe asks for what it needs.

    Attributes:
        example: Example inputs of one forward, batch first: a tensor, a tuple of tensors, or a dict of
            keyword tensors. The batch size does not matter.
        calibration: Iterable of inputs, each of the same form as `example`, batched; no labels.
        train: Iterable of (inputs, target).
        evaluate: ``evaluate(predict) -> float``. `predict` maps NumPy inputs (called as the network is called)
            to NumPy outputs, in the structure that the network returns.
        select: Same form as `evaluate`; what search, rollback and repair look at, so that `evaluate` is read once.
        loss: ``loss(output, target) -> scalar tensor``.
        higher_is_better: Whether a larger metric is the better one.
        metric_name: How the metric is called in tables.
        dynamic: Axes that vary, input name (or position) → {axis: name}. None: axis 0 of every input is "batch".
            An empty dict: every axis is fixed to the example's size.
        name: How the task is called in tables.

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

    def call(self) -> Call:
        """The example as positional and keyword arguments."""
        return as_call(self.example)


def as_call(inputs: Any) -> Call:
    """Inputs in any of the accepted forms as (args, kwargs).

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}
