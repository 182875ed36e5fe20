"""A tagger of characters: input (batch, 96) character numbers, output (batch, 96, 9) scores of tags.

Dilated convolutions over time. Strubell et al., "Fast and Accurate Entity Recognition with Iterated Dilated
Convolutions", EMNLP 2017.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.weights import load

WEIGHTS = Path(__file__).with_name("tagger.safetensors")
CHARACTERS, LENGTH, TAGS = 64, 96, 9


class Tagger(nn.Module):
    """Embedding, six residual convolutions with dilations from 1 to 32, and a linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**step, dilation=2**step) for step in range(6)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(6))
        self.output = nn.Linear(width, TAGS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """(N, 96) to (N, 96, 9)."""
        x = self.embedding(characters).transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + torch.relu(norm(convolution(x)))
        return self.output(x.transpose(1, 2))


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return Tagger()


def tagger() -> nn.Module:
    """Return the trained network in eval mode."""
    return load(untrained(), WEIGHTS)
