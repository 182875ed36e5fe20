"""A transformer of two blocks: input (batch, 96) word numbers, output (batch, 8) logits; 0.5 million parameters."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.weights import load
from penjing.architectures import build

WEIGHTS = Path(__file__).with_name("transformer.safetensors")
LENGTH, WORDS, CLASSES = 96, 6000, 8


class Reader(nn.Module):
    """A transformer that leaves padding, the word number 0, out of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build(
            "bert_tiny", classes=CLASSES, vocabulary=WORDS, length=LENGTH, width=64, heads=2, depth=2
        )

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """(N, 96) to (N, 8)."""
        return self.transformer(words, words > 0)


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return Reader()


def transformer() -> nn.Module:
    """Return the trained network in eval mode."""
    return load(untrained(), WEIGHTS)
