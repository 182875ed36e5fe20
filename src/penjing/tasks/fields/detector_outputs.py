"""What a detector's outputs say of every image: raw rows, boxes that are chosen already, or what the user decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.tasks.fields.labelled import answer

Array = np.ndarray[Any, Any]
Decoded = tuple[Array, Array, Array]  # boxes (n, 4) in a convention, scores (n,), labels (n,)
Decode = Callable[[Any], Sequence[Decoded]]

_MOST = 1000  # best scores of an image that are looked at


@dataclass(frozen=True)
class Reading:
    """What is read of a batch.

    Attributes:
        images: Boxes, scores and labels of every image; of a user's `decode` unchecked.
        convention: Of the boxes.
        suppressed: Whether boxes that overlap a better one are dropped already.
    """

    images: Sequence[Decoded]
    convention: str
    suppressed: bool


@dataclass(frozen=True)
class Reader:
    """From outputs to boxes, scores and labels.

    Attributes:
        boxes: Convention of the network's boxes.
        objectness: Whether a row holds, behind the box, a score that multiplies those of the classes.
        score_threshold: Least score that counts.
        decode: The user's own function, which does all of this.
    """

    boxes: str
    objectness: bool
    score_threshold: float
    decode: Decode | None

    def __call__(self, outputs: Any) -> Reading:
        """Read a batch.

        Raises:
            TaskError: The outputs are of none of these forms.
        """
        if self.decode is not None:
            return Reading(self.decode(outputs), self.boxes, True)
        if isinstance(outputs, Mapping) and {"boxes", "scores", "classes"} <= set(outputs):
            # Corners, whatever the wrapped network gives; its unit, pixels or parts of the image, stays.
            unit = self.boxes.partition(" ")[2]
            return Reading(self._selected(outputs), f"xyxy {unit}".strip(), True)
        return Reading([self._best(rows) for rows in self._rows(outputs)], self.boxes, False)

    def _selected(self, outputs: Mapping[str, Any]) -> list[Decoded]:
        """The real ones of boxes (N, n, 4), scores (N, n) and classes (N, n), which are padded behind them."""
        names = ("boxes", "scores", "classes")
        boxes, scores, classes = (answer(outputs, name, what="mAP") for name in names)
        if boxes.shape != (*scores.shape, 4) or classes.shape != scores.shape:
            raise TaskError(
                "the network's outputs are not boxes that are selected already",
                code="selected",
                got=", ".join(f"{name} {np.shape(outputs[name])}" for name in names),
                expected="boxes (images, n, 4), scores (images, n) and classes (images, n), as of pj.postprocess",
                remedy="give decode=, a function from the outputs to (boxes, scores, labels) of every image",
            )
        real = (classes >= 0) & (scores > self.score_threshold)
        return [
            (box[rows].astype(np.float64), score[rows].astype(np.float64), label[rows])
            for box, score, label, rows in zip(boxes, scores, classes, real, strict=True)
        ]

    def _rows(self, outputs: Any) -> Array:
        """One row a box, (images, rows, 4 + classes) float64."""
        apart = isinstance(outputs, tuple | list | Mapping) and len(outputs) >= 2
        rows = answer(outputs, 0, what="mAP")
        if apart:
            scores = answer(outputs, 1, what="mAP")
            if rows.ndim != 3 or rows.shape[-1] != 4 or scores.ndim != 3 or scores.shape[:2] != rows.shape[:2]:
                raise TaskError(
                    "the network's first two outputs are not boxes and scores",
                    code="rows",
                    got=f"shapes {rows.shape} and {scores.shape}",
                    expected="(images, rows, 4) and (images, rows, classes), in this order",
                    remedy="give decode=, a function from the outputs to (boxes, scores, labels) of every image",
                )
            rows = np.concatenate([rows, scores], axis=-1)
        if rows.ndim != 3 or rows.shape[-1] < 5 + self.objectness:
            raise TaskError(
                "the network's output is not boxes and scores",
                code="rows",
                got=f"shape {rows.shape}",
                expected=f"(images, rows, 4 {'+ 1 ' if self.objectness else ''}+ classes)",
                remedy="give decode=, a function from the outputs to (boxes, scores, labels) of every image",
            )
        return rows.astype(np.float64)

    def _best(self, rows: Array) -> Decoded:
        scores = rows[:, 4:] if not self.objectness else rows[:, 5:] * rows[:, 4:5]
        cells, labels = np.nonzero(scores > self.score_threshold)
        values = scores[cells, labels]
        best = np.argsort(-values, kind="stable")[:_MOST]
        return rows[cells[best], :4], values[best], labels[best]
