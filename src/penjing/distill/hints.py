"""Hints: values inside the student become those inside the teacher, through an adapter where the widths differ.

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
    """Mean squared difference, as a part of the teacher's mean square: 0 is equal, 1 what zeros would have.

    Args:
        student: Any shape.
        teacher: The same shape.

    Returns:
        A scalar without a unit.
    """
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Values inside both networks (`hint`), the mean over all pairs.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        features: (student's, teacher's) sites, or parts of the networks, whose last value is meant. A name alone stands
            for the same name in both.
        weight: Of this term in the training loss.
    """

    features: tuple[tuple[str, str], ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=at_least(0))
        object.__setattr__(self, "features", paired(self, self.features))

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """The loss of a batch, a module with one adapter a pair.

        Raises:
            TaskError: Values of a pair differ in more than their width, and are not images of two sizes.
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
    """A convolution of one pixel where the channels stand second, a linear layer where they stand last."""
    mine, theirs = tuple(student.shape), tuple(teacher.shape)
    axes = [len(mine) - 1] if len(mine) < 3 else [2, 1] if len(mine) == 3 else [1]

    def alike(axis: int) -> bool:  # but for the width; of images the larger is averaged down to the smaller
        others = [i for i in range(len(mine)) if i != axis and not (len(mine) == 4 and i > 1)]
        return len(mine) == len(theirs) and all(mine[i] == theirs[i] for i in others)

    axis = next((axis for axis in axes if alike(axis)), None)
    if axis is None:
        raise TaskError(
            "values inside student and teacher can't be compared",
            got=f"{names[0]}: {mine}, {names[1]}: {theirs}",
            expected="shapes that differ in their width alone, or images",
            remedy="name values at the same depth of both networks; distill.RKD compares values of any shapes",
        )
    if mine[axis] == theirs[axis]:
        return nn.Identity()
    if axis == len(mine) - 1:
        return nn.Linear(mine[axis], theirs[axis])
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(mine)]
    return convolution(mine[axis], theirs[axis], 1)
