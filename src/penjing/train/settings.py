"""The settings of a training, with their checks: what the loop, its schedule and its optimizer read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from torch import nn
from torch.utils import _pytree as pytree

from penjing.distill.outputs import Outputs
from penjing.distill.stored import Stored
from penjing.distill.teaching import Distillation, Teacher
from penjing.errors import RecipeError, in_percent
from penjing.steps.hooks import Hook
from penjing.steps.step import Context
from penjing.train.clipping import Clip
from penjing.train.objective import Loss
from penjing.train.schedules import SCHEDULES


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
    labels: float = 1.0
    hooks: tuple[Hook, ...] = ()
    workers: int = 1
    cluster: str | None = None
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        plain = pytree.tree_map(lambda t: str(t) if isinstance(t, Path) else t, self.teacher)
        object.__setattr__(self, "teacher", plain)
        above = ["epochs", "learning_rate", "save_every_s"]
        above += ["minutes"] if self.minutes is not None else []
        numbers = [*above, "weight_decay", "warmup", "label_smoothing", "labels", *(["ema"] if self.ema else [])]
        for name in numbers:
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise RecipeError(f"Finetune({name}=...) can't be used", got=repr(value), expected="a number")
        fine = {name: (0 < getattr(self, name) < math.inf, "a number above 0") for name in above}
        fine["weight_decay"] = (0 <= self.weight_decay < math.inf, "a number of at least 0")
        fine["warmup"] = (0 <= self.warmup <= 1, "a fraction from 0 to 1")
        for name in ("steps", "accumulate", "workers"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            fine[name] = (whole or (name == "steps" and value is None), "a whole number of at least 1")
        fine["cluster"] = (
            self.cluster is None if self.workers == 1 else isinstance(self.cluster, str),
            "'local', or an address, for workers above 1; None for one",
        )
        fine["channels_last"] = (isinstance(self.channels_last, bool), "True or False")
        fine["label_smoothing"] = (0 <= self.label_smoothing < 1, "a fraction of at least 0, below 1")
        fine["ema"] = (self.ema is None or 0 < self.ema < 1, "a number between 0 and 1, for example 0.999")
        fine["clip"] = (all(isinstance(c, Clip) for c in self.clips), "penjing.Clip(threshold=1.0), one or several")
        fine["labels"] = (0 <= self.labels < math.inf, "a number of at least 0")
        ways = [
            all(hasattr(d, name) for name in ("term", "features", "weight")) and not isinstance(d, type)
            for d in self.distillations
        ]
        like = "penjing.distill.Logits() or its like, with term, features and weight; or a tuple of them"
        fine["distill"] = (all(ways), like)
        fine["schedule"] = (self.schedule in tuple(SCHEDULES), "'cosine', 'linear' or 'constant'")
        fine["optimizer"] = (self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'")
        fine["autocast"] = (self.autocast in ("auto", "bf16", "off"), "'auto', 'bf16' or 'off'")
        for name in ("losses", "hooks"):
            value = getattr(self, name)
            fine[name] = (isinstance(value, tuple) and all(map(callable, value)), "a tuple of functions")
        several = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        words = [t for t in several if isinstance(t, str)]
        named = all(isinstance(t, nn.Module | Stored | str) for t in several)
        # A network that was written as its repr, as a record keeps it, is no path.
        paths = all(word.strip() and "\n" not in word and not word.endswith(")") for word in words)
        fine["teacher"] = (
            self.teacher is None or (named and paths and several != ()),
            "a network, 'teacher.pt2', a Hugging Face folder, distill.Stored, a tuple of them, 'self', or None: the "
            "source",
        )
        writes = any(isinstance(t, Stored) and t.teacher is not None for t in several)
        if writes and self.workers > 1:
            raise RecipeError(
                "several workers can't write a teacher's answers into one folder",
                got=f"Stored with its teacher, workers={self.workers}",
                expected="Stored(folder), whose answers are all there",
                remedy="train one epoch with workers=1 first, or ask the teacher at every step",
            )
        for name, (good, expected) in fine.items():
            if not good:
                got = repr(getattr(self, name))
                remedy = in_percent(got, expected)
                raise RecipeError(f"Finetune({name}=...) can't be used", got=got, expected=expected, remedy=remedy)
        if self.labels == 0 and self.distill == () and not self.losses:
            raise _nothing_to_learn("labels=0, distill=()")
        if self.teacher is not None and self.distill == ():
            raise RecipeError(
                "a teacher is named, and nothing is learned from it",
                got="teacher=..., distill=()",
                expected="a way to imitate it, for example distill=penjing.distill.Logits()",
                remedy="leave distill at 'auto', or leave out the teacher",
            )

    @property
    def distillations(self) -> tuple[Distillation, ...]:
        """`distill` as a tuple; "auto" is none yet."""
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
        alone = self.labels == 0 and not self.losses
        if alone and self.clip == ():
            return replace(self, clip=Clip()).resolved(context, changed)
        if self.distill != "auto":
            return self
        taught = context.source is not None if self.teacher is None else True
        if alone and not taught:
            raise _nothing_to_learn("labels=0, and no teacher")
        wanted = changed or alone or self.teacher is not None
        return replace(self, distill=(Outputs(),) if taught and wanted else ())


def _nothing_to_learn(got: str) -> RecipeError:
    return RecipeError(
        "training without labels and without a teacher learns nothing",
        got=got,
        expected="labels above 0, or distill=penjing.distill.Logits()",
    )
