"""Inception: parallel convolutions of several sizes, with concatenated channels.

GoogLeNet: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, with batch norm and with 3×3 convolutions in the
branch that the paper gives 5×5, as in the usual weights. Inception v3: Szegedy et al., "Rethinking the Inception
Architecture for Computer Vision", CVPR 2016. Both without their auxiliary classifiers, which training alone uses. All
inputs are (batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_Kernel = int | tuple[int, int]


class Convolution(nn.Module):
    """A convolution, its batch norm and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, padding: _Kernel | None = None
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (sides[0] // 2, sides[1] // 2) if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Joined(nn.Module):
    """Parallel branches: (N, inputs, H, W) to (N, sum of their channels, H', W')."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every branch reads the same input."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def _check(in_channels: int, classes: int, width: float) -> None:
    for word, value in (("in_channels", in_channels), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{word} must be at least 1, not {value}")
    if width <= 0:
        raise ValueError(f"width must be above 0, not {width}")


class Inception(nn.Module):
    """Stem, Inception blocks, global average, linear classifier.

    Args:
        features: Everything before the average.
        channels: Number of its output channels.
        classes: Number of logits.
        dropout: Dropout rate before the classifier.
    """

    def __init__(self, features: nn.Sequential, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = features
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1 if isinstance(module, nn.Conv2d) else 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = torch.flatten(self.average(self.features(x)), 1)
        logits: torch.Tensor = self.classifier(self.dropout(x))
        return logits


# Per GoogLeNet block: 1×1; 1×1 and 3×3; 1×1 and 3×3; 1×1 after the pooling. None is a pooling between stages.
_GOOGLENET = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip


def googlenet(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> Inception:
    """GoogLeNet: 6,624,904 parameters with the default arguments; images of at least 32×32."""
    _check(in_channels, classes, width)

    def wide(channels: int) -> int:
        return max(1, int(channels * width))

    layers: list[nn.Module] = [
        *(Convolution(in_channels, wide(64), 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(Convolution(wide(64), wide(64), 1), Convolution(wide(64), wide(192), 3)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    ]
    channels = wide(192)
    for block, row in enumerate(_GOOGLENET):
        if row is None:
            layers.append(nn.MaxPool2d(3 if block == 2 else 2, 2, ceil_mode=True))
            continue
        a, b1, b3, c1, c3, d = map(wide, row)
        layers.append(
            Joined(
                Convolution(channels, a, 1),
                nn.Sequential(Convolution(channels, b1, 1), Convolution(b1, b3, 3)),
                nn.Sequential(Convolution(channels, c1, 1), Convolution(c1, c3, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), Convolution(channels, d, 1)),
            )
        )
        channels = a + b3 + c3 + d
    return Inception(nn.Sequential(*layers), channels, classes, 0.2)


def _fork(inputs: int, outputs: int) -> Joined:
    """Parallel 1×3 and 3×1 convolutions."""
    return Joined(Convolution(inputs, outputs, (1, 3)), Convolution(inputs, outputs, (3, 1)))


def inception_v3(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> Inception:
    """Inception v3: 23,834,568 parameters with the default arguments; images of at least 75×75."""
    _check(in_channels, classes, width)

    def wide(channels: int) -> int:
        return max(1, int(channels * width))

    def chain(inputs: int, *steps: tuple[int, _Kernel]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for outputs, kernel in steps:
            layers.append(Convolution(inputs, wide(outputs), kernel))
            inputs = wide(outputs)
        return nn.Sequential(*layers)

    def pooled(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.AvgPool2d(3, 1, 1), Convolution(inputs, wide(outputs), 1))

    def halved(inputs: int, *steps: tuple[int, _Kernel]) -> nn.Sequential:
        inner = chain(inputs, *steps[:-1])
        before = wide(steps[-2][0]) if len(steps) > 1 else inputs
        return nn.Sequential(*inner, Convolution(before, wide(steps[-1][0]), steps[-1][1], 2, 0))

    layers: list[nn.Module] = [
        Convolution(in_channels, wide(32), 3, 2, 0),
        Convolution(wide(32), wide(32), 3, 1, 0),
        Convolution(wide(32), wide(64), 3),
        nn.MaxPool2d(3, 2),
        Convolution(wide(64), wide(80), 1),
        Convolution(wide(80), wide(192), 3, 1, 0),
        nn.MaxPool2d(3, 2),
    ]
    channels = wide(192)
    for pool in (32, 64, 64):  # 35×35
        branches = (chain(channels, (64, 1)), chain(channels, (48, 1), (64, 5)))
        layers.append(Joined(*branches, chain(channels, (64, 1), (96, 3), (96, 3)), pooled(channels, pool)))
        channels = 2 * wide(64) + wide(96) + wide(pool)
    layers.append(Joined(halved(channels, (384, 3)), halved(channels, (64, 1), (96, 3), (96, 3)), nn.MaxPool2d(3, 2)))
    channels += wide(384) + wide(96)
    for inner in (128, 160, 160, 192):  # 17×17
        c = inner
        layers.append(
            Joined(
                chain(channels, (192, 1)),
                chain(channels, (c, 1), (c, (1, 7)), (192, (7, 1))),
                chain(channels, (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
                pooled(channels, 192),
            )
        )
        channels = 4 * wide(192)
    small = halved(channels, (192, 1), (320, 3))
    layers.append(Joined(small, halved(channels, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), nn.MaxPool2d(3, 2)))
    channels += wide(320) + wide(192)
    for _ in range(2):  # 8×8
        layers.append(
            Joined(
                chain(channels, (320, 1)),
                nn.Sequential(*chain(channels, (384, 1)), _fork(wide(384), wide(384))),
                nn.Sequential(*chain(channels, (448, 1), (384, 3)), _fork(wide(384), wide(384))),
                pooled(channels, 192),
            )
        )
        channels = wide(320) + 4 * wide(384) + wide(192)
    return Inception(nn.Sequential(*layers), channels, classes, 0.5)
