"""Gradual magnitude pruning: the sparsity rises during training, fast at first and slowly at the end.

Zhu & Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", ICLR workshop 2018:
s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(n·Δt))³. Here s_i is 0; weights that are zero already are removed first.

In the paper a pruned weight keeps its value behind the mask and may come back. Here it is set to zero and stays zero:
the zeros are the mask, and a resumed training needs no other state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from penjing.errors import RecipeError
from penjing.prune.magnitude import Magnitude
from penjing.prune.masks import Pattern, fraction
from penjing.prune.weights import as_stored, by_output, marked, prunable, tell
from penjing.steps.draft import Draft
from penjing.steps.hooks import TrainingEvent
from penjing.steps.settings import between, check, instance, whole
from penjing.steps.step import Context
from penjing.train.finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Train, and set more and more of the smallest weights to zero on the way.

    Zhu & Gupta, "To Prune, or Not to Prune", ICLR workshop 2018.

    In YAML: ``- prune.Gradual: {step: {prune.Magnitude: {sparsity: 0.9}}, finetune: {Finetune: {epochs: 3}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        step: The final sparsity, pattern, scope and layers. Its criterion has to be "magnitude".
        finetune: The training.
        begin: The fraction of the training steps at which pruning begins.
        end: The fraction at which the final sparsity is reached; the rest of the training keeps that mask.
        every: Training steps between mask updates.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    step: Magnitude = Magnitude(sparsity=0.8)
    finetune: Finetune = Finetune()
    begin: float = 0.0
    end: float = 0.75
    every: int = 20

    def __post_init__(self) -> None:
        check(
            self,
            step=instance(Magnitude, "prune.Magnitude(sparsity=0.8)"),
            finetune=instance(Finetune, "Finetune(epochs=3)"),
        )
        check_schedule(self)
        fine = {
            'criterion="magnitude"': self.step.criterion == "magnitude",
            "a sparsity, and no threshold": self.step.threshold is None,
            'a pattern with sparsities in between: "unstructured" or blocks': not Pattern.parse(self.step.pattern).of,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError(
                "Gradual can't raise the sparsity of this step",
                code="settings",
                field="step",
                got=self.step,
                expected=wrong[0],
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and zeros."""
        modules = prunable(draft.network, self.step.layers, self.step.keep)
        hook = _Prune(tuple(modules), self.step, self.begin, self.end, self.every)
        settings = replace(self.finetune, hooks=(*self.finetune.hooks, hook))
        done = settings(marked(draft, modules), context)  # the training keeps the zeros of what is marked
        tell(done, context, "Gradual", modules)
        return done


@dataclass(frozen=True)
class _Prune:
    """A hook that raises the sparsity as scheduled."""

    layers: tuple[str, ...]
    step: Magnitude
    begin: float
    end: float
    every: int

    def __call__(self, moment: TrainingEvent) -> None:
        final = fraction(self.step.sparsity, self.step.pattern)
        sparsity = due(moment, final, self.begin, self.end, self.every)
        if sparsity is None:
            return
        modules: dict[str, Any] = {name: moment.network.get_submodule(name) for name in self.layers}
        magnitudes = {name: by_output(m, m.weight.detach().abs()) for name, m in modules.items()}
        for name, mask in replace(self.step, sparsity=sparsity).masks(magnitudes).items():
            zero(modules[name].weight, ~as_stored(modules[name], mask), moment.optimizer)


def zero(parameter: torch.Tensor, gone: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set weights and their optimizer state to zero, in place: momentum would move them away from zero again."""
    parameter.data.masked_fill_(gone, 0.0)
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value.masked_fill_(gone, 0.0)


def due(moment: TrainingEvent, final: float, begin: float, end: float, every: int) -> float | None:
    """The scheduled sparsity of a mask update at this training event; None where none is due."""
    first, last = math.floor(begin * moment.steps), max(1, math.ceil(end * moment.steps))
    if moment.name != "step" or not first <= moment.step <= last:
        return None
    if (moment.step - first) % every and moment.step != last:
        return None
    return sparsity_at((moment.step - first) / (last - first), final)


def sparsity_at(progress: float, final: float, initial: float = 0.0) -> float:
    """s_f + (s_i − s_f)·(1 − progress)³.

    >>> [round(sparsity_at(p, 0.8), 3) for p in (0, 0.25, 0.5, 1)]
    [0.0, 0.463, 0.7, 0.8]
    """
    return final + (initial - final) * (1 - progress) ** 3


def check_schedule(settings: Any) -> None:
    """Raise RecipeError for a schedule (`begin`, `end`, `every`) that makes no sense."""
    check(settings, begin=between(0, 1), end=between(0, 1), every=whole())
    if settings.begin >= settings.end:
        raise RecipeError(
            f"{type(settings).__name__} ends before it begins",
            code="contradiction",
            field="begin",
            got=f"begin={settings.begin}, end={settings.end}",
            expected="fractions of the training, begin before end",
        )


__all__ = ["Gradual", "check_schedule", "due", "sparsity_at", "zero"]
