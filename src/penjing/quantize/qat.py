"""Quantization-aware training: the network is trained with fake quantizers in place.

`learner` builds the trainable network; this step trains it, on labels and on the source network's outputs. Freezing
batch norms towards the end: Krishnamoorthi, 2018, section 3.2.
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
from penjing.steps.hooks import TrainingEvent
from penjing.steps.plan import LISTED
from penjing.steps.settings import between, check, instance, one_of
from penjing.steps.step import Context
from penjing.tasks.task import Call, Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train

METHODS = ("lsq", "pact", "ste")


@dataclass(frozen=True, kw_only=True)
class QAT:
    """Train the weights, and with them the scales of the plan, with fake quantizers in place.

    Folded batch norms are reinserted behind their quantized layers for the training; at the end they are folded into
    the weights' scales, channel by channel, so that the integers stay the same.

    In YAML: ``- quantize.QAT: {finetune: {Finetune: {epochs: 5, weight_decay: 0.0001}}}``.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        finetune: The training settings. `distill="auto"` always means `penjing.distill.Outputs` of the source here.
            Without `clip`, gradients are clipped by `Clip()`: the first steps at few bits are far from the teacher.
            `autocast="auto"` is off if weights have more than 4 bits, because bfloat16 has only 8.
        method: "lsq" learns the scales of weights and activations, "pact" the upper bounds of activations, "ste" leaves
            all ranges as calibrated. Integers of a codebook (`Static(weight_entries=...)`) are learned with each.
        data: "train" takes `Task.train`; "calibration" takes `Task.calibration` and no labels, with the teacher alone
            as the target.
        freeze_norms: Fraction of the steps after which batch-norm statistics are frozen.
        freeze_ranges: Fraction of the steps after which scales are frozen.
    """

    stage: ClassVar[str] = "train integers"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    finetune: Finetune = Finetune(weight_decay=1e-4)
    method: Literal["lsq", "pact", "ste"] = "lsq"
    data: Literal["train", "calibration"] = "train"
    freeze_norms: float = 0.7
    freeze_ranges: float = 0.9

    def __post_init__(self) -> None:
        check(
            self,
            finetune=instance(Finetune, "Finetune(...)"),
            method=one_of(*METHODS),
            data=one_of("train", "calibration"),
            freeze_norms=between(0, 1),
            freeze_ranges=between(0, 1),
        )
        if self.finetune.workers > 1:
            raise RecipeError(
                "QAT trains in one process",
                code="workers",
                got=f"Finetune(workers={self.finetune.workers})",
                expected="Finetune(workers=1)",
                remedy="a Finetune before the quantization step may have several workers",
            )
        if self.data == "calibration" and self.finetune.distill == () and not self.finetune.losses:
            raise RecipeError(
                "QAT without labels and without a teacher has nothing to learn from",
                code="no-loss",
                got="data='calibration', finetune=Finetune(distill=())",
                expected="a distillation loss, or data='train'",
            )

    def training(self, task: Task) -> Finetune:
        """Resolve `finetune` for a task: `distill="auto"` replaced, and the task's loss dropped if there are no labels.

        Raises:
            TaskError: The task has no training data, or there is nothing to learn from.
        """
        if self.data == "train" and task.train is None:
            raise TaskError(
                "quantization-aware training needs training data",
                code="no-training-data",
                got="Task.train is None",
                expected="an iterable of (inputs, target)",
                remedy="give Task(train=loader, loss=...), or QAT(data='calibration') to learn without labels",
            )
        settings = self.finetune
        labels = self.data == "train" and task.loss is not None
        if not labels and settings.distill == () and not settings.losses:
            raise TaskError(
                "quantization-aware training has nothing to learn from",
                code="no-loss",
                got="Task.loss is None, and Finetune(distill=())",
                expected="loss(output, target) -> scalar tensor, or a distillation loss",
                remedy="for classes: Task(loss=torch.nn.functional.cross_entropy)",
            )
        return replace(
            settings,
            task_loss_weight=settings.task_loss_weight if labels else 0.0,
            distill=(Outputs(),) if settings.distill == "auto" else settings.distill,
            clip=settings.clip or Clip(),
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and the plan's learned scales."""
        if not draft.plan:
            return draft
        settings = self.training(context.task)
        network = learner(draft, context, self.method)
        teacher = context.source if context.source is not None else draft.network
        task = context.task
        if self.data == "calibration":
            task = replace(task, train=_Unlabelled(context), loss=None)
        weights = {e.removesuffix(":weight"): v.spec for e, v in draft.plan.entries.items() if e.endswith(":weight")}
        few = tuple(layer for layer, spec in weights.items() if spec.grid == LISTED)
        hooks = (
            *settings.hooks,
            _Freeze(self.freeze_norms, self.freeze_ranges),
            *((_NoSignFlips(few),) if few else ()),
        )
        settings = replace(settings, hooks=hooks)
        if settings.autocast == "auto" and max((spec.bits for spec in weights.values()), default=8) > 4:
            settings = replace(settings, autocast="off")
        return learned(draft, train(network, replace(context, task=task, source=teacher), settings, draft.sparse))


@dataclass(frozen=True)
class _Freeze:
    """Freezes batch-norm statistics and scales after a fraction of the steps."""

    norms: float
    ranges: float

    def __call__(self, moment: TrainingEvent) -> None:
        done = moment.step / max(1, moment.steps)
        for module in moment.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and done >= self.norms:
                module.eval()
            if isinstance(module, Learner) and done >= self.ranges:
                for trained in module.parameters():
                    trained.requires_grad_(False)
                    trained.grad = None


@dataclass(frozen=True)
class _NoSignFlips:
    """Keeps factors of batch norms from turning the sign of a channel, whose integers need not be in a codebook."""

    layers: tuple[str, ...]

    def __call__(self, moment: TrainingEvent) -> None:
        norms = getattr(moment.network, "norms", None)
        for layer in self.layers if moment.name == "step" else ():
            norm: Any = getattr(norms, layer.replace(".", "_"), None)
            if norm is not None:
                with torch.no_grad():
                    norm.weight.clamp_(min=0)


class _Unlabelled:
    """Calibration data as training data whose target is None, in batches of 16, mixed in pairs.

    Interpolations of floating-point inputs are new samples for which the teacher provides targets (Zhang et al.,
    "mixup", ICLR 2018; Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022):
    the network would overfit a few hundred samples alone.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for args, kwargs in batches(self.context, 2**62):
            mixed: Call = pytree.tree_map_only(torch.Tensor, _Mix(), (args, kwargs))
            yield (mixed[1] if mixed[1] else mixed[0]), None


class _Mix:
    """Mixes half of the samples with others, in the same way for every tensor of a call."""

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
