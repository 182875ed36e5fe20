"""Pruning in rounds with training between them: what was removed is made up for before the next channels go.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, section 3.3 (iterative
pruning); Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from penjing.draft import Draft
from penjing.errors import RecipeError
from penjing.finetune import Finetune
from penjing.prune.channels import Channels
from penjing.step import Context


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Prune in rounds, and fine-tune after each.

    Every round keeps the same fraction of what the round before it left, so that all rounds together keep what `step`
    asks for: 0.5 in three rounds is three times 0.794.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        step: What is pruned, with the target of all rounds together.
        finetune: The training after every round.
        rounds: How many there are; 1 is pruning at once.
    """

    step: Channels
    finetune: Finetune
    rounds: int = 3
    for_floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fine = {
            "step": (isinstance(self.step, Channels), "prune.Channels(...)"),
            "finetune": (isinstance(self.finetune, Finetune), "Finetune(...)"),
            "rounds": (isinstance(self.rounds, int) and self.rounds >= 1, "a whole number of at least 1"),
        }
        for name, (good, expected) in fine.items():
            if not good:
                raise RecipeError(f"Iterative({name}=...) can't be used", got=getattr(self, name), expected=expected)

    @property
    def per_runtime(self) -> bool:
        """Whether what is removed depends on the runtime."""
        return self.step.per_runtime

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a pruned and trained draft."""
        unit = self.step.unit
        share = getattr(self.step, unit) ** (1 / self.rounds)
        for turn in range(self.rounds):
            context.events("progress", label="pruning rounds", done=turn, total=self.rounds)
            folder = context.folder / f"round-{turn}" if context.folder else None
            if folder:
                folder.mkdir(exist_ok=True)
            draft = replace(self.step, **{unit: share})(draft, context)
            draft = self.finetune(draft, replace(context, folder=folder))
        context.events("progress", label="pruning rounds", done=self.rounds, total=self.rounds)
        return draft
