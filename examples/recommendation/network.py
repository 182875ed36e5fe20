"""NeuMF: inputs user (batch,) and film (batch,), output (batch, 1), the larger the likelier the user watches the film.

He et al., "Neural Collaborative Filtering", WWW 2017: a product of embeddings beside a perceptron on others.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.weights import load

WEIGHTS = Path(__file__).with_name("neumf.safetensors")
USERS, FILMS = 943, 1682


class NeuMF(nn.Module):
    """Two pairs of embeddings, a perceptron of three layers, and a joint linear layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.user_factors, self.film_factors = nn.Embedding(USERS, width), nn.Embedding(FILMS, width)
        self.users, self.films = nn.Embedding(USERS, width), nn.Embedding(FILMS, width)
        self.perceptron = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(2 * width, width), nn.ReLU()
        )
        self.output = nn.Linear(2 * width, 1)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)

    def forward(self, user: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        """(N,) and (N,) to (N, 1)."""
        factors = self.user_factors(user) * self.film_factors(film)
        mixed = self.perceptron(torch.cat([self.users(user), self.films(film)], dim=-1))
        return self.output(torch.cat([factors, mixed], dim=-1))


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return NeuMF()


def neumf() -> nn.Module:
    """Return the trained network in eval mode."""
    return load(untrained(), WEIGHTS)
