"""Hints: intermediate features of the student match those of the teacher, through an adapter if the widths differ.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from penjing.distill.settings import paired
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.errors import TaskError
from penjing.steps.settings import at_least, check


def hint(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference relative to the teacher's mean square: 0 for equal values, 1 for zeros.

    Args:
        student: Any shape.
        teacher: The same shape.

    Returns:
        A dimensionless scalar.
    """
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Match intermediate features (`hint`), averaged over all feature pairs.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, which stand for their last output. A single
            name stands for the same name in both.
        weight: Weight of this loss in the training objective.
    """

    features: tuple[tuple[str, str], ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        object.__setattr__(self, "features", paired(self))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss of a batch, a module with one adapter per feature pair.

        Raises:
            TaskError: The features of a pair differ in more than their width, and are not feature maps of different
                size.
        """
        return _Hints(self.features, inputs)


class _Hints(nn.Module):
    def __init__(self, features: tuple[tuple[str, str], ...], inputs: DistillationInputs) -> None:
        super().__init__()
        self.features = features
        self.adapters = nn.ModuleList(
            _adapter((mine, theirs), inputs.student_features[mine], inputs.teacher_features[theirs])
            for mine, theirs in features
        )

    def forward(self, inputs: DistillationInputs) -> torch.Tensor:
        parts = []
        for adapter, (mine, theirs) in zip(self.adapters, self.features, strict=True):
            student, teacher = adapter(inputs.student_features[mine]), inputs.teacher_features[theirs]
            if student.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
                student = nn.functional.adaptive_avg_pool2d(student, (teacher.shape[2], teacher.shape[3]))
            parts.append(hint(student, teacher))
        return torch.stack(parts).mean()


def _adapter(names: tuple[str, str], student: torch.Tensor, teacher: torch.Tensor) -> nn.Module:
    """A 1×1 convolution if the channels are axis 1, a linear layer if they are the last axis."""
    mine, theirs = tuple(student.shape), tuple(teacher.shape)
    axes = [len(mine) - 1] if len(mine) < 3 else [2, 1] if len(mine) == 3 else [1]

    def alike(axis: int) -> bool:  # apart from the width; feature maps may differ in size
        others = [i for i in range(len(mine)) if i != axis and not (len(mine) == 4 and i > 1)]
        return len(mine) == len(theirs) and all(mine[i] == theirs[i] for i in others)

    axis = next((axis for axis in axes if alike(axis)), None)
    if axis is None:
        raise TaskError(
            "features of student and teacher can't be compared",
            code="shape",
            got=f"{names[0]}: {mine}, {names[1]}: {theirs}",
            expected="shapes that differ only in width, or feature maps",
            remedy="name features at the same depth of both networks; distill.RKD compares features of any shape",
        )
    if mine[axis] == theirs[axis]:
        return nn.Identity()
    if axis == len(mine) - 1:
        return nn.Linear(mine[axis], theirs[axis])
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(mine)]
    return convolution(mine[axis], theirs[axis], 1)
