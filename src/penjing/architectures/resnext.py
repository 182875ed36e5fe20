"""ResNeXt: a ResNet with grouped 3×3 convolutions.

Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_EXPANSION = 4


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Block(nn.Module):
    """1×1, grouped 3×3, 1×1 and a shortcut: (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _convolution(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _convolution(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch plus shortcut, then ReLU."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class ResNeXt(nn.Module):
    """Stem, four stages of blocks, global average, linear classifier.

    Args:
        depths: Number of blocks of every stage.
        groups: Groups of the 3×3 convolutions ("cardinality").
        group_width: Channels of one group in the first stage.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Channels of the stem; all others scale with it.
    """

    def __init__(
        self, depths: tuple[int, ...], groups: int, group_width: int, *, in_channels: int, classes: int, width: int
    ) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        self.conv1, self.bn1 = _convolution(in_channels, width, 7, 2), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        each = max(1, group_width * width // 64)
        stages: list[nn.Module] = []
        channels = width
        for index, depth in enumerate(depths):
            inner, outputs = groups * each * 2**index, width * 2**index * _EXPANSION
            blocks: list[nn.Module] = []
            for position in range(depth):
                blocks.append(Block(channels, inner, outputs, 2 if index > 0 and position == 0 else 1, groups))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(self.stages(x)), 1))
        return logits


def resnext50_32x4d(in_channels: int = 3, classes: int = 1000, width: int = 64) -> ResNeXt:
    """ResNeXt-50 (32×4d): 25,028,904 parameters with the default arguments."""
    return ResNeXt((3, 4, 6, 3), 32, 4, in_channels=in_channels, classes=classes, width=width)


def resnext101_32x8d(in_channels: int = 3, classes: int = 1000, width: int = 64) -> ResNeXt:
    """ResNeXt-101 (32×8d): 88,791,336 parameters with the default arguments."""
    return ResNeXt((3, 4, 23, 3), 32, 8, in_channels=in_channels, classes=classes, width=width)
