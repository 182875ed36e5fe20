"""Sparsity that rises while the network trains, fast at first and slowly at the end.

Zhu & Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", ICLR workshop 2018:
s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(n·Δt))³. Here s_i is 0; weights that are zero already go first.

In the paper a weight that was removed keeps its value behind the mask and may come back. Here it is zero and stays
zero: the mask is the weights themselves, and a resumed training needs nothing else.
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
from penjing.steps.settings import between, check, whole
from penjing.steps.step import Context
from penjing.train.finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Train, and on the way set more and more of the smallest weights to zero.

    Zhu & Gupta, "To Prune, or Not to Prune", ICLR workshop 2018.

    In YAML: ``- prune.Gradual: {step: {prune.Magnitude: {sparsity: 0.9}}, finetune: {Finetune: {epochs: 3}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        step: What is removed in the end: its sparsity, pattern, scope and layers. Its criterion is "magnitude".
        finetune: The training.
        begin: Fraction of the training's steps before which nothing is removed.
        end: Fraction after which the mask stays; the rest of the training goes on with it.
        every: Steps between two of the masks.
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
        if not isinstance(self.step, Magnitude) or not isinstance(self.finetune, Finetune):
            raise RecipeError(
                "Gradual holds two steps",
                got=f"step={self.step!r}, finetune={self.finetune!r}",
                expected="Gradual(step=Magnitude(sparsity=0.8), finetune=Finetune(epochs=3))",
            )
        check_schedule(self)
        fine = {
            'criterion="magnitude"': self.step.criterion == "magnitude",
            "a sparsity, and no threshold": self.step.threshold is None,
            'a pattern with sparsities in between: "unstructured" or blocks': not Pattern.parse(self.step.pattern).of,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError("Gradual can't raise the sparsity of this step", got=self.step, expected=wrong[0])

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and zeros."""
        modules = prunable(draft.network, self.step.layers, self.step.keep)
        hook = _Raise(tuple(modules), self.step, self.begin, self.end, self.every)
        settings = replace(self.finetune, hooks=(*self.finetune.hooks, hook))
        done = settings(marked(draft, modules), context)  # the training keeps the zeros of what is marked
        tell(done, context, "Gradual", modules)
        return done


@dataclass(frozen=True)
class _Raise:
    """A hook that removes as many weights as it is time for."""

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
        sizes = {name: by_output(m, m.weight.detach().abs()) for name, m in modules.items()}
        for name, kept in replace(self.step, sparsity=sparsity).kept(sizes).items():
            zero(modules[name].weight, ~as_stored(modules[name], kept), moment.optimizer)


def zero(parameter: torch.Tensor, gone: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set weights to zero, in place, and with them what the optimizer remembers: momentum would move them again."""
    parameter.data.masked_fill_(gone, 0.0)
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value.masked_fill_(gone, 0.0)


def due(moment: TrainingEvent, final: float, begin: float, end: float, every: int) -> float | None:
    """The sparsity that the mask of this moment shall have; None where no mask is due."""
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
            got=f"begin={settings.begin}, end={settings.end}",
            expected="fractions of the training, begin before end",
        )


__all__ = ["Gradual", "check_schedule", "due", "sparsity_at", "zero"]
