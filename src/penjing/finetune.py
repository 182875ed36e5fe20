"""One plain training loop, itself a step. Losses and hooks plug in; nothing hides the module.

Schedules are in `penjing.budget`, optimizers in `penjing.optimizers`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from torch import nn
from torch.utils import _pytree as pytree

from penjing.budget import SCHEDULES
from penjing.clipping import Clip
from penjing.distill.outputs import Outputs
from penjing.distill.stored import Stored
from penjing.draft import Draft
from penjing.errors import RecipeError, in_percent
from penjing.hooks import Hook
from penjing.objective import Loss
from penjing.parallel import Group, spread
from penjing.step import Context
from penjing.surgery.sparse import KeepZeros
from penjing.teaching import Distillation, Teacher, opened
from penjing.training import Loop

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train the network on `task.train`.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        epochs: Passes over `task.train`; fractions are allowed.
        steps: Updates of the weights, in the place of `epochs`.
        minutes: An upper bound. The steps that fit are counted from a few timed ones; there are fewer where the
            training turns out slower.
        learning_rate: Peak of the schedule.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        weight_decay: On weights of two and more dimensions; biases and norms are spared.
        warmup: Fraction of the steps in which the rate rises to its peak.
        schedule: How the rate goes on from its peak: "cosine" or "linear" down to zero, or "constant".
        accumulate: Batches whose gradients make one update; batch norms see each batch by itself.
        label_smoothing: Part of the labels' weight that all classes share (Szegedy et al. 2016); for losses that are
            cross-entropies of classes.
        ema: Decay of a running average of weights and statistics, for example 0.999, which is what is returned (Polyak
            & Juditsky 1992); it is shorter in the first steps. None returns the last weights.
        clip: What keeps gradients or weights within a norm (`penjing.Clip`), one or several. Without labels, gradients
            are kept within `Clip()` where nothing else is said: outputs of any size are followed, and their squares
            have no bound.
        autocast: "auto" uses bfloat16 where the processor computes it natively; "bf16" or "off" decide. On a CPU
            depthwise convolutions stay in 32 bits, in which they are faster.
        channels_last: Memory format of networks with 2-D convolutions, where it repeats to the bit.
        losses: Terms of yours that are added to `task.loss` (which `labels=0` leaves out).
        distill: Ways to imitate a teacher (`penjing.distill`), one or several; their weighted terms are added.
            "auto" is `distill.Outputs()` where the recipe has changed the structure or removed weights before, where
            `labels` is 0 without `losses`, and where a teacher is named.
        teacher: Who is imitated: None takes the source network, "self" the network as it is before the training; or
            any module, a ``.pt2`` file or a Hugging Face folder by its path, or `penjing.distill.Stored`; or several
            of them, whose outputs are averaged.
        labels: Weight of `task.loss`; with 0 the training needs neither labels nor a loss.
        hooks: Called at every moment of the loop.
        workers: Processes that share every batch, see `penjing.parallel`.
        cluster: Where they run: "local" starts Ray on this machine; else an address that `ray.init` takes.
        save_every_s: Seconds between two saved states, if the context has a folder.
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

    def resolved(self, context: Context, changed: bool) -> Finetune:
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

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights; the zeros of `draft.sparse` stay."""
        settings = self.resolved(context, changed=bool(draft.edits))
        if draft.sparse:
            settings = replace(settings, hooks=(*settings.hooks, KeepZeros(draft.sparse)))
        return replace(draft, network=train(copy.deepcopy(draft.network), context, settings))


def train(network: M, context: Context, settings: Finetune) -> M:
    """Train `network` in place and return it in eval mode, where it was. Same seed, data and threads: same bits.

    The loader must start anew at every pass and draw its order and its augmentation from the global generators of
    torch, NumPy or `random`, which are seeded at the start of every epoch; then a resumed run continues to the same
    bits. The state to resume from is ``finetune.pt`` in `context.folder`.

    Raises:
        TaskError: The task has no training data or no loss, or they are of the wrong form.
        TrainingError: Nothing can be trained, or the loss or a weight is not finite.
        CheckpointError: The saved state is damaged, holds code, or belongs to other settings or another network.
        OutputError: The state can't be saved.
    """
    if settings.workers > 1 and settings.cluster is not None:
        home = next((p.device for p in network.parameters()), None)
        resolved = settings.resolved(context, changed=False)
        there = lambda t: t if t is None or t == "self" else opened(t, context.task)  # noqa: E731
        resolved = replace(resolved, teacher=pytree.tree_map(there, settings.teacher))
        spread(_work, network, context, resolved, settings.cluster, settings.workers)
        return network.to(home).eval()
    return _work(network, context, settings, Group())  # type: ignore[return-value]


def _work(network: nn.Module, context: Context, settings: Finetune, group: Group) -> nn.Module:
    return Loop(network, context, settings, group).run()


def _nothing_to_learn(got: str) -> RecipeError:
    return RecipeError(
        "training without labels and without a teacher learns nothing",
        got=got,
        expected="labels above 0, or distill=penjing.distill.Logits()",
    )
