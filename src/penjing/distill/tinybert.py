"""Layer to layer: a transformer's hidden states and its attention's scores become those of a deeper or wider one.

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
        A scalar, in the square of the values' unit.
    """
    return F.mse_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class TinyBERT:
    """Hidden states and attention scores (`layer_to_layer`), the sum over all pairs.

    What a mask hides counts as 0 on both sides. A linear layer brings hidden states of another width to the teacher's;
    it is trained beside the student and thrown away.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        hidden: (student's, teacher's) names of layers, or of parts of the networks, whose last value is (samples,
            tokens, width). A name alone stands for the same name in both.
        attention: (student's, teacher's) names of attentions, or of parts of the networks with one.
        weight: Of this term in the training loss.
    """

    hidden: tuple[tuple[str, str], ...] = ()
    attention: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        for name in ("hidden", "attention"):
            object.__setattr__(self, name, paired(self, getattr(self, name), least=0))
        if not self.features:
            raise RecipeError(
                "TinyBERT needs layers to look at",
                got="none",
                expected="names of hidden states, or of attentions",
                remedy='for example TinyBERT(hidden=(("layers.1", "layers.3"),), attention=("layers.0",))',
            )

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """(student's, teacher's) values inside the networks that are looked at."""
        return (*self.hidden, *((f"{mine}:scores", f"{theirs}:scores") for mine, theirs in self.attention))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch, a module with one linear layer for each pair of other widths.

        Raises:
            TaskError: Heads, tokens or dimensions differ.
        """
        for names, pair in zip(self.features, inputs.pairs(self.features), strict=True):
            mine, theirs = (tuple(value.shape) for value in pair)
            alike = mine[:-1] == theirs[:-1] if names in self.hidden else mine == theirs
            if not alike:
                raise TaskError(
                    "layers of student and teacher can't be compared",
                    got=f"{names[0]}: {mine}, {names[1]}: {theirs}",
                    expected="as many heads and tokens" if names[0].endswith(":scores") else "as many tokens",
                    remedy="compare hidden states alone where the heads differ",
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
