"""From labelled data, a metric and a loss to the `Task` of a field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from penjing.tasks.fields.labelled import Metric, calibration_of, example_of, labelled
from penjing.tasks.task import Task

Batches = Iterable[tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a field's task, in the form of `labelled`; all but `test` may be None.

    Attributes:
        test: Read once, for the verdict.
        train: For fine-tuning, and for calibration if there is none.
        select: What search, rollback and repair look at.
        calibration: Inputs alone: arrays, or batches.
        batch: Samples of a batch where data is given whole.
        dynamic: See `Task.dynamic`.
        name: Name of the task in tables.
    """

    test: Any
    train: Any = None
    select: Any = None
    calibration: Any = None
    batch: int = 32
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None
    name: str = "task"


def field_task(
    data: Data,
    metric: Callable[[Batches, str], Metric],
    *,
    metric_name: str,
    loss: Callable[[Any, Any], Any] | None,
    calibration_samples: int = 512,
) -> Task:
    """Create the task.

    Args:
        data: Its data.
        metric: From batches, and the name of the argument that they came from, to ``evaluate(predict) -> float``.
        metric_name: Name of the metric; more is better.
        loss: ``loss(output, target)``.
        calibration_samples: Samples of the training data that calibrate if no other data does.

    Raises:
        TaskError: Data is of another form than its field needs.
    """
    test = labelled(data.test, data.batch, what="test")
    train = None if data.train is None else labelled(data.train, data.batch, what="train", shuffled=True)
    select = None if data.select is None else labelled(data.select, data.batch, what="select")
    return Task(
        example=example_of(test, "test"),
        calibration=calibration_of(data.calibration, train, data.batch, calibration_samples),
        train=train,
        evaluate=metric(test, "test"),
        select=None if select is None else metric(select, "select"),
        loss=loss,
        higher_is_better=True,
        metric_name=metric_name,
        dynamic=data.dynamic,
        name=data.name,
    )
