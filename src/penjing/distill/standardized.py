"""Logit standardization: what a student learns is how classes compare, not how large its logits are.

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
"""Added to the deviation: logits that are all equal become zeros."""


def standardized(logits: torch.Tensor) -> torch.Tensor:
    """(z − mean(z)) / std(z) over the classes of every sample.

    Args:
        logits: (…, classes).

    Returns:
        Of the same shape, without a unit: mean 0 and standard deviation 1 over the last axis.
    """
    centered = logits - logits.mean(-1, keepdim=True)
    return centered / (logits.std(-1, correction=0, keepdim=True) + _LEAST)


@dataclass(frozen=True, kw_only=True)
class StandardizedLogits:
    """A loss on logits, of logits that are standardized first (`standardized`), the student's and the teacher's.

    Shift and scale of a sample's logits do not count then: a smaller student need not reach its teacher's magnitudes.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        of: The loss, with its weight; the paper's temperature is 2.
    """

    of: Logits | DKD = Logits(temperature=2.0)

    def __post_init__(self) -> None:
        check(self, of=instance(Logits | DKD, "distill.Logits(...) or distill.DKD(...)"))

    @property
    def weight(self) -> float:
        """Of the term in the training loss: that of the loss."""
        return self.of.weight

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """(student's, teacher's) values inside the networks that are looked at: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch."""
        loss = self.of.loss(inputs)
        return lambda inputs: loss(_standardized(inputs))


def _standardized(inputs: DistillationInputs) -> DistillationInputs:
    """The same batch, its logits standardized; as (samples, classes), so that nothing has to tell the axis again."""
    student, teacher = (standardized(x.reshape(-1, x.shape[-1])) for x in inputs.logits())
    labels = isinstance(inputs.target, torch.Tensor) and not inputs.target.is_floating_point()
    return replace(
        inputs, student=student, teacher=teacher, target=inputs.target.reshape(-1) if labels else inputs.target
    )
