"""GhostNet: half of the channels are computed, the other half by cheap operations on them.

Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Per bottleneck: kernel, hidden channels, channels, whether it has gates, stride.
_BOTTLENECKS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


def _rounded(channels: float) -> int:
    """The nearest multiple of 4, but at least 4 and at least nine tenths of `channels`."""
    nearest = max(4, int(channels + 2) // 4 * 4)
    return nearest if nearest >= 0.9 * channels else nearest + 4


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class GhostModule(nn.Module):
    """1×1 convolution for half of the channels, a depthwise 3×3 of these for the rest.

    (N, inputs, H, W) to (N, outputs, H, W). An odd number of outputs leaves out the last of the cheap ones.
    """

    def __init__(self, inputs: int, outputs: int, activate: bool) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.outputs = outputs
        self.activate = activate
        self.primary = _convolution(inputs, half, 1)
        self.cheap = _convolution(half, half, 3, groups=half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computed channels first, then their ghosts."""
        primary = self.primary(x)
        primary = F.relu(primary) if self.activate else primary
        ghosts = self.cheap(primary)
        ghosts = F.relu(ghosts) if self.activate else ghosts
        both = torch.cat((primary, ghosts), 1)
        return both if both.shape[1] == self.outputs else both[:, : self.outputs]


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the averages of all: (N, channels, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _rounded(channels / 4)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input times gates between 0 and 1, from a hard sigmoid."""
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(self.average(x)))))


class GhostBottleneck(nn.Module):
    """Two ghost modules and a shortcut: (N, inputs, H, W) to (N, outputs, H/stride, W/stride).

    With a stride other than 1, there is a depthwise convolution between the two.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, excite: bool) -> None:
        super().__init__()
        self.widen = GhostModule(inputs, hidden, activate=True)
        self.depthwise = None if stride == 1 else _convolution(hidden, hidden, kernel, stride, groups=hidden)
        self.excite = SqueezeExcite(hidden) if excite else None
        self.narrow = GhostModule(hidden, outputs, activate=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            depthwise = _convolution(inputs, inputs, kernel, stride, groups=inputs)
            self.shortcut = nn.Sequential(depthwise, _convolution(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch plus shortcut; no activation after the sum."""
        branch = self.widen(x)
        if self.depthwise is not None:
            branch = self.depthwise(branch)
        if self.excite is not None:
            branch = self.excite(branch)
        branch = self.narrow(branch)
        result: torch.Tensor = branch + (x if self.shortcut is None else self.shortcut(x))
        return result


class GhostNet(nn.Module):
    """Stem of stride 2, sixteen ghost bottlenecks, 1×1 convolution, global average, two linear maps.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplies all channels but the 1280 before the classifier, rounded to multiples of 4.
        dropout: Dropout rate of the classifier's input.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float, dropout: float) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        channels = _rounded(16 * width)
        self.stem = _convolution(in_channels, channels, 3, 2)
        blocks: list[nn.Module] = []
        for kernel, hidden, outputs, excite, stride in _BOTTLENECKS:
            wide, narrow = _rounded(hidden * width), _rounded(outputs * width)
            blocks.append(GhostBottleneck(channels, wide, narrow, kernel, stride, excite))
            channels = narrow
        self.blocks = nn.Sequential(*blocks)
        features = _rounded(960 * width)
        self.last = _convolution(channels, features, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(features, 1280, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = F.relu(self.stem(x))
        x = F.relu(self.last(self.blocks(x)))
        x = F.relu(self.head(self.average(x)))
        logits: torch.Tensor = self.classifier(self.dropout(torch.flatten(x, 1)))
        return logits


def ghostnet(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> GhostNet:
    """GhostNet for images of about 224×224: 5,182,508 parameters with the default arguments."""
    return GhostNet(in_channels=in_channels, classes=classes, width=width, dropout=0.2)
