"""Iterative pruning: rounds of pruning with fine-tuning in between, in which the network recovers.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, section 3.3 (iterative
pruning); Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017.

Weight rewinding: Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; late rewinding: Frankle et al.,
"Stabilizing the Lottery Ticket Hypothesis", 2019, and "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
ICML 2020. Without it, rounds are what Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning",
ICLR 2020, call learning-rate rewinding: weights continue from their current values, and every training restarts its
schedule.
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

_EARLY = "_early"  # the submodule that holds the early weights during training


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Prune in rounds, and fine-tune after each.

    After round k of n the fraction s^(k/n) is kept, so that all rounds together keep the s that `step` asks for: 0.5
    in three rounds is 0.794, then 0.63, then 0.5. What a round removes in excess, because channels come in multiples,
    the next one removes less. For a sparsity s it is 1 − (1 − s)^(k/n) after round k.

    With ``rewind="weights"`` the network is trained once before the first round; then every round prunes the trained
    network, rewinds the remaining weights to their early values, and trains again: one training more than there are
    rounds. The first training starts at the given weights and is not interrupted; the early weights are recorded on
    the way.

    In YAML: ``- prune.Iterative: {step: {prune.Channels: {macs: 0.5}}, finetune: {Finetune: {epochs: 1}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        step: The pruning, with the target of all rounds together: `Channels`, or a `Magnitude` with a sparsity.
        finetune: The training after every round; each runs the whole learning-rate schedule.
        rounds: The number of rounds; 1 is one-shot pruning.
        rewind: "weights" rewinds the remaining weights and the batch-norm statistics after every round's pruning;
            "none" continues from the current ones.
        rewind_epochs: Rewind to the state after this many epochs of the first training; 0 is the given network. Where
            `finetune.minutes` shortens the training, these are shortened in proportion.
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
                code="settings",
                field="step",
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
        raise RecipeError(
            "Iterative(rewind_epochs=...) contradicts the other settings",
            code="contradiction",
            field="rewind_epochs",
            got=epochs,
            expected=expected,
        )

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
                raise PruningError(
                    what, code=error.code, got=error.got, expected=error.expected, remedy=error.remedy
                ) from error
            if early is not None:
                draft = early = rewound(early, draft)
            draft = self.finetune(draft, inside)
        context.events("progress", label="pruning rounds", done=self.rounds, total=self.rounds)
        return draft

    def _of_round(self, turn: int, start: Draft, draft: Draft, context: Context) -> Channels | Magnitude:
        """The pruning of this round: `Channels` relative to the previous round, `Magnitude` relative to the start."""
        part = (turn + 1) / self.rounds
        if isinstance(self.step, Magnitude):
            final = fraction(self.step.sparsity, self.step.pattern)
            return replace(self.step, sparsity=1 - (1 - final) ** part)
        target = getattr(self.step, self.step.unit) ** part
        share = min(1.0, target / left(self.step, start, draft, context)) if turn else target
        # Rewinding would discard reconstructed weights.
        step = self.step if self.rewind == "none" else replace(self.step, reconstruct=False)
        return replace(step, **{step.unit: share})

    def _train_first(self, draft: Draft, context: Context) -> tuple[Draft, Draft]:
        """The trained draft, and the same draft with its early weights and statistics."""
        trained, early = draft.copy(), draft.copy()
        early_state = nn.Module()
        for number, value in enumerate(early.network.state_dict().values()):
            early_state.register_buffer(str(number), value.clone())  # saved with the network: a resumed training has it
        trained.network.add_submodule(_EARLY, early_state)
        hooks: tuple[Hook, ...] = self.finetune.hooks
        if self.rewind_epochs:
            hooks = (*hooks, _Record(self.rewind_epochs / self.finetune.epochs))
        settings = self.finetune.resolved(context, changed=bool(draft.edits))
        train(trained.network, context, replace(settings, hooks=hooks), draft.sparse)
        noted = zip(early.network.state_dict(), early_state.state_dict().values(), strict=True)
        early.network.load_state_dict(dict(noted))
        trained.network.delete_submodule(_EARLY)
        return trained, early


def left(step: Channels, start: Draft, draft: Draft, context: Context) -> float:
    """The fraction of the starting cost that is left, in the unit of the step's target."""
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
    """A draft with the structure and the zeros of `pruned`, and the weights and buffers of `early`.

    Args:
        early: The draft before pruning; its edit log is a prefix of that of `pruned`.
        pruned: The draft after channels or weights were removed; its values are not used.
    """
    network = copy.deepcopy(early.network)
    resize(network, tuple(e for e in pruned.edits[len(early.edits) :] if e["edit"] in RESIZING))
    with torch.no_grad():
        for name in pruned.sparse:
            network.get_parameter(name).masked_fill_(pruned.network.get_parameter(name) == 0, 0.0)
    return replace(pruned, network=network.eval())


@dataclass(frozen=True)
class _Record:
    """A hook that records weights and buffers after a fraction of the training, in buffers of the network."""

    part: float

    def __call__(self, moment: TrainingEvent) -> None:
        if moment.name != "step" or moment.step != max(1, round(self.part * moment.steps)):
            return
        early = moment.network.get_submodule(_EARLY).state_dict()
        now = {name: value for name, value in moment.network.state_dict().items() if not name.startswith(f"{_EARLY}.")}
        for noted, value in zip(early.values(), now.values(), strict=True):
            noted.copy_(value)


def _inside(context: Context, name: str) -> Context:
    """The same context with a subfolder of its own."""
    if context.folder is None:
        return context
    (context.folder / name).mkdir(exist_ok=True)
    return replace(context, folder=context.folder / name)


__all__ = ["Iterative", "left", "rewound"]
