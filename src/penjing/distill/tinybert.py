"""Layer-to-layer distillation: a transformer's hidden states and attention scores match those of a larger one.

Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020, equations 7 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.errors import RecipeError, TaskError
from penjing.steps.settings import at_least, check


def layer_to_layer(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of hidden states, or of attention scores before the softmax.

    Args:
        student: (samples, tokens, width), or (samples, heads, tokens, tokens).
        teacher: The same shape.

    Returns:
        A scalar, in the squared unit of the values.
    """
    return F.mse_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class TinyBERT:
    """Match hidden states and attention scores (`layer_to_layer`), summed over all pairs.

    Masked positions count as 0 on both sides. A linear layer maps hidden states to the teacher's width if it differs;
    it is trained with the student and discarded.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        hidden: (student's, teacher's) names of layers, or of parts of the networks, whose last output is (samples,
            tokens, width). A single name stands for the same name in both.
        attention: (student's, teacher's) names of attentions, or of parts of the networks with one.
        weight: Weight of this loss in the training objective.
    """

    hidden: tuple[tuple[str, str], ...] = ()
    attention: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        for name in ("hidden", "attention"):
            object.__setattr__(self, name, paired(self, name, least=0))
        if not self.features:
            raise RecipeError(
                "TinyBERT needs layers to compare",
                code="no-features",
                got="none",
                expected="names of hidden states, or of attentions",
                remedy='for example TinyBERT(hidden=(("layers.1", "layers.3"),), attention=("layers.0",))',
            )

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads."""
        return (*self.hidden, *((f"{mine}:scores", f"{theirs}:scores") for mine, theirs in self.attention))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch, a module with one linear layer for each pair of different widths.

        Raises:
            TaskError: Heads, tokens or dimensions differ.
        """
        for names, pair in zip(self.features, inputs.pairs(self.features), strict=True):
            mine, theirs = (tuple(value.shape) for value in pair)
            alike = mine[:-1] == theirs[:-1] if names in self.hidden else mine == theirs
            if not alike:
                raise TaskError(
                    "layers of student and teacher can't be compared",
                    code="shape",
                    got=f"{names[0]}: {mine}, {names[1]}: {theirs}",
                    expected="equal numbers of heads and tokens"
                    if names[0].endswith(":scores")
                    else "equal numbers of tokens",
                    remedy="compare hidden states alone if the heads differ",
                )
        return _TinyBERT(self.features, len(self.hidden), inputs)


class _TinyBERT(nn.Module):
    def __init__(self, features: tuple[tuple[str, str], ...], hidden: int, inputs: DistillationInputs) -> None:
        super().__init__()
        self.features = features
        widths = [(a.shape[-1], b.shape[-1]) for a, b in inputs.pairs(features)]
        self.adapters = nn.ModuleList(
            nn.Linear(a, b) if i < hidden and a != b else nn.Identity() for i, (a, b) in enumerate(widths)
        )

    def forward(self, inputs: DistillationInputs) -> torch.Tensor:
        pairs = zip(self.adapters, inputs.pairs(self.features), strict=True)
        return torch.stack([layer_to_layer(adapter(mine), theirs) for adapter, (mine, theirs) in pairs]).sum()
