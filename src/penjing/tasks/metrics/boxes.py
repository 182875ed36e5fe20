"""Boxes: their conventions, how much they overlap, and which of a detector's many remain."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LAYOUTS = ("xyxy", "cxcywh", "xywh", "yxyx")
CONVENTIONS = LAYOUTS + tuple(f"{layout} relative" for layout in LAYOUTS)


def to_corners(boxes: Array, convention: str, size: tuple[int, int]) -> Array:
    """Convert boxes (..., 4) to left, top, right, bottom in pixels, float64.

    Args:
        boxes: In the convention.
        convention: "xyxy" (two corners), "cxcywh" (centre, width, height), "xywh" (left, top, width, height) or "yxyx",
            in pixels; with " relative" behind it in parts of the image's width and height.
        size: Height and width of the image, in pixels.

    >>> to_corners(np.array([0.5, 0.5, 0.5, 1.0]), "cxcywh relative", (10, 20)).tolist()
    [5.0, 0.0, 15.0, 10.0]
    """
    layout, _, relative = convention.partition(" ")
    a, b, c, d = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)
    if layout == "yxyx":
        a, b, c, d = b, a, d, c
    elif layout == "xywh":
        c, d = a + c, b + d
    elif layout == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    corners = np.stack([a, b, c, d], axis=-1)
    height, width = size
    return corners * np.array([width, height, width, height], np.float64) if relative else corners


def overlaps(boxes: Array, others: Array, crowd: Array | None = None) -> Array:
    """Intersection over union of every box with every other: (n, 4) and (m, 4) corners to (n, m).

    Where `crowd` (m,) is true, the intersection is divided by the area of the first box alone, as COCO does.
    """
    width, height = (
        np.minimum(boxes[:, None, axis + 2], others[None, :, axis + 2])
        - np.maximum(boxes[:, None, axis], others[None, :, axis])
        for axis in (0, 1)
    )
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    area, other_area = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=-1) for b in (boxes, others))
    whole = area[:, None] + other_area[None] - shared
    if crowd is not None:
        whole = np.where(crowd[None], area[:, None], whole)
    return np.asarray(shared / np.maximum(whole, np.finfo(np.float64).tiny))


def suppress(boxes: Array, scores: Array, labels: Array, *, overlap: float, most: int) -> Array:
    """Indices of the boxes that remain, best first: none overlaps a better one of its class by more than `overlap`.

    Args:
        boxes: (n, 4) corners.
        scores: (n,).
        labels: (n,) classes; boxes of different classes do not suppress each other.
        overlap: Intersection over union above which the worse of two boxes is dropped.
        most: Largest number of boxes that remain.
    """
    remaining: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        close = overlaps(boxes[rows], boxes[rows]) > overlap
        alive = np.ones(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            if alive[place]:
                remaining.append(int(row))
                alive &= ~close[place]
    best = np.array(sorted(remaining), dtype=np.int64)
    return best[np.argsort(-scores[best], kind="stable")][:most]


def inside(boxes: Array, convention: str, size: tuple[int, int]) -> float:
    """Share of the boxes that, read in this convention, have a positive size and lie in the image (1 % beside it)."""
    corners = to_corners(boxes, convention, size)
    scale = np.array([size[1], size[0]], np.float64)
    low, high = corners[:, :2] / scale, corners[:, 2:] / scale
    fits = (high > low) & (low >= -0.01) & (high <= 1.01)
    return float(fits.all(axis=1).mean()) if len(boxes) else 1.0
