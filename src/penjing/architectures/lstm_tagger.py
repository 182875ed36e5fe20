"""LSTM tagger: sequence labelling from the context on both sides.

Huang et al., "Bidirectional LSTM-CRF Models for Sequence Tagging", arXiv 2015, without the conditional random field:
tags are predicted independently. All inputs are (batch, length) token ids, all outputs
(batch, length, classes) logits.
"""

from __future__ import annotations

import torch
from torch import nn


class LSTMTagger(nn.Module):
    """Embedding, LSTM layers, a linear classifier per token.

    Args:
        classes: Number of tags.
        vocabulary: Vocabulary size.
        embedding: Channels of a token.
        width: Size of the hidden state, per direction.
        depth: Number of LSTM layers.
        bidirectional: Whether layers run in both directions.
    """

    def __init__(
        self, *, classes: int, vocabulary: int, embedding: int, width: int, depth: int, bidirectional: bool
    ) -> None:
        super().__init__()
        for word, value in (
            *(("classes", classes), ("vocabulary", vocabulary), ("embedding", embedding)),
            *(("width", width), ("depth", depth)),
        ):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, depth, batch_first=True, bidirectional=bidirectional)
        self.classifier = nn.Linear(2 * width if bidirectional else width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, L) token ids to (N, L, classes)."""
        states, _ = self.lstm(self.tokens(ids))
        logits: torch.Tensor = self.classifier(states)
        return logits


def lstm_tagger(
    classes: int = 9,
    vocabulary: int = 10_000,
    embedding: int = 50,
    width: int = 300,
    depth: int = 1,
    bidirectional: bool = True,
) -> LSTMTagger:
    """LSTM tagger: 1,350,209 parameters with the default arguments."""
    return LSTMTagger(
        classes=classes,
        vocabulary=vocabulary,
        embedding=embedding,
        width=width,
        depth=depth,
        bidirectional=bidirectional,
    )
