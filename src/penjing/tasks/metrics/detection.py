"""Mean average precision of detectors, as COCO defines it.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; the reference is pycocotools, with which the tests
compare: intersection over union from 0.5 to 0.95, all sizes, at most 100 boxes an image and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penjing.tasks.metrics.boxes import overlaps

Array = np.ndarray[Any, Any]

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # intersection over union from which a box counts as right
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Objects:
    """What an image holds.

    Attributes:
        boxes: (n, 4) left, top, right, bottom in pixels.
        labels: (n,) classes.
        crowd: (n,) whether a box is a crowd that may be found many times or not at all; none is one if left out.
    """

    boxes: Array
    labels: Array
    crowd: Array = field(default_factory=lambda: np.zeros(0, bool))

    def of(self, label: int) -> tuple[Array, Array]:
        """Return the boxes and crowds of a class."""
        rows = self.labels == label
        return self.boxes[rows], self.crowd[rows] if len(self.crowd) else np.zeros(int(rows.sum()), bool)


@dataclass(frozen=True)
class Detections:
    """What a detector finds in an image.

    Attributes:
        boxes: (n, 4) left, top, right, bottom in pixels.
        scores: (n,), the larger the surer.
        labels: (n,) classes.
    """

    boxes: Array
    scores: Array
    labels: Array

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            raise ValueError(f"{len(self.boxes)} boxes, {len(self.scores)} scores and {len(self.labels)} labels")


def mean_average_precision(
    detections: Sequence[Detections],
    truth: Sequence[Objects],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    max_detections: int = 100,
) -> float:
    """Mean over classes and thresholds of the average precision, from 0 to 1.

    Args:
        detections: Of every image.
        truth: Of the same images.
        thresholds: Intersections over union from which a box counts as right: (0.5,) gives mAP@0.5.
        max_detections: Best boxes of an image and class that count.

    Returns:
        NaN if the images hold no object.

    >>> box = np.array([[0.0, 0.0, 8.0, 8.0]])
    >>> one = Detections(box, np.array([0.9]), np.array([2]))
    >>> mean_average_precision([one], [Objects(box, np.array([2]))])
    1.0
    """
    table = average_precisions(detections, truth, thresholds=thresholds, max_detections=max_detections)
    return float(np.mean(list(table.values()))) if table else float("nan")


def average_precisions(
    detections: Sequence[Detections],
    truth: Sequence[Objects],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    max_detections: int = 100,
) -> dict[int, Array]:
    """Average precision of every class that the images hold: class → (thresholds,). Arguments as above."""
    if len(detections) != len(truth):
        raise ValueError(f"{len(detections)} images have detections, and {len(truth)} have a truth")
    limits = np.minimum(np.asarray(thresholds, np.float64), 1 - 1e-10)
    labels = sorted({int(label) for objects in truth for label in objects.labels})
    table = {}
    for label in labels:
        matched = [
            _matched(found, objects, label, limits, max_detections)
            for found, objects in zip(detections, truth, strict=True)
        ]
        count = sum(rows[3] for rows in matched)
        if count:
            scores, right, ignored = (np.concatenate([rows[part] for rows in matched], axis=-1) for part in range(3))
            order = np.argsort(-scores, kind="stable")
            table[label] = _precision(right[:, order], ignored[:, order], count)
    return table


def _matched(
    found: Detections, objects: Objects, label: int, limits: Array, most: int
) -> tuple[Array, Array, Array, int]:
    """Scores (n,), whether each box is right and whether it is ignored (thresholds, n), and the number of objects."""
    rows = np.flatnonzero(found.labels == label)
    rows = rows[np.argsort(-found.scores[rows], kind="stable")][:most]
    boxes, crowd = objects.of(label)
    order = np.argsort(crowd, kind="stable")  # a box goes to a crowd only if it fits nothing else
    boxes, crowd = boxes[order], crowd[order]
    right = np.zeros((len(limits), len(rows)), bool)
    ignored = np.zeros_like(right)
    if len(rows) and len(boxes):
        overlap = overlaps(np.asarray(found.boxes[rows], np.float64), np.asarray(boxes, np.float64), crowd)
        taken = np.zeros((len(limits), len(boxes)), bool)
        level = np.arange(len(limits))
        for place in np.flatnonzero(overlap.max(axis=1) >= limits.min()):
            fits = (overlap[place][None] >= limits[:, None]) & ~(taken & ~crowd)
            single = (fits & ~crowd).any(axis=1, keepdims=True)
            allowed = fits & np.where(single, ~crowd, True)
            # the last of equals, as in the reference
            best = len(boxes) - 1 - np.argmax(np.where(allowed, overlap[place], -1.0)[:, ::-1], axis=1)
            hit = allowed.any(axis=1)
            right[:, place], ignored[:, place] = hit & ~crowd[best], hit & crowd[best]
            taken[level[hit], best[hit]] = True
    return found.scores[rows], right, ignored, int((~crowd).sum())


def _precision(right: Array, ignored: Array, count: int) -> Array:
    """Precision at 101 recalls, averaged: (thresholds, n) flags in the order of the scores to (thresholds,)."""
    averages = np.zeros(len(right))
    for level, (hits, skips) in enumerate(zip(right, ignored, strict=True)):
        true, false = np.cumsum(hits), np.cumsum(~hits & ~skips)
        precision = true / np.maximum(true + false, np.spacing(1))
        best_after = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(true / count, _RECALLS, side="left")
        averages[level] = np.append(best_after, 0.0)[np.minimum(places, len(best_after))].mean()
    return averages
