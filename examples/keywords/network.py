"""A keyword spotter of depthwise separable convolutions: input (batch, 1, 40, 84), output (batch, 10) logits.

Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017 (DS-CNN).
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.weights import load

WEIGHTS = Path(__file__).with_name("spotter.safetensors")
CLASSES = 10


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the padding keeps the size for stride 1."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Spotter(nn.Module):
    """A convolution and four depthwise separable ones, their mean, and a linear layer: 24,000 parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        blocks = [
            layer
            for _ in range(4)
            for layer in (convolution(width, width, 3, groups=width), convolution(width, width, 1))
        ]
        self.features = nn.Sequential(convolution(1, width, 5, stride=2), *blocks)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """(N, 1, 40, 84) to (N, 10)."""
        return self.classifier(self.dropout(self.features(spectra).mean((2, 3))))


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return Spotter()


def spotter() -> nn.Module:
    """Return the trained network in eval mode."""
    return load(untrained(), WEIGHTS)
