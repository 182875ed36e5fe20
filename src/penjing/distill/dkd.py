"""Decoupled knowledge distillation: target class and non-target classes are weighted separately.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import above, at_least, between, check

_OUT = 1000.0
"""Subtracted from the target class's logit, so that its probability among the others becomes 0."""


def decoupled(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float, alpha: float, beta: float
) -> torch.Tensor:
    """α · KL of (target class, all others) + β · KL among the non-target classes, times the squared temperature.

    With α = 1 and β = the teacher's probability of all non-target classes it equals the soft-target loss.

    Args:
        student: Logits (samples, classes).
        teacher: Logits (samples, classes).
        target: Target classes (samples,) int64.
        temperature: Divides both, above 0.
        alpha: Weight of the target class against all others.
        beta: Weight of the non-target classes among themselves.

    Returns:
        A scalar, in nats.
    """
    true = F.one_hot(target, student.shape[1]).bool()
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))

    def two(logs: torch.Tensor) -> torch.Tensor:  # (samples, 2): the target class, all others
        return torch.stack([logs[true], torch.logsumexp(logs.masked_fill(true, -torch.inf), dim=1)], dim=1)

    def others(x: torch.Tensor) -> torch.Tensor:  # (samples, classes): among the non-target classes
        return F.log_softmax(x / temperature - _OUT * true, dim=1)

    target_class = F.kl_div(two(ours), two(theirs), reduction="batchmean", log_target=True)
    other_classes = F.kl_div(others(student), others(teacher), reduction="batchmean", log_target=True)
    return (alpha * target_class + beta * other_classes) * temperature**2


@dataclass(frozen=True, kw_only=True)
class DKD:
    """Decoupled knowledge distillation (`decoupled`). It needs integer labels; negative labels are ignored.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        temperature: Divides the logits of both networks.
        alpha: Weight of the target class against all others.
        beta: Weight of the non-target classes among themselves; the paper uses 2 to 8, more for a more confident
            teacher.
        warmup: Fraction of the training over which the loss ramps up to its weight: with such a `beta` it is initially
            many times the task's loss. The paper uses 20 of 240 epochs.
        weight: Weight of this loss in the training objective.
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 4.0
    warmup: float = 0.1
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, temperature=above(0), alpha=at_least(0), beta=at_least(0), warmup=between(0, 1), weight=at_least(0))

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: none."""
        return ()

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""
        inputs.logits()  # different classes are refused before training starts

        def loss(inputs: DistillationInputs) -> torch.Tensor:
            student, teacher = (x.reshape(-1, x.shape[-1]) for x in inputs.logits())
            classes = inputs.classes()
            there = (classes >= 0) & (classes < student.shape[1])
            if not there.any():
                return 0.0 * student.sum()
            grown = min(1.0, inputs.done / self.warmup) if self.warmup else 1.0
            student, teacher, classes = student[there], teacher[there], classes[there]
            return grown * decoupled(student, teacher, classes, self.temperature, self.alpha, self.beta)

        return loss
