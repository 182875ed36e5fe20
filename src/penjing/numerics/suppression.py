"""``penjing::non_max_suppression`` and ``penjing::best_boxes``: the boxes of a detector that remain.

Runtimes have a kernel of their own for suppression, as ONNX defines it, and torch has none outside torchvision.
"""

from __future__ import annotations

import torch

NONE = -3e38  # a score below all others, of what was not selected


@torch.library.custom_op("penjing::non_max_suppression", mutates_args=())
def non_max_suppression(
    boxes: torch.Tensor, scores: torch.Tensor, most: int, overlap: float, least_score: float, centred: bool
) -> torch.Tensor:
    """Boxes in the order of their scores, without those that overlap a better one of their class.

    Args:
        boxes: (batch, boxes, 4): two opposite corners y, x, y, x; or centre x, y, width, height.
        scores: (batch, classes, boxes).
        most: Of a class; 0 gives none.
        overlap: Intersection over union above which the worse box is dropped.
        least_score: Boxes of at most this score are not looked at; negative infinity looks at all.
        centred: Whether boxes are given by their centres.

    Returns:
        (selected, 3) int64: batch, class and box.
    """
    corners = _corners(boxes, centred)
    rows: list[tuple[int, int, int]] = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            order = torch.argsort(scores[batch, kind], descending=True, stable=True)
            order = order[scores[batch, kind][order] > least_score]
            selected: list[int] = []
            for box in order.tolist():
                if len(selected) >= most:
                    break
                if not selected or bool((_overlaps(corners[batch, box], corners[batch, selected]) <= overlap).all()):
                    selected.append(box)
            rows += [(batch, kind, box) for box in selected]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


@non_max_suppression.register_fake
def _(
    boxes: torch.Tensor, scores: torch.Tensor, most: int, overlap: float, least_score: float, centred: bool
) -> torch.Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((count, 3), dtype=torch.int64)


@torch.library.custom_op("penjing::best_boxes", mutates_args=())
def best_boxes(
    boxes: torch.Tensor, scores: torch.Tensor, most: int, overlap: float, least_score: float
) -> torch.Tensor:
    """The best boxes of every sample after suppression within each class, as many for every sample.

    Args:
        boxes: (batch, boxes, 4): two opposite corners x, y, x, y.
        scores: (batch, classes, boxes), finite.
        most: Of a sample.
        overlap: Intersection over union above which the worse box is dropped.
        least_score: Boxes of at most this score are dropped.

    Returns:
        (batch, min(most, classes · boxes)) int64: class · boxes + box, the best first, of equal ones the smallest; −1
        where there are no more.
    """
    rows = non_max_suppression(boxes, scores, most, overlap, least_score, False)
    ranked = torch.full_like(scores, NONE)
    ranked[rows[:, 0], rows[:, 1], rows[:, 2]] = scores[rows[:, 0], rows[:, 1], rows[:, 2]]
    values, places = ranked.flatten(1).sort(descending=True, stable=True)
    count = _count(scores, most)
    return torch.where(values[:, :count] > NONE, places[:, :count], -1)


@best_boxes.register_fake
def _(boxes: torch.Tensor, scores: torch.Tensor, most: int, overlap: float, least_score: float) -> torch.Tensor:
    return boxes.new_empty((boxes.shape[0], _count(scores, most)), dtype=torch.int64)


SELECTIONS = frozenset({torch.ops.penjing.non_max_suppression.default, torch.ops.penjing.best_boxes.default})
"""The operators that select boxes by their scores."""


def _count(scores: torch.Tensor, most: int) -> int:
    return min(most, scores.shape[1] * scores.shape[2])


def _corners(boxes: torch.Tensor, centred: bool) -> torch.Tensor:
    """(…, 4): the smaller y, x and the larger y, x."""
    if centred:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1)
    one, other = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(one, other), torch.maximum(one, other)], -1)


def _overlaps(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of a box with others, (n,)."""
    inner = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0).prod(-1)
    area, areas = (box[2:] - box[:2]).prod(-1), (others[:, 2:] - others[:, :2]).prod(-1)
    union = area + areas - inner
    return torch.where(union > 0, inner / union, torch.zeros_like(union))


__all__ = ["NONE", "SELECTIONS", "best_boxes", "non_max_suppression"]
