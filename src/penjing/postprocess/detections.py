"""Non-maximum suppression inside the artifact: a fixed number of boxes, scores and classes, and how many are real."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import SourceError, UsageError
from penjing.numerics.suppression import best_boxes
from penjing.postprocess import conventions
from penjing.sources.modules import as_module
from penjing.tasks.outputs import flatten_outputs

Decode = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
_SCORES = ("classes", "objectness")


class Detections(nn.Module):
    """A detector whose artifact gives the boxes that remain, not every candidate.

    The wrapped network is pruned, trained and quantized as without the wrapper; decoding and suppression stay in
    floating point. Suppression is ONNX's NonMaxSuppression, within each class: of boxes that overlap, the best remains.

    Its outputs have a fixed size, padded behind the real ones: ``boxes`` (batch, max_detections, 4) as left, top,
    right, bottom; ``scores`` (batch, max_detections), the best first; ``classes`` (batch, max_detections) int64; and
    ``count`` (batch,) int64, how many are real. Padding has boxes and scores of 0 and class −1.

    Args:
        network: A module or SOURCE. It gives boxes (batch, n, 4) and scores (batch, n, classes) as two outputs, or one
            tensor with the box in its first four columns and scores behind it.
        boxes: What four numbers are: "xyxy", "yxyx", "xywh" or "cxcywh" (centre).
        scores: "classes", or "objectness": the first score is the box's own, and multiplies the classes'.
        axis: Axis of the columns of a single output: −1, or 1 for (batch, columns, n).
        decode: What turns the network's outputs into boxes and scores, such as `GridBoxes`; `scores` and `axis` do not
            matter then.
        score_threshold: Boxes of at most this score are dropped.
        iou_threshold: Intersection over union above which the worse of two boxes is dropped.
        max_detections: Boxes of a sample that are given.
        class_agnostic: Every box has its best class alone, and boxes of different classes suppress each other.

    Raises:
        UsageError: A setting is out of its range.
    """

    def __init__(
        self,
        network: nn.Module | str | Path,
        *,
        boxes: str = "xyxy",
        scores: str = "classes",
        axis: int = -1,
        decode: Decode | None = None,
        score_threshold: float = 0.25,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        _require("scores", scores, scores in _SCORES, f"one of {', '.join(_SCORES)}")
        _require("axis", axis, axis in (-1, 1, 2), "-1 for (batch, n, columns), or 1 for (batch, columns, n)")
        _require("score_threshold", score_threshold, math.isfinite(score_threshold), "a number")
        _require("iou_threshold", iou_threshold, 0 <= iou_threshold <= 1, "a number from 0 to 1")
        _require("max_detections", max_detections, 1 <= max_detections <= 1 << 16, "a whole number from 1 to 65,536")
        self.network = as_module(network)
        self.boxes, self.scores, self.axis, self.decode = conventions.known(boxes), scores, axis, decode
        self.score_threshold, self.iou_threshold = float(score_threshold), float(iou_threshold)
        self.max_detections, self.class_agnostic = int(max_detections), bool(class_agnostic)
        self.train(self.network.training)

    def forward(self, image: torch.Tensor, *more: Any, **named: Any) -> dict[str, torch.Tensor]:
        """Return boxes, scores, classes and count; see the class.

        Raises:
            SourceError: The network's outputs are not boxes and scores, or the boxes look like another convention.
        """
        boxes, scores = self._read(self.network(image, *more, **named))
        if not torch.compiler.is_compiling():  # looks at values
            conventions.check(boxes[scores.amax(-1) > self.score_threshold], self.boxes)
        boxes, scores = conventions.corners(boxes, self.boxes), scores.transpose(1, 2)
        kinds = None
        if self.class_agnostic:
            scores, kinds = scores.max(1, keepdim=True)
        n = boxes.shape[1]
        best = best_boxes(boxes, scores, self.max_detections, self.iou_threshold, self.score_threshold)
        real, at = best >= 0, best.clamp(min=0)
        place = at % n
        kind = torch.div(at, n, rounding_mode="floor") if kinds is None else kinds.flatten(1).gather(1, place)
        sides = [side.gather(1, place) * real for side in boxes.unbind(-1)]
        result = {
            "boxes": torch.stack(sides, -1),
            "scores": scores.flatten(1).gather(1, at) * real,
            "classes": torch.where(real, kind, -1),
        }
        missing = self.max_detections - best.shape[1]
        if missing > 0:
            result = {
                "boxes": F.pad(result["boxes"], (0, 0, 0, missing)),
                "scores": F.pad(result["scores"], (0, missing)),
                "classes": F.pad(result["classes"], (0, missing), value=-1),
            }
        return {**result, "count": real.sum(1)}

    def _read(self, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (batch, n, 4) and scores (batch, n, classes)."""
        if self.decode is not None:
            outputs = self.decode(outputs)
        if isinstance(outputs, Mapping) and {"boxes", "scores"} <= set(outputs):
            outputs = outputs["boxes"], outputs["scores"]
        leaves = flatten_outputs(outputs)[0]
        if len(leaves) == 1 and self.decode is None and leaves[0].dim() == 3:
            (rows,) = leaves
            rows = rows.transpose(1, 2) if self.axis == 1 else rows
            if rows.shape[-1] > 4 + (self.scores == "objectness"):
                leaves = [rows[..., :4], rows[..., 4:]]
        if len(leaves) != 2 or any(t.dim() != 3 for t in leaves) or leaves[0].shape[-1] != 4:
            raise SourceError(
                "the network's outputs are not boxes and scores",
                code="outputs",
                got=", ".join(str(tuple(t.shape)) for t in leaves) or "no tensor",
                expected="boxes (batch, n, 4) and scores (batch, n, classes), or one (batch, n, 4 + classes)",
                remedy="give decode=, which returns boxes and scores; axis=1 if the columns are axis 1",
            )
        boxes, scores = leaves
        if self.decode is None and self.scores == "objectness":
            scores = scores[..., :1] * scores[..., 1:]
        return boxes, scores


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(
            f"Detections({name}=...) can't be used", code="settings", field=name, got=repr(value), expected=expected
        )


__all__ = ["Detections"]
