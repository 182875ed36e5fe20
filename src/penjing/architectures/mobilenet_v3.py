"""MobileNetV3: inverted residuals found by a search, with squeeze-and-excitation and hard-swish.

Howard et al., "Searching for MobileNetV3", ICCV 2019. All inputs are (batch, in_channels, height, width), all outputs
(batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Per block: kernel, channels inside, channels, gates, hard swish instead of ReLU, stride.
_Block = tuple[int, int, int, bool, bool, int]
_LARGE: tuple[_Block, ...] = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
_SMALL: tuple[_Block, ...] = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm, with the paper's epsilon and momentum."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01))


class Gate(nn.Module):
    """Squeeze-and-excitation: scale every channel by a gate computed from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = _rounded(channels / 4)
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) to the same."""
        gates = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return x * gates


class Block(nn.Module):
    """1×1 up, depthwise, gates, 1×1 down, added to the input if the shapes match."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, *, kernel: int, gates: bool, swish: bool, stride: int
    ) -> None:
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        self.activate: nn.Module = nn.Hardswish() if swish else nn.ReLU()
        self.expand = _convolution(inputs, inner, 1) if inner != inputs else None
        self.depthwise = _convolution(inner, inner, kernel, stride, groups=inner)
        self.gate = Gate(inner) if gates else None
        self.project = _convolution(inner, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        branch: torch.Tensor = x if self.expand is None else self.activate(self.expand(x))
        branch = self.activate(self.depthwise(branch))
        branch = branch if self.gate is None else self.gate(branch)
        branch = self.project(branch)
        return branch + x if self.adds else branch


class MobileNetV3(nn.Module):
    """A 3×3 stem, the blocks, a 1×1 head, global average, one hidden layer, linear classifier.

    Args:
        blocks: One entry per block.
        hidden: Width of the layer before the classifier.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels.
    """

    def __init__(
        self, blocks: tuple[_Block, ...], hidden: int, *, in_channels: int, classes: int, width: float
    ) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        channels = _rounded(16 * width)
        self.stem = _convolution(in_channels, channels, 3, 2)
        layers: list[nn.Module] = []
        for kernel, inner, wide, gates, swish, stride in blocks:
            outputs = _rounded(wide * width)
            inside = _rounded(inner * width)
            layers.append(Block(channels, inside, outputs, kernel=kernel, gates=gates, swish=swish, stride=stride))
            channels = outputs
        self.blocks = nn.Sequential(*layers)
        last = 6 * channels
        self.head = _convolution(channels, last, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(last, _rounded(hidden * width))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(_rounded(hidden * width), classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.blocks(F.hardswish(self.stem(x)))
        x = torch.flatten(self.average(F.hardswish(self.head(x))), 1)
        logits: torch.Tensor = self.classifier(self.dropout(F.hardswish(self.hidden(x))))
        return logits


def mobilenet_v3_large(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MobileNetV3:
    """MobileNetV3-Large: 5,483,032 parameters with the default arguments."""
    return MobileNetV3(_LARGE, 1280, in_channels=in_channels, classes=classes, width=width)


def mobilenet_v3_small(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> MobileNetV3:
    """MobileNetV3-Small: 2,542,856 parameters with the default arguments."""
    return MobileNetV3(_SMALL, 1024, in_channels=in_channels, classes=classes, width=width)
