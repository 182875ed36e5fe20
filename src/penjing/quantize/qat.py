"""Quantization-aware training: the network learns with its integers in place.

What learns is in `learner`; this is the step that trains it, towards labels and towards the source network. Batch norms
that are frozen towards the end: Krishnamoorthi, 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing.analyze.samples import batches
from penjing.distill import Outputs
from penjing.errors import RecipeError, TaskError
from penjing.quantize.learner import Learner, learned, learner
from penjing.steps.draft import Draft
from penjing.steps.hooks import Hook, TrainingEvent
from penjing.steps.settings import above, at_least, between, check, one_of
from penjing.steps.step import Context
from penjing.surgery import KeepZeros
from penjing.tasks.task import Call
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train

METHODS = ("lsq", "pact", "ste")


@dataclass(frozen=True, kw_only=True)
class QAT:
    """Train weights, and with them the scales of the plan, behind quantizers.

    Batch norms that were folded live again while the network learns, behind their quantized layers; at the end they
    go into the scales of the weights, channel by channel, so that the integers stay what they were.

    Attributes:
        method: "lsq" learns the scales of weights and activations, "pact" the upper ends of activations, "ste"
            leaves all ranges as they are.
        data: "train" takes `Task.train`; "calibration" takes `Task.calibration` and no labels, and the source network
            alone says what is right.
        epochs: Passes over the data.
        minutes: An upper bound, see `Finetune`.
        learning_rate: Peak of the schedule.
        optimizer: "sgd" or "adamw".
        weight_decay: On weights.
        clip: What keeps gradients within a norm. The first steps after few bits came in are far from the teacher.
        distill: Weight of the distance to the source network's outputs beside `Task.loss`; 0 leaves it out.
        temperature: Of the softened classes that are compared, see `penjing.distill.Outputs`.
        freeze_norms: Fraction of the steps after which batch norms keep their statistics.
        freeze_ranges: Fraction of the steps after which scales stay.
        autocast: As in `Finetune`; "auto" is off where weights have more than 4 bits, for bfloat16 keeps 8.
    """

    stage: ClassVar[str] = "train integers"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    method: Literal["lsq", "pact", "ste"] = "lsq"
    data: Literal["train", "calibration"] = "train"
    epochs: float = 1.0
    minutes: float | None = None
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    clip: Clip | tuple[Clip, ...] = Clip()
    distill: float = 1.0
    temperature: float = 4.0
    freeze_norms: float = 0.7
    freeze_ranges: float = 0.9
    autocast: Literal["auto", "bf16", "off"] = "auto"

    def __post_init__(self) -> None:
        check(
            self,
            method=one_of(*METHODS),
            data=one_of("train", "calibration"),
            distill=at_least(0),
            temperature=above(0),
            freeze_norms=between(0, 1),
            freeze_ranges=between(0, 1),
        )
        if self.data == "calibration" and self.distill == 0:
            raise RecipeError(
                "QAT without labels and without a teacher learns nothing",
                got="data='calibration', distill=0",
                expected="distill above 0, or data='train'",
            )
        self._settings(())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and the plan's learned scales."""
        if not draft.plan:
            return draft
        if self.data == "train" and context.task.train is None:
            raise TaskError(
                "quantization-aware training needs training data",
                got="Task.train is None",
                expected="an iterable of (inputs, target)",
                remedy="give Task(train=loader, loss=...), or QAT(data='calibration') to learn without labels",
            )
        if self.data == "train" and self.distill == 0 and context.task.loss is None:
            raise TaskError(
                "quantization-aware training has nothing to learn from",
                got="Task.loss is None, and QAT(distill=0)",
                expected="loss(output, target) -> scalar tensor, or distill above 0",
                remedy="for classes: Task(loss=torch.nn.functional.cross_entropy)",
            )
        network = learner(draft, context, self.method)
        teacher = context.source if context.source is not None else draft.network
        task = context.task
        if self.data == "calibration":
            task = replace(task, train=_Unlabelled(context), loss=None)
        hooks: tuple[Hook, ...] = (_Freeze(self.freeze_norms, self.freeze_ranges), KeepZeros(draft.sparse))
        bits = [e.spec.bits for edge, e in draft.plan.entries.items() if edge.endswith(":weight")]
        settings = replace(self._settings(hooks), task_loss_weight=1.0 if task.loss is not None else 0.0)
        if self.autocast == "auto" and max(bits, default=8) > 4:
            settings = replace(settings, autocast="off")
        return learned(draft, train(network, replace(context, task=task, source=teacher), settings))

    def _settings(self, hooks: tuple[Hook, ...]) -> Finetune:
        return Finetune(
            epochs=self.epochs,
            minutes=self.minutes,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            clip=self.clip,
            autocast=self.autocast,
            distill=(Outputs(temperature=self.temperature, weight=self.distill),) if self.distill else (),
            hooks=hooks,
        )


@dataclass(frozen=True)
class _Freeze:
    """Batch norms keep their statistics and scales their values after a fraction of the steps."""

    norms: float
    ranges: float

    def __call__(self, moment: TrainingEvent) -> None:
        done = moment.step / max(1, moment.steps)
        for module in moment.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and done >= self.norms:
                module.eval()
            if isinstance(module, Learner) and done >= self.ranges:
                module.scale.requires_grad_(False)
                module.scale.grad = None


class _Unlabelled:
    """Calibration data as training data whose target is None, in batches of 16, mixed in pairs.

    Between two samples of floating-point inputs lies another that the teacher can answer (Zhang et al., "mixup",
    ICLR 2018; Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022): some
    hundred samples alone would be learned by heart.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for args, kwargs in batches(self.context, 2**62):
            mixed: Call = pytree.tree_map_only(torch.Tensor, _Mix(), (args, kwargs))
            yield (mixed[1] if mixed[1] else mixed[0]), None


class _Mix:
    """Mixes half of the samples with others; every tensor of one call in the same way."""

    def __init__(self) -> None:
        self.order: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.dim() == 0:
            return x
        if self.order is None or len(self.order) != len(x):
            self.order = torch.randperm(len(x))
            part = torch.rand(len(x))
            self.part = torch.where(torch.rand(len(x)) < 0.5, torch.ones_like(part), part)
        part = self.part.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return part * x + (1 - part) * x[self.order]
