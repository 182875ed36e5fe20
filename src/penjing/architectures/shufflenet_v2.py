"""ShuffleNetV2: half of the channels bypass each block, and a channel shuffle mixes them for the next.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_DEPTHS = (4, 8, 4)


def _norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Interleave the two halves of the channels: (N, C, H, W) to the same."""
    n, channels, height, width = x.shape
    return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)


class Branch(nn.Module):
    """1×1, depthwise 3×3, 1×1: (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _norm(inputs, outputs, 1)
        self.depthwise = _norm(outputs, outputs, 3, stride, groups=outputs)
        self.second = _norm(outputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ReLU after both 1×1 convolutions."""
        return F.relu(self.second(self.depthwise(F.relu(self.first(x)))))


class Basic(nn.Module):
    """Half of the channels bypass the branch: (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = Branch(channels // 2, channels // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Split, transform one half, concatenate, shuffle."""
        passing, worked = x.chunk(2, 1)
        return shuffled(torch.cat([passing, self.branch(worked)], 1))


class Down(nn.Module):
    """Downsample in two branches: (N, inputs, H, W) to (N, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = _norm(inputs, inputs, 3, 2, groups=inputs)
        self.pointwise = _norm(inputs, outputs // 2, 1)
        self.branch = Branch(inputs, outputs // 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform in both branches, concatenate, shuffle."""
        short = F.relu(self.pointwise(self.depthwise(x)))
        return shuffled(torch.cat([short, self.branch(x)], 1))


class ShuffleNetV2(nn.Module):
    """A 3×3 stem, a pooling, three stages, a 1×1 head, global average, linear classifier.

    Args:
        widths: Channels of the three stages and of the head.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels.
    """

    def __init__(self, widths: tuple[int, int, int, int], *, in_channels: int, classes: int, width: float) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        wide = [max(2, int(w * width) // 2 * 2) for w in widths]
        channels = max(2, int(24 * width))
        self.stem = _norm(in_channels, channels, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        for outputs, depth in zip(wide, _DEPTHS, strict=False):
            stages.append(nn.Sequential(Down(channels, outputs), *(Basic(outputs) for _ in range(depth - 1))))
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.head = _norm(channels, wide[3], 1)
        self.classifier = nn.Linear(wide[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.stages(self.pool(F.relu(self.stem(x))))
        x = F.relu(self.head(x)).mean((2, 3))
        logits: torch.Tensor = self.classifier(x)
        return logits


def shufflenet_v2_x0_5(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> ShuffleNetV2:
    """ShuffleNetV2 0.5×: 1,366,792 parameters with the default arguments."""
    return ShuffleNetV2((48, 96, 192, 1024), in_channels=in_channels, classes=classes, width=width)


def shufflenet_v2_x1_0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> ShuffleNetV2:
    """ShuffleNetV2 1×: 2,278,604 parameters with the default arguments."""
    return ShuffleNetV2((116, 232, 464, 1024), in_channels=in_channels, classes=classes, width=width)


def shufflenet_v2_x1_5(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> ShuffleNetV2:
    """ShuffleNetV2 1.5×: 3,503,624 parameters with the default arguments."""
    return ShuffleNetV2((176, 352, 704, 1024), in_channels=in_channels, classes=classes, width=width)


def shufflenet_v2_x2_0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> ShuffleNetV2:
    """ShuffleNetV2 2×: 7,393,996 parameters with the default arguments."""
    return ShuffleNetV2((244, 488, 976, 2048), in_channels=in_channels, classes=classes, width=width)
