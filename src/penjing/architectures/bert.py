"""BERT: a text encoder with a classifier.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019; the
smaller sizes are those of Turc et al., "Well-Read Students Learn Better: On the Importance of Pre-training Compact
Models", arXiv 2019. All inputs are (batch, length) token ids, all outputs (batch, classes) logits.

There is no dropout on attention weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend to all tokens, or to those that the mask (N, 1, 1, L) allows."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        read = F.scaled_dot_product_attention(query, key, value, mask)
        mixed: torch.Tensor = self.output(read.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) to (N, heads, L, width/heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP of 4·width hidden channels, a norm behind each: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Add each branch to its input and normalize the sum."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        x = self.norm2(x + self.dropout(self.linear2(F.gelu(self.linear1(x)))))
        return x


class BERT(nn.Module):
    """Embeddings of tokens, positions and segments, blocks, pooler of the first token, linear classifier.

    Args:
        classes: Number of logits.
        vocabulary: Vocabulary size.
        length: Maximum number of tokens.
        width: Embedding dimension of a token.
        heads: Attention heads; None uses one per 64 channels, as in the paper.
        depth: Number of blocks.
        dropout: Dropout rate of the embeddings, of every branch and of the classifier's input.
        segments: Number of segment ids.
    """

    def __init__(
        self,
        *,
        classes: int,
        vocabulary: int,
        length: int,
        width: int,
        heads: int | None,
        depth: int,
        dropout: float = 0.1,
        segments: int = 2,
    ) -> None:
        super().__init__()
        heads = max(1, width // 64) if heads is None else heads
        for word, value in (
            *(("classes", classes), ("vocabulary", vocabulary), ("length", length), ("width", width)),
            *(("heads", heads), ("depth", depth), ("segments", segments)),
        ):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), not {width}")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.segments = nn.Embedding(segments, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, L) token ids to (N, classes).

        Args:
            ids: (N, L) integers from 0 to vocabulary - 1.
            mask: (N, L), true or 1 for tokens, false or 0 for padding; None attends to all tokens.
            segments: (N, L) integers, the segment of every token; None puts all in the first.
        """
        attention_mask = None if mask is None else mask.bool()[:, None, None, :]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = x + self.segments(torch.zeros_like(ids) if segments is None else segments)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, attention_mask)
        logits: torch.Tensor = self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))
        return logits


def bert_tiny(
    classes: int = 2,
    vocabulary: int = 30522,
    length: int = 512,
    width: int = 128,
    heads: int | None = None,
    depth: int = 2,
) -> BERT:
    """BERT-Tiny, of 2 heads: 4,386,178 parameters with the default arguments, 258 of them the classifier's."""
    return BERT(classes=classes, vocabulary=vocabulary, length=length, width=width, heads=heads, depth=depth)


def bert_small(
    classes: int = 2,
    vocabulary: int = 30522,
    length: int = 512,
    width: int = 512,
    heads: int | None = None,
    depth: int = 4,
) -> BERT:
    """BERT-Small, of 8 heads: 28,764,674 parameters with the default arguments, 1,026 of them the classifier's."""
    return BERT(classes=classes, vocabulary=vocabulary, length=length, width=width, heads=heads, depth=depth)


def bert_base(
    classes: int = 2,
    vocabulary: int = 30522,
    length: int = 512,
    width: int = 768,
    heads: int | None = None,
    depth: int = 12,
) -> BERT:
    """BERT-Base, of 12 heads: 109,483,778 parameters with the default arguments, 1,538 of them the classifier's."""
    return BERT(classes=classes, vocabulary=vocabulary, length=length, width=width, heads=heads, depth=depth)
