"""Boxes in every convention, written apart from what is tested."""

import numpy as np


def from_corners(boxes, convention, size):
    """Corners (n, 4) in pixels to a convention of `penjing.tasks.metrics.boxes`."""
    left, top, right, bottom = boxes.T.astype(np.float64)
    layout, _, relative = convention.partition(" ")
    rows = {
        "xyxy": [left, top, right, bottom],
        "yxyx": [top, left, bottom, right],
        "xywh": [left, top, right - left, bottom - top],
        "cxcywh": [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top],
    }[layout]
    height, width = size
    scale = np.array([height, width] * 2 if layout == "yxyx" else [width, height] * 2)
    return np.stack(rows, axis=1) / (scale if relative else 1)
