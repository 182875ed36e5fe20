"""The loss of a training batch: the task's loss, the user's terms, and label smoothing.

Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from penjing.errors import TaskError, TrainingError
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task


@dataclass(frozen=True)
class Batch:
    """What a loss receives: the call, its output, the target, the network and the step number."""

    call: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    target: Any
    network: nn.Module
    step: int


class Loss(Protocol):
    """One term of the training loss: a scalar tensor from a `Batch`."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The term of this batch."""
        ...


class Objective:
    """The supervised terms of a batch's loss, by name.

    Args:
        task: Its loss is a term, where it has one.
        losses: Terms of the user, beside it.
        weight: Of the task's loss; 0 leaves it out.
        label_smoothing: Part of the task's loss that all classes share.

    Raises:
        TaskError: There is nothing to learn from labels with.
    """

    def __init__(self, task: Task, losses: Sequence[Loss], weight: float, label_smoothing: float) -> None:
        if weight and not losses and task.loss is None:
            raise TaskError(
                "fine-tuning needs a loss",
                code="no-loss",
                got="Task.loss is None",
                expected="loss(output, target) -> scalar tensor",
                remedy="for classes: Task(loss=torch.nn.functional.cross_entropy)",
            )
        if label_smoothing and task.loss is None:
            raise TaskError(
                "label smoothing needs the task's own loss",
                code="no-loss",
                got=f"label_smoothing={label_smoothing:g}, and Task.loss is None",
                expected="loss(output, target) -> scalar tensor",
                remedy="smooth in the loss that is there: cross_entropy(..., label_smoothing=0.1)",
            )
        self.task, self.losses, self.weight, self.label_smoothing = task, losses, weight, label_smoothing

    def __call__(self, batch: Batch) -> list[tuple[str, torch.Tensor]]:
        """The terms of a batch, scalars each; the task's own is called "labels".

        Raises:
            TaskError: A term is not a single number.
        """
        labels = self.weight and self.task.loss is not None
        own = [("labels", self.weight * scalar(self._task_loss(batch)))] if labels else []
        return own + [(_called(loss, i), scalar(loss(batch))) for i, loss in enumerate(self.losses)]

    def _task_loss(self, batch: Batch) -> torch.Tensor:
        assert self.task.loss is not None
        loss, part = self.task.loss(batch.output, batch.target), self.label_smoothing
        return loss if not part else (1 - part) * scalar(loss) + part * _uniform(batch, scalar(loss))


def _uniform(batch: Batch, loss: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with all classes alike; what the task's loss ignores (torch's `ignore_index`) is left out."""
    output, target = first_output(batch.output), batch.target
    good = isinstance(target, torch.Tensor) and not target.is_floating_point() and output.dim() > 1
    if not good or target.shape != output.shape[:1] + output.shape[2:]:
        got = " and ".join(f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                           for x in (output, target))  # fmt: skip
        raise TaskError(
            "label smoothing needs classes",
            code="not-classes",
            got=got,
            expected="logits (samples, classes, …) and integers (samples, …)",
            remedy="leave label_smoothing at 0 and smooth in the task's own loss",
        )
    there = (target >= 0) & (target < output.shape[1])
    if loss.requires_grad and output.requires_grad:  # a class may be ignored too, and only the loss knows which
        (slope,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        counted = there & (slope != 0).any(1) if slope is not None else there
        there = torch.where(counted.any(), counted, there)  # answers that could not be surer have no slope either
    return -nn.functional.log_softmax(output, 1).mean(1)[there].mean()


def scalar(loss: Any) -> torch.Tensor:
    """A loss as a tensor without dimensions.

    Raises:
        TaskError: It is not a single number.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss.reshape(())
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise TaskError(
        "a loss is not a single number",
        code="not-a-scalar",
        got=got,
        expected="a scalar tensor",
        remedy="end it with .mean()",
    )


def no_gradient(terms: Iterable[str]) -> TrainingError:
    """The error of a loss, the sum of these terms, that nothing can be learned from."""
    return TrainingError(
        "the loss has no gradient",
        code="no-gradient",
        got=", ".join(terms) + ": no way back to a weight",
        expected="a loss that is computed from the network's output by torch",
        remedy="leave out .detach(), .numpy() and torch.no_grad() in the loss and in the network",
    )


def _called(loss: Loss, position: int) -> str:
    """What a term of the user's is called in the events."""
    name = getattr(loss, "__name__", type(loss).__name__)
    return name if name != "loss" and not position else f"{name} {position + 1}"
