"""Overlap of predicted and true masks, counted over all images: mean IoU and Dice."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def confusion(predicted: Array, truth: Array, classes: int, ignore: int | None = None) -> Array:
    """Count pixels by class: (classes, classes) int64, rows the truth, columns the prediction.

    Args:
        predicted: Classes, integers of any shape.
        truth: Classes of the same shape.
        classes: Their number.
        ignore: Value in the truth of pixels that don't count.

    Raises:
        ValueError: A class that counts is not one of them.
    """
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    for name, values in (("truth", truth[counted]), ("predicted", predicted[counted])):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"{name} holds classes from {values.min()} to {values.max()}, of {classes}")
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def intersections_over_unions(table: Array) -> Array:
    """Intersection over union of each class, (classes,); NaN for a class that is in neither truth nor prediction."""
    hits = np.diag(table).astype(np.float64)
    return _ratio(hits, table.sum(axis=0) + table.sum(axis=1) - hits)


def dices(table: Array) -> Array:
    """Dice coefficient (the F1 of pixels) of each class, (classes,); NaN for a class that is nowhere."""
    return _ratio(2.0 * np.diag(table), table.sum(axis=0) + table.sum(axis=1))


def mean_iou(table: Array) -> float:
    """Mean intersection over union of the classes that occur.

    >>> mean_iou(confusion(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), classes=3))
    0.5833333333333333
    """
    return float(np.nanmean(intersections_over_unions(table)))


def mean_dice(table: Array) -> float:
    """Mean Dice coefficient of the classes that occur."""
    return float(np.nanmean(dices(table)))


def _ratio(part: Array, whole: Array) -> Array:
    return np.asarray(np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0))
