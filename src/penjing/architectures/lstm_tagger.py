"""LSTM tagger: gives every token of a text a tag, from the tokens on both sides.

Huang et al., "Bidirectional LSTM-CRF Models for Sequence Tagging", arXiv 2015, without the conditional random field:
the tags of a text are decided one by one. All inputs are (batch, length) token ids, all outputs
(batch, length, classes) logits.
"""

from __future__ import annotations

import torch
from torch import nn


class LSTMTagger(nn.Module):
    """Embedding, layers of LSTM, a linear classifier of every token.

    Args:
        classes: Number of different tags.
        vocabulary: Number of different tokens.
        embedding: Channels of a token.
        width: Channels of the hidden state, of each direction.
        depth: Number of LSTM layers.
        bidirectional: True for layers that also read from the end; False sees only the tokens before.
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
