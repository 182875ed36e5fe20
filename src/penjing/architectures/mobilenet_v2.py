"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
from torch import nn

# Per stage: expansion, channels, blocks, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: list[nn.Module] = [layer, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*parts, nn.ReLU6()) if activate else nn.Sequential(*parts)


class InvertedResidual(nn.Module):
    """1×1 up, depthwise 3×3, 1×1 down, added to the input if the shapes match.

    (N, inputs, H, W) to (N, outputs, H/stride, W/stride).
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = _convolution(inputs, wide, 1) if expansion != 1 else None
        self.depthwise = _convolution(wide, wide, 3, stride, groups=wide)
        self.project = _convolution(wide, outputs, 1, activate=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The branch, plus the input if the shapes match."""
        wide = x if self.expand is None else self.expand(x)
        branch: torch.Tensor = self.project(self.depthwise(wide))
        return branch + x if self.adds else branch


class MobileNetV2(nn.Module):
    """A 3×3 stem, seven stages of inverted residuals, a 1×1 head, global average, linear classifier.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels; the head has at least 1280.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        channels = _rounded(32 * width)
        self.stem = _convolution(in_channels, channels, 3, 2)
        blocks: list[nn.Module] = []
        for expansion, wide, count, stride in _STAGES:
            for position in range(count):
                outputs = _rounded(wide * width)
                blocks.append(InvertedResidual(channels, outputs, expansion, stride if position == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        last = _rounded(1280 * max(1.0, width))
        self.head = _convolution(channels, last, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.average(self.head(self.blocks(self.stem(x))))
        logits: torch.Tensor = self.classifier(self.dropout(torch.flatten(x, 1)))
        return logits


def mobilenet_v2(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2: 3,504,872 parameters with the default arguments."""
    return MobileNetV2(in_channels=in_channels, classes=classes, width=width)
