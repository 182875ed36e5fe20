"""U-Net: semantic segmentation with an encoder, a decoder and skip connections.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes, height, width) logits.

The paper's convolutions have biases and no padding, so its output is smaller than its input, and it has no norms;
with 1 input channel and 2 classes it has 31,030,658 parameters. Here convolutions are padded and followed by batch
norm, as is customary today. The paper's dropout is omitted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class DoubleConvolution(nn.Module):
    """Two 3×3 convolutions, each with norm and ReLU: (N, inputs, H, W) to (N, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both convolutions in turn."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class Up(nn.Module):
    """Double height and width, halve the channels, and concatenate the skip connection.

    (N, 2·outputs, H, W) and (N, outputs, 2·H, 2·W) to (N, outputs, 2·H, 2·W).
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(2 * outputs, outputs, 2, 2)
        self.convolutions = DoubleConvolution(2 * outputs, outputs)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Concatenate the skip connection in front of the upsampled channels."""
        joined: torch.Tensor = self.convolutions(torch.cat((skip, self.enlarge(x)), 1))
        return joined


class UNet(nn.Module):
    """Encoder, decoder with skip connections, and a 1×1 convolution for the classes.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits per pixel.
        width: Channels at full resolution, doubled at every level.
        depth: Number of downsampling levels; height and width must be multiples of 2 to this power.
    """

    def __init__(self, *, in_channels: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        widths = [width * 2**step for step in range(depth + 1)]
        self.first = DoubleConvolution(in_channels, width)
        self.pool = nn.MaxPool2d(2)
        self.downs = nn.ModuleList(DoubleConvolution(wide // 2, wide) for wide in widths[1:])
        self.ups = nn.ModuleList(Up(wide) for wide in reversed(widths[:-1]))
        self.classifier = nn.Conv2d(width, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.ConvTranspose2d):  # stride 2, kernel 2: every input channel adds one term
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes, H, W)."""
        x = self.first(x)
        skips: list[torch.Tensor] = []
        for down in self.downs:
            skips.append(x)
            x = down(self.pool(x))
        for up in self.ups:
            x = up(x, skips.pop())
        logits: torch.Tensor = self.classifier(x)
        return logits


def unet(in_channels: int = 3, classes: int = 2, width: int = 64, depth: int = 4) -> UNet:
    """U-Net: 31,037,698 parameters with the default arguments."""
    return UNet(in_channels=in_channels, classes=classes, width=width, depth=depth)
