"""DIST: student and teacher agree on correlations between classes and samples, not on exact probabilities.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import above, at_least, check


def correlations(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """1 − Pearson's correlation of softened probabilities, over classes and over samples, times temperature².

    Args:
        student: Logits (samples, classes).
        teacher: Logits (samples, classes).
        temperature: Divides both, above 0.

    Returns:
        Two scalars: between the classes of each sample (the mean over samples), and between the samples of each class
        (the mean over classes).
    """
    ours, theirs = (torch.softmax(x / temperature, dim=1) for x in (student, teacher))
    between = 1 - _pearson(ours, theirs).mean()
    within = 1 - _pearson(ours.t(), theirs.t()).mean()
    return between * temperature**2, within * temperature**2


def _pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation of every row of (rows, values) with the corresponding row."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return torch.cosine_similarity(a, b, dim=1, eps=1e-8)


@dataclass(frozen=True, kw_only=True)
class DIST:
    """Match correlations instead of probabilities (`correlations`), for teachers much stronger than the student.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        temperature: Divides the logits of both networks.
        between: Weight of the correlation between the classes of a sample.
        within: Weight of the correlation between the samples of a class.
        weight: Weight of this loss in the training objective.
    """

    temperature: float = 1.0
    between: float = 2.0
    within: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, temperature=above(0), between=at_least(0), within=at_least(0), weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        inputs.logits()  # different classes are refused before training starts

        def loss(inputs: DistillationInputs) -> torch.Tensor:
            student, teacher = (x.reshape(-1, x.shape[-1]) for x in inputs.logits())
            between, within = correlations(student, teacher, self.temperature)
            return self.between * between + self.within * within

        return loss
