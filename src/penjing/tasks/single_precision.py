"""A task's inputs in float32, the precision of captured networks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from penjing.tasks.call import as_call, map_leaves
from penjing.tasks.task import Task

OTHERS = (torch.float16, torch.bfloat16, torch.float64)


def single_task(task: Task) -> Task:
    """Convert a task's floating-point data to float32, including the inputs of `predict`.

    Returns the task itself if its example already is float32.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(as_call(task.example)) if isinstance(leaf, torch.Tensor | np.ndarray)]
    if all(_single(leaf) is leaf for leaf in inputs):
        return task

    def metric(evaluate: Callable[..., float] | None) -> Callable[..., float] | None:
        if evaluate is None:
            return None

        @functools.wraps(evaluate)
        def evaluated(predict: Callable[..., Any]) -> float:
            return evaluate(lambda *args, **kwargs: predict(*map_leaves(_single, args), **map_leaves(_single, kwargs)))

        return evaluated

    return dataclasses.replace(
        task,
        example=map_leaves(_single, task.example),
        calibration=None if task.calibration is None else _Data(task.calibration),
        train=None if task.train is None else _Data(task.train),
        evaluate=metric(task.evaluate),
        select=metric(task.select),
    )


class _Data:
    """Batches in float32; everything else is delegated to the original data."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (map_leaves(_single, batch) for batch in self.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)


def _single(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in OTHERS else value
    if isinstance(value, np.ndarray):
        other = value.dtype.kind == "f" and value.dtype != np.float32
        return value.astype(np.float32) if other or value.dtype.name == "bfloat16" else value
    return value
