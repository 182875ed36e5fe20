"""Pruning in rounds with training between them: what was removed is made up for before more goes.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, section 3.3 (iterative
pruning); Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017.

Rewinding the weights: Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; late rewinding: Frankle et al.,
"Stabilizing the Lottery Ticket Hypothesis", 2019, and "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
ICML 2020. Without it, rounds are what Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning",
ICLR 2020, call learning-rate rewinding: weights go on from where they are, and every training starts its schedule anew.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from penjing.analyze import meter
from penjing.analyze.coupling import couple
from penjing.errors import PruningError, RecipeError
from penjing.prune.channels import Channels
from penjing.prune.magnitude import Magnitude
from penjing.prune.masks import Pattern, fraction
from penjing.steps.draft import Draft
from penjing.steps.hooks import Hook, TrainingEvent
from penjing.steps.settings import at_least, check, instance, one_of, whole
from penjing.steps.step import Context
from penjing.surgery import resize
from penjing.surgery.resize import RESIZING
from penjing.train.finetune import Finetune, train

_EARLY = "_early"  # the part of a network that holds its early state while it trains


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Prune in rounds, and fine-tune after each.

    After round k of n a part of s^(k/n) is kept, so that all rounds together keep the s that `step` asks for: 0.5 in
    three rounds is 0.794, then 0.63, then 0.5. What a round took too much, as channels come in multiples, the next one
    takes less. A sparsity s is 1 − (1 − s)^(k/n) after round k.

    With ``rewind="weights"`` the network is trained once before the first round; then every round prunes the trained
    network, puts what is left back to its early weights, and trains it again. That is one training more than there are
    rounds. The first one starts at the given weights, and stops for nothing: the early state is noted on the way.

    In YAML: ``- prune.Iterative: {step: {prune.Channels: {macs: 0.5}}, finetune: {Finetune: {epochs: 1}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        step: What is pruned, with the target of all rounds together: `Channels`, or a `Magnitude` with a sparsity.
        finetune: The training after every round. Each has the whole schedule of the learning rate.
        rounds: How many there are; 1 is pruning at once.
        rewind: "weights" puts the weights that stay back after every round's pruning, and the statistics of batch norms
            with them; "none" leaves them as they are.
        rewind_epochs: Back to where the first training was after so many of its epochs; 0 is the network as given.
            Where `finetune.minutes` shortens the training, it shortens these too.
    """

    stage: ClassVar[str] = "structure"
    for_floats: ClassVar[bool] = True

    step: Channels | Magnitude
    finetune: Finetune
    rounds: int = 3
    rewind: Literal["none", "weights"] = "none"
    rewind_epochs: float = 0

    def __post_init__(self) -> None:
        check(
            self,
            step=instance(Channels | Magnitude, "prune.Channels(...) or prune.Magnitude(...)"),
            finetune=instance(Finetune, "Finetune(...)"),
            rounds=whole(),
            rewind=one_of("none", "weights"),
            rewind_epochs=at_least(0),
        )
        self._check_rounds()
        self._check_rewind()

    def _check_rounds(self) -> None:
        if not isinstance(self.step, Magnitude):
            return
        fine = {
            "a sparsity, and no threshold": self.step.threshold is None,
            'a pattern with sparsities in between: "unstructured" or blocks': not Pattern.parse(self.step.pattern).of,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError(
                "Iterative(step=...) can't be reached in rounds",
                got=self.step,
                expected=wrong[0],
                remedy="for example Iterative(step=Magnitude(sparsity=0.9), finetune=Finetune(epochs=1))",
            )

    def _check_rewind(self) -> None:
        epochs = self.rewind_epochs
        if epochs and self.finetune.steps is not None:
            expected = f"0 where the training counts steps, as with Finetune(steps={self.finetune.steps})"
        elif epochs >= self.finetune.epochs:
            expected = f"a number of at least 0, below finetune.epochs={self.finetune.epochs:g}"
        elif epochs and self.rewind == "none":
            expected = "rewind='weights' with it"
        else:
            return
        raise RecipeError("Iterative(rewind_epochs=...) contradicts the other settings", got=epochs, expected=expected)

    @property
    def per_runtime(self) -> bool:
        """Whether what is removed depends on the runtime."""
        return isinstance(self.step, Channels) and self.step.per_runtime

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a pruned and trained draft."""
        start, early = draft, None
        if self.rewind == "weights":
            draft, early = self._train_first(draft, _inside(context, "before"))
        for turn in range(self.rounds):
            context.events("progress", label="pruning rounds", done=turn, total=self.rounds)
            inside = _inside(context, f"round-{turn}")
            try:
                draft = self._of_round(turn, start, draft, context)(draft, inside)
            except PruningError as error:
                unit = self.step.unit if isinstance(self.step, Channels) else "sparsity"
                what = f"round {turn + 1} of {self.rounds} towards {unit}={getattr(self.step, unit)}: {error.what}"
                raise PruningError(what, got=error.got, expected=error.expected, remedy=error.remedy) from error
            if early is not None:
                draft = early = rewound(early, draft)
            draft = self.finetune(draft, inside)
        context.events("progress", label="pruning rounds", done=self.rounds, total=self.rounds)
        return draft

    def _of_round(self, turn: int, start: Draft, draft: Draft, context: Context) -> Channels | Magnitude:
        """What this round prunes: `Channels` of what the last one left, `Magnitude` of all there was."""
        part = (turn + 1) / self.rounds
        if isinstance(self.step, Magnitude):
            final = fraction(self.step.sparsity, self.step.pattern)
            return replace(self.step, sparsity=1 - (1 - final) ** part)
        wanted = getattr(self.step, self.step.unit) ** part
        share = min(1.0, wanted / left(self.step, start, draft, context)) if turn else wanted
        # What is rewound throws its weights away.
        step = self.step if self.rewind == "none" else replace(self.step, reconstruct=False)
        return replace(step, **{step.unit: share})

    def _train_first(self, draft: Draft, context: Context) -> tuple[Draft, Draft]:
        """The trained draft, and it with the weights and statistics that it had early in the training."""
        trained, early = draft.copy(), draft.copy()
        held = nn.Module()
        for number, value in enumerate(early.network.state_dict().values()):
            held.register_buffer(str(number), value.clone())  # saved with the network: a resumed training has it
        trained.network.add_submodule(_EARLY, held)
        hooks: tuple[Hook, ...] = self.finetune.hooks
        if self.rewind_epochs:
            hooks = (*hooks, _Note(self.rewind_epochs / self.finetune.epochs))
        settings = self.finetune.resolved(context, changed=bool(draft.edits))
        train(trained.network, context, replace(settings, hooks=hooks), draft.sparse)
        noted = zip(early.network.state_dict(), held.state_dict().values(), strict=True)
        early.network.load_state_dict(dict(noted))
        trained.network.delete_submodule(_EARLY)
        return trained, early


def left(step: Channels, start: Draft, draft: Draft, context: Context) -> float:
    """Which fraction of the start is left, in the unit of the step's target."""
    if step.unit == "latency":
        return meter.latency_left(context, step.precision)(start, draft)
    before, after = (_amount(step, d, context) for d in (start, draft))
    return after / before


def _amount(step: Channels, draft: Draft, context: Context) -> float:
    network, call = draft.network, context.task.call()
    if step.unit == "channels":
        groups = couple(network, call, step.keep).groups.values()
        return sum(group.units for group in groups if step.approximate or not group.statistics)
    return meter.amount(step.unit, network, call)


def rewound(early: Draft, pruned: Draft) -> Draft:
    """A draft with the structure and the zeros of `pruned`, and all weights and buffers as they are in `early`.

    Args:
        early: The draft before it was pruned; its log of edits is where that of `pruned` begins.
        pruned: Channels and weights were removed from it; what is left has any values.
    """
    network = copy.deepcopy(early.network)
    resize(network, tuple(e for e in pruned.edits[len(early.edits) :] if e["edit"] in RESIZING))
    with torch.no_grad():
        for name in pruned.sparse:
            network.get_parameter(name).masked_fill_(pruned.network.get_parameter(name) == 0, 0.0)
    return replace(pruned, network=network.eval())


@dataclass(frozen=True)
class _Note:
    """A hook that notes weights and buffers after a part of the training, in buffers of the network."""

    part: float

    def __call__(self, moment: TrainingEvent) -> None:
        if moment.name != "step" or moment.step != max(1, round(self.part * moment.steps)):
            return
        held = moment.network.get_submodule(_EARLY).state_dict()
        now = {name: value for name, value in moment.network.state_dict().items() if not name.startswith(f"{_EARLY}.")}
        for kept, value in zip(held.values(), now.values(), strict=True):
            kept.copy_(value)


def _inside(context: Context, name: str) -> Context:
    """The same context with a folder of its own in the folder."""
    if context.folder is None:
        return context
    (context.folder / name).mkdir(exist_ok=True)
    return replace(context, folder=context.folder / name)


__all__ = ["Iterative", "left", "rewound"]
