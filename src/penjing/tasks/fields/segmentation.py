"""Semantic segmentation: mean IoU or Dice over all pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from penjing.errors import TaskError
from penjing.tasks.fields.field_task import Batches, Data, field_task
from penjing.tasks.fields.labelled import Metric, Predict, answer, called, integer_targets, pairs
from penjing.tasks.keywords import suggesting
from penjing.tasks.metrics.segmentation import confusion, mean_dice, mean_iou
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task

Array = np.ndarray[Any, Any]

_METRICS = {"miou": ("mean IoU", mean_iou), "dice": ("mean Dice", mean_dice)}


@suggesting
def segmentation(
    test: Any,
    *,
    classes: int,
    metric: str = "miou",
    ignore: int | None = 255,
    output: Any = None,
    train: Any = None,
    select: Any = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 16,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "segmentation",
) -> Task:
    """Create a segmentation task, whose metric is mean IoU or Dice over the classes that occur.

    Args:
        test: (images, masks), or batches of them. Masks (N, height, width) are integers from 0 to classes - 1.
        classes: Their number, with the background.
        metric: "miou" or "dice".
        ignore: Value of pixels that don't count; None counts all.
        output: What the metric reads: None is the first output, otherwise a name or number, or a function of the
            outputs. It is scores (N, classes, height, width), with two classes also (N, 1, height, width), where
            above 0 is class 1; or classes (N, height, width) as integers.
        train: As `test`; for fine-tuning.
        select: As `test`.
        calibration: Images alone; None takes those of `train`.
        loss: ``loss(output, target)``; None is cross entropy plus one minus the mean soft Dice, on the first output.
        batch: Images of a batch where data is given whole.
        dynamic: See `Task.dynamic`.
        name: Name of the task in tables.

    Raises:
        TaskError: Masks hold another class, or have another size than the network's answers.
    """
    if metric not in _METRICS:
        raise TaskError(
            "the metric of a segmentation is not known",
            code="metric",
            got=repr(metric),
            expected=" or ".join(f'"{word}"' for word in _METRICS),
        )
    metric_name, average = _METRICS[metric]

    def counted(batches: Batches, what: str) -> Metric:
        count = 0
        for _, masks in pairs(batches, what):
            truth = integer_targets(masks, what=what)
            _check(truth, classes, ignore, what)
            count += int((truth != ignore).sum())
        if not count:
            raise TaskError(
                f"no pixel of {what} counts",
                code="masks",
                got=f"masks of {ignore} alone",
                expected=f"classes from 0 to {classes - 1}",
                remedy="write segmentation(..., ignore=None) if that is a class",
            )

        def evaluate(predict: Predict) -> float:
            table = np.zeros((classes, classes), np.int64)
            low, high = np.inf, -np.inf  # of single scores
            for images, masks in pairs(batches, what):
                truth = integer_targets(masks, what=what)
                answers = answer(called(predict, images), output, what=metric_name)
                table += confusion(_labels(answers, classes, truth.shape), truth, classes, ignore)
                if answers.ndim == 4 and answers.shape[1] == 1:
                    low, high = min(low, float(answers.min())), max(high, float(answers.max()))
            _check_scores(low, high)
            return average(table)

        return evaluate

    data = Data(test=test, train=train, select=select, calibration=calibration, batch=batch, dynamic=dynamic, name=name)
    return field_task(data, counted, metric_name=metric_name, loss=loss or _Loss(classes, ignore))


def _check(truth: Array, classes: int, ignore: int | None, what: str) -> None:
    strange = np.setdiff1d(np.unique(truth), [*range(classes), *([] if ignore is None else [ignore])])
    if truth.ndim == 3 and not len(strange):
        return
    raise TaskError(
        f"the masks of {what} are not classes of pixels",
        code="masks",
        got=f"shape {truth.shape}" + (f", with the values {', '.join(map(str, strange[:8]))}" if len(strange) else ""),
        expected=f"(images, height, width), with values from 0 to {classes - 1}"
        + ("" if ignore is None else f", or {ignore} where a pixel does not count"),
        remedy="masks of 0 and 255: write (mask > 127).astype(int); one-hot masks: mask.argmax(axis=1)"
        if len(strange)
        else "stack the masks of a batch along axis 0, without a channel axis",
    )


def _check_scores(low: float, high: float) -> None:
    """Refuse single scores, from `low` to `high`, that are probabilities: all of them are above 0."""
    if 0 <= low < 0.5 < high <= 1:
        raise TaskError(
            "the network's answers are probabilities, of which none is below 0",
            code="probabilities",
            got=f"one score a pixel, from {low:.3g} to {high:.3g}",
            expected="above 0 where a pixel is of class 1, otherwise below",
            remedy="write segmentation(..., output=lambda outputs: outputs - 0.5)",
        )


def _labels(answers: Array, classes: int, shape: tuple[int, ...]) -> Array:
    """Classes (N, height, width) from scores, or as they are."""
    if answers.ndim == 4 and answers.shape[1] == classes:
        found = answers.argmax(axis=1)
    elif answers.ndim == 4 and answers.shape[1] == 1 and classes == 2:
        found = (answers[:, 0] > 0).astype(np.int64)
    elif answers.ndim == 3 and answers.dtype.kind in "iub":
        found = answers
    else:
        found = np.zeros(0)
    if found.shape != shape or (found.size and not 0 <= found.min() <= found.max() < classes):
        raise TaskError(
            "the network's answers do not fit the masks",
            code="scores",
            got=f"{answers.dtype} of shape {answers.shape}, for masks of shape {shape} with {classes} classes",
            expected=f"scores ({shape[0]}, {classes}, {', '.join(map(str, shape[1:]))}), or integer classes {shape}",
            remedy="give output=, a function that resizes the scores to the masks",
        )
    return np.asarray(found)


class _Loss:
    """Cross entropy plus one minus the mean soft Dice of the classes.

    Milletari et al., "V-Net", 3DV 2016, in the multi-class form.
    """

    def __init__(self, classes: int, ignore: int | None) -> None:
        self.classes, self.ignore = classes, -100 if ignore is None else ignore

    def __call__(self, output: Any, target: torch.Tensor) -> torch.Tensor:
        """Scores (N, classes or 1, H, W) and classes (N, H, W) to a scalar."""
        scores: torch.Tensor = first_output(output).float()
        target = target.long()
        if scores.shape[1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
        entropy = torch.nn.functional.cross_entropy(scores, target, ignore_index=self.ignore)
        counted = (target != self.ignore)[:, None]
        right = torch.nn.functional.one_hot(target.where(counted[:, 0], 0), self.classes).movedim(-1, 1) * counted
        found = scores.softmax(dim=1) * counted
        shared, both = (found * right).sum((0, 2, 3)), found.sum((0, 2, 3)) + right.sum((0, 2, 3))
        return entropy + 1 - ((2 * shared + 1) / (both + 1)).mean()
