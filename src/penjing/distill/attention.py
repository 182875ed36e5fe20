"""Attention transfer: the student looks where the teacher looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.errors import TaskError
from penjing.steps.settings import at_least, check


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of attention maps, averaged over samples; a map is the normalized sum of squares over channels.

    The numbers of channels may differ. If the sizes differ, the larger is average-pooled to the smaller.

    Args:
        student: (samples, channels, height, width).
        teacher: (samples, channels, height, width).

    Returns:
        A scalar from 0 to 2.
    """
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])

    def attention(x: torch.Tensor) -> torch.Tensor:  # (samples, pixels)
        return F.normalize(F.adaptive_avg_pool2d(x.square().sum(1, keepdim=True), size).flatten(1), dim=1)

    return (attention(student) - attention(teacher)).square().sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """Match the spatial attention maps of both networks (`attention_transfer`), summed over all feature pairs.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, with feature maps of many channels. A single
            name stands for the same name in both.
        weight: Weight of this loss in the training objective.
    """

    features: tuple[tuple[str, str], ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        object.__setattr__(self, "features", paired(self))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch.

        Raises:
            TaskError: A feature is not an image.
        """
        for names, values in zip(self.features, inputs.pairs(self.features), strict=True):
            if any(value.dim() != 4 for value in values):
                raise TaskError(
                    "attention transfer compares feature maps",
                    code="not-feature-maps",
                    got=", ".join(f"{n}: {tuple(v.shape)}" for n, v in zip(names, values, strict=True)),
                    expected="(samples, channels, height, width)",
                    remedy="distill.Hints accepts features of any shape",
                )

        def loss(inputs: DistillationInputs) -> torch.Tensor:
            return torch.stack([attention_transfer(*pair) for pair in inputs.pairs(self.features)]).sum()

        return loss
