"""Distillation from outputs of any kind, the default for a pruned or quantized network.

Classes: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penjing.distill.logits import soft_targets
from penjing.distill.teaching import DistillationInputs, DistillationLoss
from penjing.errors import TaskError
from penjing.steps.settings import above, at_least, check
from penjing.tasks.outputs import flatten_outputs


def relative_noise(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Noise power over signal power: the squared differences over the teacher's squares, of all outputs together.

    Args:
        student: Tensors of any shapes.
        teacher: Tensors of the same shapes.

    Returns:
        A dimensionless scalar: 0 for equal outputs, 1 for zeros.
    """
    noise = torch.stack([(a - b).square().sum() for a, b in zip(student, teacher, strict=True)]).sum()
    return noise / torch.stack([b.square().sum() for b in teacher]).sum().clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Use `soft_targets` if the labels show that the output is classes, otherwise `relative_noise`.

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
        ours, theirs = _floats(inputs.student), _floats(inputs.teacher)
        if [x.shape for x in ours] != [x.shape for x in theirs]:
            raise TaskError(
                "student and teacher have different outputs",
                code="outputs",
                got=", ".join(f"{[tuple(x.shape) for x in side]}" for side in (ours, theirs)),
                expected="the same outputs in the same order",
                remedy="another teacher, or a loss on features alone, for example distill.Hints"
                if len(ours) <= len(theirs)
                else "distill.Logits uses the first output alone, which is what distill.TeacherCache stores",
            )

        def loss(inputs: DistillationInputs) -> torch.Tensor:
            if _of_classes(inputs):
                return soft_targets(*inputs.logits(), self.temperature)
            return relative_noise(_floats(inputs.student), _floats(inputs.teacher))

        return loss


def _floats(output: object) -> list[torch.Tensor]:
    return [x.float() for x in flatten_outputs(output)[0] if x.is_floating_point()]


def _of_classes(inputs: DistillationInputs) -> bool:
    """Whether the labels are integers, one per row of logits of the only output."""
    outputs, target = _floats(inputs.student), inputs.target
    if len(outputs) != 1 or not isinstance(target, torch.Tensor) or target.is_floating_point():
        return False
    (output,) = outputs
    shape = output.shape
    rows = [shape[:1] + shape[2:], shape[:-1]]
    return len(shape) > 1 and target.shape in rows and shape[inputs.axis(output)] > 1
