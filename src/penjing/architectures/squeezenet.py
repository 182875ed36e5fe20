"""SqueezeNet: narrow 1×1 squeeze layers followed by wide, parallel 1×1 and 3×3 expand layers.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016. All inputs
are (batch, in_channels, height, width), all outputs (batch, classes) logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)  # squeeze channels of every fire module, which outputs eight times as many


class Fire(nn.Module):
    """1×1 squeeze, then parallel 1×1 and 3×3 expand: (N, inputs, H, W) to (N, 8·squeezed, H, W)."""

    def __init__(self, inputs: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1 = nn.Conv2d(squeezed, 4 * squeezed, 1)
        self.expand3 = nn.Conv2d(squeezed, 4 * squeezed, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ReLU after both."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """Stem, eight fire modules with pooling in between, a 1×1 classifier and global average pooling.

    Args:
        kernel: Kernel size of the stem.
        stem: Channels of the stem.
        pools: Fire modules preceded by pooling.
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplier of all channels.
    """

    def __init__(
        self, kernel: int, stem: int, pools: tuple[int, ...], *, in_channels: int, classes: int, width: float
    ) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width <= 0:
            raise ValueError(f"width must be above 0, not {width}")
        channels = max(1, int(stem * width))
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, kernel, 2), nn.ReLU()]
        for position, squeezed in enumerate(_SQUEEZED):
            if position in pools:
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            narrow = max(1, int(squeezed * width))
            layers.append(Fire(channels, narrow))
            channels = 8 * narrow
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout()
        self.classifier = nn.Conv2d(channels, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        maps = F.relu(self.classifier(self.dropout(self.features(x))))
        return torch.flatten(F.adaptive_avg_pool2d(maps, 1), 1)


def squeezenet1_0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> SqueezeNet:
    """SqueezeNet 1.0: 1,248,424 parameters with the default arguments."""
    return SqueezeNet(7, 96, (0, 3, 7), in_channels=in_channels, classes=classes, width=width)


def squeezenet1_1(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> SqueezeNet:
    """SqueezeNet 1.1, with 2.4 times fewer multiplications: 1,235,496 parameters with the default arguments."""
    return SqueezeNet(3, 64, (0, 2, 4), in_channels=in_channels, classes=classes, width=width)
