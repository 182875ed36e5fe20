"""GPT-2: an autoregressive language model.

Radford et al., "Language Models are Unsupervised Multitask Learners", OpenAI, 2019. All inputs are (batch, length)
token ids, all outputs (batch, length, vocabulary) logits of the next token.

There is no dropout on attention weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Causal self-attention with one projection for query, key and value: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to the token itself and to previous tokens."""
        query, key, value = (self._split(part) for part in self.qkv(x).chunk(3, -1))
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: torch.Tensor = self.output(read.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) to (N, heads, L, width/heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP of 4·width hidden channels, each behind a norm: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add each branch to its input."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = F.gelu(self.linear1(self.norm2(x)), approximate="tanh")
        x = x + self.dropout(self.linear2(hidden))
        return x


class GPT(nn.Module):
    """Embeddings of tokens and positions, blocks, norm, output layer tied to the token embedding.

    Args:
        vocabulary: Vocabulary size.
        length: Maximum number of tokens.
        width: Embedding dimension of a token.
        heads: Attention heads; None uses one per 64 channels, as in the paper.
        depth: Number of blocks.
        dropout: Dropout rate of the embeddings and of every branch.
    """

    def __init__(
        self, *, vocabulary: int, length: int, width: int, heads: int | None, depth: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        heads = max(1, width // 64) if heads is None else heads
        for word, value in (
            *(("vocabulary", vocabulary), ("length", length), ("width", width)),
            *(("heads", heads), ("depth", depth)),
        ):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), not {width}")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # The initialization of residual branches shrinks with depth.
                added = name.endswith((".output", ".linear2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if added else 0.02)
            if isinstance(module, nn.Linear) and module is not self.head:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions.weight, std=0.01)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, L) token ids to (N, L, vocabulary)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.dropout(x))))
        return logits


def gpt_tiny(
    vocabulary: int = 256, length: int = 256, width: int = 128, heads: int | None = None, depth: int = 4
) -> GPT:
    """A small GPT for bytes, of 2 heads: 858,880 parameters with the default arguments. No published weights."""
    return GPT(vocabulary=vocabulary, length=length, width=width, heads=heads, depth=depth)


def gpt2(
    vocabulary: int = 50257, length: int = 1024, width: int = 768, heads: int | None = None, depth: int = 12
) -> GPT:
    """The smallest GPT-2, of 12 heads: 124,439,808 parameters with the default arguments."""
    return GPT(vocabulary=vocabulary, length=length, width=width, heads=heads, depth=depth)
