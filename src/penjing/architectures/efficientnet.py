"""EfficientNet B0 to B4, and EfficientNet-Lite 0 to 4 for devices without fast squeeze-and-excitation.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; the Lite form is
from Liu, "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020. All inputs are
(batch, in_channels, height, width), all outputs (batch, classes) logits.

Stochastic depth is omitted, and padding is symmetric, even with stride 2.
"""

from __future__ import annotations

import math

import torch
from torch import nn

# Per stage: expansion, kernel, stride, channels, blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the averages of all: (N, channels, H, W) to the same shape."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.average = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input times gates between 0 and 1."""
        return x * torch.sigmoid(self.expand(self.activation(self.reduce(self.average(x)))))


class InvertedBottleneck(nn.Module):
    """1×1 that widens, depthwise convolution, gates, 1×1 that narrows: (N, inputs, H, W) to (N, outputs, H/stride, …).

    The input is added if it has the shape of the output. The gates are squeezed to a quarter of the inputs. The Lite
    form has none, and ReLU6 instead of SiLU.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, lite: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = None if expansion == 1 else _convolution(inputs, hidden, 1)
        self.depthwise = _convolution(hidden, hidden, kernel, stride, groups=hidden)
        self.excite = None if lite else SqueezeExcite(hidden, max(1, inputs // 4))
        self.project = _convolution(hidden, outputs, 1)
        self.activation = nn.ReLU6() if lite else nn.SiLU()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The branch, plus the input if the shapes match; no activation after the last convolution."""
        branch: torch.Tensor = x if self.expand is None else self.activation(self.expand(x))
        branch = self.activation(self.depthwise(branch))
        if self.excite is not None:
            branch = self.excite(branch)
        branch = self.project(branch)
        return x + branch if self.residual else branch


class EfficientNet(nn.Module):
    """Stem of stride 2, seven stages of inverted bottlenecks, 1×1 convolution, global average, linear classifier.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Multiplies all channels, rounded to multiples of 8; the Lite form leaves the first and the last
            convolution as they are.
        depth: Multiplies the blocks of every stage, rounded up; the Lite form leaves the first and the last stage as
            they are.
        dropout: Dropout rate of the classifier's input.
        lite: True for the Lite form.
    """

    def __init__(
        self, *, in_channels: int, classes: int, width: float, depth: float, dropout: float, lite: bool
    ) -> None:
        super().__init__()
        for word, value in (("in_channels", in_channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        for word, factor in (("width", width), ("depth", depth)):
            if factor <= 0:
                raise ValueError(f"{word} must be above 0, not {factor}")
        channels = 32 if lite else _rounded(32 * width)
        self.stem = _convolution(in_channels, channels, 3, 2)
        stages: list[nn.Module] = []
        for index, (expansion, kernel, stride, outputs, repeats) in enumerate(_STAGES):
            fixed = lite and index in (0, len(_STAGES) - 1)
            blocks: list[nn.Module] = []
            for position in range(repeats if fixed else math.ceil(repeats * depth)):
                first = stride if position == 0 else 1
                blocks.append(InvertedBottleneck(channels, _rounded(outputs * width), kernel, first, expansion, lite))
                channels = _rounded(outputs * width)
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        features = 1280 if lite else _rounded(1280 * width)
        self.head = _convolution(channels, features, 1)
        self.activation = nn.ReLU6() if lite else nn.SiLU()
        self.average = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The weight keeps torch's bounds, 1/√features. The published 1/√classes is close to that for 1000 classes, but
        # far too wide for few.
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        x = self.activation(self.stem(x))
        x = self.activation(self.head(self.stages(x)))
        logits: torch.Tensor = self.classifier(self.dropout(torch.flatten(self.average(x), 1)))
        return logits


def _full(in_channels: int, classes: int, width: float, depth: float, dropout: float) -> EfficientNet:
    return EfficientNet(in_channels=in_channels, classes=classes, width=width, depth=depth, dropout=dropout, lite=False)


def _lite(in_channels: int, classes: int, width: float, depth: float, dropout: float) -> EfficientNet:
    return EfficientNet(in_channels=in_channels, classes=classes, width=width, depth=depth, dropout=dropout, lite=True)


def efficientnet_b0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> EfficientNet:
    """EfficientNet-B0, published for 224×224: 5,288,548 parameters with the default arguments."""
    return _full(in_channels, classes, width, 1.0, 0.2)


def efficientnet_b1(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> EfficientNet:
    """EfficientNet-B1, published for 240×240: 7,794,184 parameters with the default arguments."""
    return _full(in_channels, classes, width, 1.1, 0.2)


def efficientnet_b2(in_channels: int = 3, classes: int = 1000, width: float = 1.1) -> EfficientNet:
    """EfficientNet-B2, published for 260×260: 9,109,994 parameters with the default arguments."""
    return _full(in_channels, classes, width, 1.2, 0.3)


def efficientnet_b3(in_channels: int = 3, classes: int = 1000, width: float = 1.2) -> EfficientNet:
    """EfficientNet-B3, published for 300×300: 12,233,232 parameters with the default arguments."""
    return _full(in_channels, classes, width, 1.4, 0.3)


def efficientnet_b4(in_channels: int = 3, classes: int = 1000, width: float = 1.4) -> EfficientNet:
    """EfficientNet-B4, published for 380×380: 19,341,616 parameters with the default arguments."""
    return _full(in_channels, classes, width, 1.8, 0.4)


def efficientnet_lite0(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> EfficientNet:
    """EfficientNet-Lite0, published for 224×224: 4,652,008 parameters with the default arguments."""
    return _lite(in_channels, classes, width, 1.0, 0.2)


def efficientnet_lite1(in_channels: int = 3, classes: int = 1000, width: float = 1.0) -> EfficientNet:
    """EfficientNet-Lite1, published for 240×240: 5,416,680 parameters with the default arguments."""
    return _lite(in_channels, classes, width, 1.1, 0.2)


def efficientnet_lite2(in_channels: int = 3, classes: int = 1000, width: float = 1.1) -> EfficientNet:
    """EfficientNet-Lite2, published for 260×260: 6,092,072 parameters with the default arguments."""
    return _lite(in_channels, classes, width, 1.2, 0.3)


def efficientnet_lite3(in_channels: int = 3, classes: int = 1000, width: float = 1.2) -> EfficientNet:
    """EfficientNet-Lite3, published for 280×280: 8,197,096 parameters with the default arguments."""
    return _lite(in_channels, classes, width, 1.4, 0.3)


def efficientnet_lite4(in_channels: int = 3, classes: int = 1000, width: float = 1.4) -> EfficientNet:
    """EfficientNet-Lite4, published for 300×300: 13,006,568 parameters with the default arguments."""
    return _lite(in_channels, classes, width, 1.8, 0.3)
