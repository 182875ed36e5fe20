"""The sentence encoder all-MiniLM-L6-v2: inputs (batch, 64) tokens and mask, output (batch, 384) embeddings.

Wang et al., "MiniLM", NeurIPS 2020; trained by Reimers and others on a billion pairs. 22.7 million parameters.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples import data


class Encoder(nn.Module):
    """The mean of the tokens' vectors, without padding."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(N, 64) and (N, 64) to (N, 384)."""
        tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask[..., None].to(tokens.dtype)
        return (tokens * counted).sum(1) / counted.sum(1).clamp(min=1)


def minilm() -> nn.Module:
    """Return the encoder with its trained weights, in eval mode."""
    from transformers import AutoModel

    return Encoder(AutoModel.from_pretrained(data.minilm())).eval()
