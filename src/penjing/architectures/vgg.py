"""VGG: plain stacks of 3×3 convolutions, in the form for 224×224 and in a small one for images of about 32×32.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. The small form
has batch norm and a global average instead of the large linear layers, as is common for CIFAR. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
from torch import nn

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_MULTIPLES = (1, 2, 4, 8, 8)  # of the width, per stage


def _features(depth: int, in_channels: int, width: int, norm: bool, last_pool: bool) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, count in enumerate(_STAGES[depth]):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width * _MULTIPLES[stage], 3, padding=1, bias=not norm))
            channels = width * _MULTIPLES[stage]
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if norm else [nn.ReLU()]
        if last_pool or stage < len(_MULTIPLES) - 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers), channels


def _check(**values: int) -> None:
    for word, value in values.items():
        if value < 1:
            raise ValueError(f"{word} must be at least 1, not {value}")


def _start(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class VGG(nn.Module):
    """Convolutions, 7×7 adaptive average pooling, and three linear layers.

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Channels of the first stage; the linear layers have 64 times as many.
        norm: Whether batch norm follows every convolution, which keeps its bias, as in published weights.
    """

    def __init__(self, depth: int, *, in_channels: int, classes: int, width: int, norm: bool) -> None:
        super().__init__()
        _check(in_channels=in_channels, classes=classes, width=width)
        self.features, channels = _features(depth, in_channels, width, norm, last_pool=True)
        if norm:
            for module in self.features.children():
                if isinstance(module, nn.Conv2d):
                    module.bias = nn.Parameter(torch.zeros(module.out_channels, device=module.weight.device))
        self.average = nn.AdaptiveAvgPool2d(7)
        hidden = 64 * width
        self.hidden = nn.Sequential(
            *(nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
        )
        self.classifier = nn.Linear(hidden, classes)
        _start(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) with at least 32×32 to (N, classes)."""
        x = torch.flatten(self.average(self.features(x)), 1)
        logits: torch.Tensor = self.classifier(self.hidden(x))
        return logits


class SmallVGG(nn.Module):
    """Convolutions with batch norm, the global average and one linear layer; the last stage is not pooled."""

    def __init__(self, depth: int, *, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        _check(in_channels=in_channels, classes=classes, width=width)
        self.features, channels = _features(depth, in_channels, width, norm=True, last_pool=False)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        _start(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) with at least 16×16 to (N, classes)."""
        logits: torch.Tensor = self.classifier(torch.flatten(self.average(self.features(x)), 1))
        return logits


def vgg11(in_channels: int = 3, classes: int = 1000, width: int = 64, norm: bool = False) -> VGG:
    """VGG-11: 132,863,336 parameters with the default arguments."""
    return VGG(11, in_channels=in_channels, classes=classes, width=width, norm=norm)


def vgg13(in_channels: int = 3, classes: int = 1000, width: int = 64, norm: bool = False) -> VGG:
    """VGG-13: 133,047,848 parameters with the default arguments."""
    return VGG(13, in_channels=in_channels, classes=classes, width=width, norm=norm)


def vgg16(in_channels: int = 3, classes: int = 1000, width: int = 64, norm: bool = False) -> VGG:
    """VGG-16: 138,357,544 parameters with the default arguments, 138,365,992 with batch norm."""
    return VGG(16, in_channels=in_channels, classes=classes, width=width, norm=norm)


def vgg19(in_channels: int = 3, classes: int = 1000, width: int = 64, norm: bool = False) -> VGG:
    """VGG-19: 143,667,240 parameters with the default arguments."""
    return VGG(19, in_channels=in_channels, classes=classes, width=width, norm=norm)


def vgg16_small(in_channels: int = 3, classes: int = 10, width: int = 64) -> SmallVGG:
    """VGG-16 for images of about 32×32: 14,724,042 parameters with the default arguments."""
    return SmallVGG(16, in_channels=in_channels, classes=classes, width=width)
