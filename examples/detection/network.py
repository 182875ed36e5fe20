"""A detector of the size of a microcontroller's: input (batch, 3, 160, 160), output (batch, 500, 9).

Every cell of two grids, with 8 and 16 pixels a cell, gives one row: the box as centre, width and height in pixels, and
a score from 0 to 1 for each of the five classes. Boxes and scores leave in one tensor, as in YOLOX and YOLOv8: that is
what breaks detectors at 8 bits.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.stamps import CLASSES, SIDE
from examples.weights import load

WEIGHTS = Path(__file__).with_name("detector.safetensors")
STRIDES = (8, 16)  # pixels a cell


class Convolution(nn.Sequential):
    """3×3 convolution, batch norm, ReLU: (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        return torch.relu(x + self.second(self.first(x)))


class Head(nn.Module):
    """Features of one grid to rows of (x, y, width, height, score of each class): (N, cells, 4 + classes)."""

    def __init__(self, channels: int, classes: int, stride: int, cells: int) -> None:
        super().__init__()
        self.boxes = nn.Sequential(Convolution(channels, channels), nn.Conv2d(channels, 4, 1))
        self.scores = nn.Sequential(Convolution(channels, channels), nn.Conv2d(channels, classes, 1))
        nn.init.constant_(self.scores[-1].bias, -4.0)  # few cells hold an object
        self.stride = stride
        rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        self.register_buffer("grid", torch.stack([columns, rows], -1).reshape(1, cells * cells, 2).float() + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, cells, cells) to (N, cells², 4 + classes)."""
        boxes = self.boxes(x).float().flatten(2).transpose(1, 2)
        scores = self.scores(x).float().flatten(2).transpose(1, 2).sigmoid()
        centres = (boxes[..., :2] + self.grid) * self.stride
        sides = boxes[..., 2:].clamp(-4, 4).exp() * self.stride
        return torch.cat([centres, sides, scores], dim=-1)


class Detector(nn.Module):
    """Residual network with a feature pyramid of two levels."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, 16, 2), Convolution(16, 32, 2), Residual(32))
        self.middle = nn.Sequential(Convolution(32, 64, 2), Residual(64))
        self.deep = nn.Sequential(Convolution(64, 128, 2), Residual(128), Residual(128))
        self.narrow = nn.Conv2d(128, 64, 1)
        self.merge = Convolution(64, 64)
        self.fine = Head(64, classes, STRIDES[0], SIDE // STRIDES[0])
        self.coarse = Head(64, classes, STRIDES[1], SIDE // STRIDES[1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 160, 160) to (N, 500, 4 + classes)."""
        middle = self.middle(self.stem(images))
        deep = self.narrow(self.deep(middle))
        merged = self.merge(middle + nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest"))
        return torch.cat([self.fine(merged), self.coarse(deep)], dim=1)


def untrained() -> nn.Module:
    """Build the detector with random weights from torch's global generator."""
    return Detector()


def detector() -> nn.Module:
    """Return the trained detector in eval mode."""
    return load(untrained(), WEIGHTS)
