"""EfficientNet-Lite0 with its ImageNet weights. Input (batch, 3, 224, 224), output (batch, 1000) logits."""

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples import data


def lite0() -> nn.Module:
    """Return the trained network in eval mode: 4.65 million parameters."""
    return data.lite0()
