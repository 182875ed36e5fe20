"""A small U-Net: input (batch, 3, 80, 80), output (batch, 6, 80, 80) logits of the background and five classes."""

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.stamps import CLASSES
from examples.weights import load
from penjing.architectures import build

WEIGHTS = Path(__file__).with_name("unet.safetensors")


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return build("unet", classes=len(CLASSES) + 1, width=16, depth=3)


def unet() -> nn.Module:
    """Return the trained network in eval mode."""
    return load(untrained(), WEIGHTS)
