"""MobileNetV1: depthwise separable convolutions.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017. All inputs
are (batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
from torch import nn

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNetV1(nn.Module):
    """A 3×3 stem, thirteen separable convolutions, global average, linear classifier.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        channels = _rounded(32 * width)
        layers = [_convolution(in_channels, channels, 3, 2)]
        for wide, stride in _BLOCKS:
            outputs = _rounded(wide * width)
            layers.append(_convolution(channels, channels, 3, stride, groups=channels))
            layers.append(_convolution(channels, outputs, 1))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(self.features(x)), 1))
        return logits


def mobilenet_v1(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MobileNetV1:
    """MobileNetV1: 4,231,976 parameters with the default arguments."""
    return MobileNetV1(in_channels=in_channels, classes=classes, width=width)
