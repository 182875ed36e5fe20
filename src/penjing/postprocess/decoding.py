"""Decoders: from what a head gives to boxes in pixels and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class GridBoxes(nn.Module):
    """Decode a grid-based head without anchors (YOLOX): a shift from the cell, and the logarithm of the size in cells.

    Ge et al., "YOLOX: Exceeding YOLO Series in 2021". Columns are shift x, shift y, log width, log height, objectness
    and classes; rows are the cells of every level, row by row, the level with the smallest stride first.

    Args:
        size: Height and width of the network's input in pixels, or one number for both.
        strides: Pixels of a cell, level by level.
    """

    cells: torch.Tensor
    strides: torch.Tensor

    def __init__(self, size: int | tuple[int, int], strides: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        cells, sizes = [], []
        for stride in strides:
            ys, xs = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
            cells.append(torch.stack([xs, ys], -1).reshape(-1, 2).float())
            sizes.append(torch.full((len(cells[-1]), 1), float(stride)))
        self.register_buffer("cells", torch.cat(cells))
        self.register_buffer("strides", torch.cat(sizes))

    def forward(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes (batch, cells, 4) as centre x, centre y, width, height in pixels, and scores (…, classes)."""
        centres = (output[..., :2] + self.cells) * self.strides
        sizes = output[..., 2:4].exp() * self.strides
        return torch.cat([centres, sizes], -1), output[..., 4:5] * output[..., 5:]


__all__ = ["GridBoxes"]
