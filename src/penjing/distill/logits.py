"""Soft targets: the student matches the teacher's softened class probabilities.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import above, at_least, check


def soft_targets(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of softened class probabilities, times the squared temperature, averaged over all samples.

    The gradient of softened probabilities falls with the squared temperature; the factor compensates for that.

    Args:
        student: Logits (…, classes).
        teacher: Logits (…, classes).
        temperature: Divides both, above 0.

    Returns:
        A scalar, in nats.
    """
    classes = student.shape[-1]
    ours = F.log_softmax(student.reshape(-1, classes) / temperature, dim=1)
    theirs = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Match the teacher's softened class probabilities (`soft_targets`).

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        temperature: Divides the logits of both networks.
        weight: Weight of this loss in the training objective.
    """

    temperature: float = 4.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, temperature=above(0), weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        inputs.logits()  # different classes are refused before training starts
        return lambda inputs: soft_targets(*inputs.logits(), self.temperature)
