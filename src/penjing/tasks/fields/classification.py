"""Classification of anything: images, texts, sounds, rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from penjing.errors import TaskError
from penjing.tasks.fields.field_task import Batches, Data, field_task
from penjing.tasks.fields.labelled import Metric, Predict, answer, called, integer_targets, pairs
from penjing.tasks.keywords import suggesting
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task


@suggesting
def classification(
    test: Any,
    *,
    output: Any = None,
    train: Any = None,
    select: Any = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 32,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "classification",
) -> Task:
    """Create a task whose metric is accuracy: the share of samples whose class has the largest score.

    Args:
        test: (inputs, classes), or batches of them. Several inputs are a dict or a tuple of arrays; classes (N,) are
            integers, in the order of the network's scores.
        output: The scores (N, classes): None is the first output, otherwise its name or number, or a function of the
            outputs.
        train: As `test`; for fine-tuning.
        select: As `test`.
        calibration: Inputs alone; None takes those of `train`.
        loss: ``loss(output, target)``; None is cross entropy on the first output.
        batch: Samples of a batch where data is given whole.
        dynamic: See `Task.dynamic`; texts of several lengths need it.
        name: Name of the task in tables.

    Raises:
        TaskError: Data is of another form, or while evaluating, scores are.

    >>> import numpy as np
    >>> task = classification((np.eye(3, dtype=np.float32), np.array([0, 1, 1])))
    >>> task.metric_name, round(task.evaluate(lambda x: x), 3)
    ('accuracy', 0.667)
    """

    def metric(batches: Batches, what: str) -> Metric:
        def evaluate(predict: Predict) -> float:
            right = count = 0
            for inputs, targets in pairs(batches, what):
                truth = integer_targets(targets, what=what, shape=(len(targets),))
                scores = answer(called(predict, inputs), output, what="accuracy")
                if scores.ndim != 2 or len(scores) != len(truth) or truth.max() >= scores.shape[1] or truth.min() < 0:
                    raise TaskError(
                        "accuracy needs one row of scores per sample, and one score per class",
                        code="scores",
                        got=f"scores of shape {scores.shape}; {len(truth)} classes from {truth.min()} to {truth.max()}",
                        expected=f"({len(truth)}, classes), with more classes than the largest target",
                        remedy="name the output: classification(..., output='logits'), or give a function",
                    )
                right += int((scores.argmax(axis=1) == truth).sum())
                count += len(truth)
            return right / count

        return evaluate

    data = Data(test=test, train=train, select=select, calibration=calibration, batch=batch, dynamic=dynamic, name=name)
    return field_task(data, metric, metric_name="accuracy", loss=loss or cross_entropy)


def cross_entropy(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the first output's last axis: (..., classes) and (...) classes; -100 doesn't count."""
    scores: torch.Tensor = first_output(output)
    return torch.nn.functional.cross_entropy(scores.flatten(0, -2), target.long().flatten(), ignore_index=-100)
