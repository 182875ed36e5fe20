"""Hard-label distillation: the teacher's most probable class replaces the label.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, at a temperature that goes to 0;
Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import at_least, check


def hard_labels(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the teacher's most probable class, averaged over all samples.

    Args:
        student: Logits (…, classes).
        teacher: Logits (…, classes).

    Returns:
        A scalar, in nats.
    """
    classes = student.shape[-1]
    return F.cross_entropy(student.reshape(-1, classes), teacher.reshape(-1, classes).argmax(1))


@dataclass(frozen=True, kw_only=True)
class HardLabels:
    """Train on the teacher's most probable class as the label (`hard_labels`).

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        weight: Weight of this loss in the training objective.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        inputs.logits()  # different classes are refused before training starts
        return lambda inputs: hard_labels(*inputs.logits())
