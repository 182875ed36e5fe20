"""The settings of a training, with their checks: what the loop, its schedule and its optimizer read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn
from torch.utils import _pytree as pytree

from penjing.distill.outputs import Outputs
from penjing.distill.stored import TeacherCache
from penjing.distill.teaching import Distillation, Teacher
from penjing.errors import RecipeError
from penjing.steps.hooks import Hook
from penjing.steps.settings import (
    FLAG,
    FUNCTIONS,
    Rule,
    above,
    at_least,
    between,
    check,
    instance,
    number,
    one_of,
    optional,
    whole,
)
from penjing.steps.step import Context
from penjing.train.clipping import Clip
from penjing.train.objective import Loss
from penjing.train.schedules import SCHEDULES


def _ways(distill: Any) -> bool:
    ways = distill if isinstance(distill, tuple) else (distill,)
    names = ("loss", "features", "weight")
    return distill == "auto" or all(all(hasattr(w, n) for n in names) and not isinstance(w, type) for w in ways)


def _teachers(teacher: Any) -> bool:
    several = teacher if isinstance(teacher, tuple) else (teacher,)
    words = [t for t in several if isinstance(t, str)]
    # A network that was written as its repr, as a record keeps it, is not a path.
    paths = all(word.strip() and "\n" not in word and not word.endswith(")") for word in words)
    return bool(several) and paths and all(isinstance(t, nn.Module | TeacherCache | str) for t in several)


def _clips(clip: Any) -> bool:
    return all(isinstance(c, Clip) for c in (clip if isinstance(clip, tuple) else (clip,)))


RULES = {
    "epochs": above(0),
    "steps": optional(whole()),
    "minutes": optional(above(0)),
    "learning_rate": above(0),
    "optimizer": one_of("sgd", "adamw"),
    "weight_decay": at_least(0),
    "warmup": between(0, 1),
    "schedule": one_of(*SCHEDULES),
    "accumulate": whole(),
    "label_smoothing": number(least=0, below=1),
    "ema": optional(number(above=0, below=1)),
    "clip": Rule(_clips, "penjing.Clip(threshold=1.0), one or several"),
    "autocast": one_of("auto", "bf16", "off"),
    "channels_last": FLAG,
    "losses": FUNCTIONS,
    "distill": Rule(_ways, "penjing.distill.Logits() or its like, with loss, features and weight; or a tuple of them"),
    "teacher": optional(
        Rule(
            _teachers,
            "a network, 'teacher.pt2', a Hugging Face folder, distill.TeacherCache, a tuple of them, or 'self'",
        )
    ),
    "task_loss_weight": at_least(0),
    "hooks": FUNCTIONS,
    "workers": whole(),
    "cluster": optional(instance(str, "'local', or an address")),
    "save_every_s": above(0),
}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The fields of `penjing.Finetune`, which describes them.

    Raises:
        RecipeError: A setting makes no sense.
    """

    epochs: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema: float | None = None
    clip: Clip | tuple[Clip, ...] = ()
    autocast: Literal["auto", "bf16", "off"] = "auto"
    channels_last: bool = True
    losses: tuple[Loss, ...] = ()
    distill: Distillation | tuple[Distillation, ...] | Literal["auto"] = "auto"
    teacher: Teacher = None
    task_loss_weight: float = 1.0
    hooks: tuple[Hook, ...] = ()
    workers: int = 1
    cluster: str | None = None
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        plain = pytree.tree_map(lambda t: str(t) if isinstance(t, Path) else t, self.teacher)
        object.__setattr__(self, "teacher", plain)
        check(self, **RULES)
        alone = self.workers == 1
        if (self.cluster is None) != alone:
            raise RecipeError(
                "Finetune(cluster=...) can't be used with these workers",
                code="settings",
                field="cluster",
                got=f"cluster={self.cluster!r}, workers={self.workers}",
                expected="'local', or an address, for workers above 1; None for one",
            )
        several = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        if any(isinstance(t, TeacherCache) and t.teacher is not None for t in several) and not alone:
            raise RecipeError(
                "several workers can't write a teacher's answers into one folder",
                code="shared-cache",
                got=f"TeacherCache with its teacher, workers={self.workers}",
                expected="TeacherCache(folder), whose answers are all there",
                remedy="train one epoch with workers=1 first, or ask the teacher at every step",
            )
        if self.task_loss_weight == 0 and self.distill == () and not self.losses:
            raise _nothing_to_learn("task_loss_weight=0, distill=()")
        if self.teacher is not None and self.distill == ():
            raise RecipeError(
                "a teacher is named, and nothing is learned from it",
                code="idle-teacher",
                got="teacher=..., distill=()",
                expected="a way to imitate it, for example distill=penjing.distill.Logits()",
                remedy="leave distill at 'auto', or leave out the teacher",
            )

    @property
    def distillations(self) -> tuple[Distillation, ...]:
        """`distill` as a tuple; empty while it is "auto"."""
        if self.distill == "auto":
            return ()
        return self.distill if isinstance(self.distill, tuple) else (self.distill,)

    @property
    def clips(self) -> tuple[Clip, ...]:
        """`clip` as a tuple."""
        return self.clip if isinstance(self.clip, tuple) else (self.clip,)

    def resolved(self, context: Context, changed: bool) -> Self:
        """These settings with "auto" replaced: by the teacher's outputs where the network was changed, or one is named.

        Raises:
            RecipeError: There are neither labels nor a teacher.
        """
        alone = self.task_loss_weight == 0 and not self.losses
        if alone and self.clip == ():
            return replace(self, clip=Clip()).resolved(context, changed)
        if self.distill != "auto":
            return self
        taught = context.source is not None if self.teacher is None else True
        if alone and not taught:
            raise _nothing_to_learn("task_loss_weight=0, and no teacher")
        distills = taught and (changed or alone or self.teacher is not None)
        return replace(self, distill=(Outputs(),) if distills else ())


def _nothing_to_learn(got: str) -> RecipeError:
    return RecipeError(
        "training without labels and without a teacher learns nothing",
        code="nothing-to-learn",
        got=got,
        expected="task_loss_weight above 0, or distill=penjing.distill.Logits()",
    )
