"""Similarity-preserving distillation: samples that are similar in the teacher are similar in the student.

Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import at_least, check


def similarity_preserving(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the samples' Gram matrices with normalized rows.

    Args:
        student: (samples, …), flattened to vectors.
        teacher: (samples, …), flattened to vectors of any length.

    Returns:
        A scalar, averaged over all pairs of samples.
    """

    def similarity(x: torch.Tensor) -> torch.Tensor:  # (samples, samples)
        x = x.reshape(len(x), -1)
        return F.normalize(x @ x.t(), dim=1)

    return (similarity(student) - similarity(teacher)).square().mean()


@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving:
    """Match the pairwise similarity of samples (`similarity_preserving`), summed over all feature pairs.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks. A single name stands for the same name in
            both; without any, the networks' outputs.
        weight: Weight of this loss in the training objective; the paper uses 3,000.
    """

    features: tuple[tuple[str, str], ...] = ()
    weight: float = 3000.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        object.__setattr__(self, "features", paired(self, least=0))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        return lambda inputs: torch.stack([similarity_preserving(*pair) for pair in inputs.pairs(self.features)]).sum()
