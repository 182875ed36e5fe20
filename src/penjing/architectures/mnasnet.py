"""MnasNet: inverted residuals with kernels and expansions found by a latency-aware search.

Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for Mobile", CVPR 2019; the form without gates (B1).
All inputs are (batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Per stage: kernel, expansion, channels, blocks, stride of the first.
_STAGES = ((3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2), (3, 6, 96, 2, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1))
_MOMENTUM = 1 - 0.9997


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, momentum=_MOMENTUM))


class Block(nn.Module):
    """1×1 up, depthwise, 1×1 down, added to the input if the shapes match."""

    def __init__(self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = _norm(inputs, inner, 1)
        self.depthwise = _norm(inner, inner, kernel, stride, groups=inner)
        self.project = _norm(inner, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        branch: torch.Tensor = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return branch + x if self.adds else branch


class MnasNet(nn.Module):
    """A stem with a separable convolution, six stages, a 1×1 head, global average, linear classifier.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels but the head's.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        first, channels = _rounded(32 * width), _rounded(16 * width)
        self.stem = _norm(in_channels, first, 3, 2)
        self.depthwise = _norm(first, first, 3, groups=first)
        self.project = _norm(first, channels, 1)
        blocks: list[nn.Module] = []
        for kernel, expansion, wide, count, stride in _STAGES:
            for position in range(count):
                outputs = _rounded(wide * width)
                blocks.append(Block(channels, outputs, kernel, expansion, stride if position == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _norm(channels, 1280, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.project(F.relu(self.depthwise(F.relu(self.stem(x)))))
        x = F.relu(self.head(self.blocks(x))).mean((2, 3))
        logits: torch.Tensor = self.classifier(self.dropout(x))
        return logits


def mnasnet0_5(in_channels: int = 3, classes: int = 1000, width: float = 0.5) -> MnasNet:
    """MnasNet-B1 0.5×: 2,218,512 parameters with the default arguments."""
    return MnasNet(in_channels=in_channels, classes=classes, width=width)


def mnasnet1_0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MnasNet:
    """MnasNet-B1: 4,383,312 parameters with the default arguments."""
    return MnasNet(in_channels=in_channels, classes=classes, width=width)
