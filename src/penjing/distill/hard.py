"""Hard labels: the teacher's most probable class takes the place of the label.

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
    """Cross-entropy to the teacher's most probable class, the mean over all samples.

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
    """The teacher's most probable class as label (`hard_labels`).

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        weight: Of this term in the training loss.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """(student's, teacher's) values inside the networks that are looked at: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch."""
        inputs.logits()  # other classes are refused before anything is trained
        return lambda inputs: hard_labels(*inputs.logits())
