"""Relational distillation: distances and angles between the samples of a batch, not the samples themselves.

Park et al., "Relational Knowledge Distillation", CVPR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.steps.settings import at_least, check


def distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss between the distances of all pairs of samples, normalized by their mean.

    Args:
        student: (samples, values).
        teacher: (samples, values), of any width.

    Returns:
        A scalar, averaged over all ordered pairs, including a sample with itself.
    """
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def angles(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss between the cosines of the angles formed by all triples of samples.

    Args:
        student: (samples, values).
        teacher: (samples, values), of any width.

    Returns:
        A scalar, averaged over all ordered triples, including those with a repeated sample.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _distances(x: torch.Tensor) -> torch.Tensor:
    distance_matrix = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # exact for samples that are close
    mean = distance_matrix.sum() / (distance_matrix > 0).sum().clamp_min(
        1
    )  # a single sample, or equal samples, have no distance
    return distance_matrix / mean.clamp_min(1e-12)


def _cosines(x: torch.Tensor) -> torch.Tensor:
    lines = F.normalize(x[None] - x[:, None], dim=2)  # (corner, to, values)
    return lines @ lines.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class RKD:
    """Match distances and angles between samples (`distances`, `angles`), summed over all feature pairs.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, whose values are flattened. A single name
            stands for the same name in both; without any, the networks' outputs.
        distance: Weight of the distances.
        angle: Weight of the angles.
        weight: Weight of this loss in the training objective.
    """

    features: tuple[tuple[str, str], ...] = ()
    distance: float = 25.0
    angle: float = 50.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, distance=at_least(0), angle=at_least(0), weight=at_least(0))
        object.__setattr__(self, "features", paired(self, least=0))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch."""

        def loss(inputs: DistillationInputs) -> torch.Tensor:
            parts = []
            for student, teacher in inputs.pairs(self.features):
                a, b = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
                parts.append(self.distance * distances(a, b) + self.angle * angles(a, b))
            return torch.stack(parts).sum()

        return loss
