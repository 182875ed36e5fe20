"""Soft targets: the student gives the classes the probabilities that the teacher gives them.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import above, at_least, check


def soft_targets(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of softened classes, times the temperature's square, the mean over all samples.

    The gradient of softened classes falls with the temperature's square; so it keeps its size.

    Args:
        student: Logits (…, classes).
        teacher: Logits (…, classes).
        temperature: What both are divided by, above 0.

    Returns:
        A scalar, in nats.
    """
    classes = student.shape[-1]
    ours = F.log_softmax(student.reshape(-1, classes) / temperature, dim=1)
    theirs = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Soft targets (`soft_targets`).

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        temperature: What both networks' logits are divided by.
        weight: Of this term in the training loss.
    """

    temperature: float = 4.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, temperature=above(0), weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """(student's, teacher's) values inside the networks that are looked at: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch."""
        inputs.logits()  # other classes are refused before anything is trained
        return lambda inputs: soft_targets(*inputs.logits(), self.temperature)
