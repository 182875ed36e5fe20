"""ResNet, in its CIFAR form for images of about 32×32 and in its ImageNet form for 224×224.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.

Both forms use 1×1 convolutions for shortcuts that change shape (the paper's option B). Option A, which the paper uses
on CIFAR, pads with zeros instead and has no parameters, so that ResNet-20 has 272,474 parameters here instead of
269,722 for 3 input channels and 10 classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (N, inputs, H, W) to (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch plus shortcut, then ReLU."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut: (N, inputs, H, W) to (N, 4·width, H/stride, W/stride).

    The stride is in the 3×3 convolution, as in current published weights, not in the first 1×1 as in the paper.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch plus shortcut, then ReLU."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Stem, stages that double the channels and halve the resolution, global average, linear classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Number of blocks of every stage.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Channels of the first stage.
        small: True for a 3×3 stem at full resolution, False for a 7×7 of stride 2 and a pooling of stride 2.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        *,
        in_channels: int,
        classes: int,
        width: int,
        small: bool,
    ) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        self.conv1 = _convolution(in_channels, width, 3) if small else _convolution(in_channels, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = None if small else nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        channels = width
        for index, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, width * 2**index, stride))
                channels = width * 2**index * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self.pool is not None:
            x = self.pool(x)
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(self.stages(x)), 1))
        return logits


class Short(nn.Module):
    """A stem, two pairs of a stride-2 convolution and a residual block, global average, linear classifier.

    Few wide layers instead of many narrow ones: Page, "How to Train Your ResNet", 2018, whose ResNet-9 has one such
    layer more. It fills a processor's vectors, with only eight layers in sequence.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Channels of the stem; the stages have two and four times as many.
    """

    def __init__(self, *, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        self.conv1 = _convolution(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    _convolution(inputs, 2 * inputs, 3, 2),
                    nn.BatchNorm2d(2 * inputs),
                    nn.ReLU(),
                    BasicBlock(2 * inputs, 2 * inputs, 1),
                )
                for inputs in (width, 2 * width)
            )
        )
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(x), 1))
        return logits


def resnet8(in_channels: int = 3, classes: int = 10, width: int = 32) -> Short:
    """Eight wide layers for images of about 32×32: 464,170 parameters with the default arguments."""
    return Short(in_channels=in_channels, classes=classes, width=width)


def _small(depth: int, in_channels: int, classes: int, width: int) -> ResNet:
    blocks = (depth - 2) // 6  # three stages, two convolutions a block, plus stem and classifier
    return ResNet(BasicBlock, (blocks,) * 3, in_channels=in_channels, classes=classes, width=width, small=True)


def resnet20(in_channels: int = 3, classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-20 for images of about 32×32: 272,474 parameters with the default arguments."""
    return _small(20, in_channels, classes, width)


def resnet32(in_channels: int = 3, classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-32 for images of about 32×32: 466,906 parameters with the default arguments."""
    return _small(32, in_channels, classes, width)


def resnet56(in_channels: int = 3, classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-56 for images of about 32×32: 855,770 parameters with the default arguments."""
    return _small(56, in_channels, classes, width)


def resnet18(in_channels: int = 3, classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-18 for images of about 224×224: 11,689,512 parameters with the default arguments."""
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels=in_channels, classes=classes, width=width, small=False)


def resnet50(in_channels: int = 3, classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50 for images of about 224×224: 25,557,032 parameters with the default arguments."""
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels=in_channels, classes=classes, width=width, small=False)
