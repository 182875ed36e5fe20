"""DenseNet: every layer reads the channels of all layers before it.

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, in its form with bottlenecks and compression
(DenseNet-BC) for 224×224. All inputs are (batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class DenseLayer(nn.Module):
    """1×1 to 4·growth channels, 3×3 to growth channels, appended: (N, inputs, H, W) to (N, inputs + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input's channels, then the new ones."""
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        return torch.cat((x, new), 1)


class Transition(nn.Module):
    """Halves channels, height and width: (N, inputs, H, W) to (N, inputs//2, H//2, W//2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm, ReLU, 1×1 convolution, 2×2 average pooling."""
        pooled: torch.Tensor = self.pool(self.conv(F.relu(self.bn(x))))
        return pooled


class DenseNet(nn.Module):
    """Stem, dense blocks with a transition between each two, norm, global average, linear classifier.

    Args:
        depths: Number of layers of every dense block.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Channels that every layer adds (the paper's growth rate k); the stem has twice as many.
    """

    def __init__(self, depths: tuple[int, ...], *, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        channels = 2 * width
        self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        for index, depth in enumerate(depths):
            if index > 0:
                stages.append(Transition(channels))
                channels //= 2
            stages.append(nn.Sequential(*(DenseLayer(channels + i * width, width) for i in range(depth))))
            channels += depth * width
        self.stages = nn.Sequential(*stages)
        self.bn2 = nn.BatchNorm2d(channels)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.stages(x)))
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(x), 1))
        return logits


def densenet121(in_channels: int = 3, classes: int = 1000, width: int = 32) -> DenseNet:
    """DenseNet-121 for images of about 224×224: 7,978,856 parameters with the default arguments."""
    return DenseNet((6, 12, 24, 16), in_channels=in_channels, classes=classes, width=width)


def densenet169(in_channels: int = 3, classes: int = 1000, width: int = 32) -> DenseNet:
    """DenseNet-169 for images of about 224×224: 14,149,480 parameters with the default arguments."""
    return DenseNet((6, 12, 32, 32), in_channels=in_channels, classes=classes, width=width)


def densenet201(in_channels: int = 3, classes: int = 1000, width: int = 32) -> DenseNet:
    """DenseNet-201 for images of about 224×224: 20,013,928 parameters with the default arguments."""
    return DenseNet((6, 12, 48, 32), in_channels=in_channels, classes=classes, width=width)
