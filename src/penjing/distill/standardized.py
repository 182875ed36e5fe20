"""Logit standardization: the student learns the relation between classes, not the magnitude of logits.

Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from penjing.distill.dkd import DKD
from penjing.distill.logits import Logits
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import check, instance

_LEAST = 1e-7
"""Added to the standard deviation, so that logits that are all equal become zeros."""


def standardized(logits: torch.Tensor) -> torch.Tensor:
    """Standardize the logits of every sample over its classes: (z − mean(z)) / std(z).

    Args:
        logits: (…, classes).

    Returns:
        Same shape: mean 0 and standard deviation 1 over the last axis.
    """
    centered = logits - logits.mean(-1, keepdim=True)
    return centered / (logits.std(-1, correction=0, keepdim=True) + _LEAST)


@dataclass(frozen=True, kw_only=True)
class StandardizedLogits:
    """Apply a logit loss to standardized logits (`standardized`) of student and teacher.

    The loss no longer depends on shift and scale of a sample's logits, so a smaller student need not reach its
    teacher's magnitudes.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        of: The loss, with its weight; the paper's temperature is 2.
    """

    of: Logits | DKD = Logits(temperature=2.0)

    def __post_init__(self) -> None:
        check(self, of=instance(Logits | DKD, "distill.Logits(...) or distill.DKD(...)"))

    @property
    def weight(self) -> float:
        """Weight in the training objective: that of the wrapped loss."""
        return self.of.weight

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        loss = self.of.loss(inputs)
        return lambda inputs: loss(_standardized(inputs))


def _standardized(inputs: DistillationInputs) -> DistillationInputs:
    """The same batch with standardized logits, reshaped to (samples, classes), so that the class axis is known."""
    student, teacher = (standardized(x.reshape(-1, x.shape[-1])) for x in inputs.logits())
    labels = isinstance(inputs.target, torch.Tensor) and not inputs.target.is_floating_point()
    return replace(
        inputs, student=student, teacher=teacher, target=inputs.target.reshape(-1) if labels else inputs.target
    )
