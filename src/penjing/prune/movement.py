"""Movement pruning: weights that move towards zero during training are removed, whatever their magnitude.

Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020, hard movement pruning: the forward
computes with W ⊙ M, where M keeps the weights with the largest scores S. The gradient passes M as if it were not
there (straight-through), so S falls by ∂L/∂W'·W at every batch, W' = W ⊙ M, for removed weights too: they keep their
values behind the mask, and may come back.

It is simpler than the paper in three ways. Scores are plain sums, without an optimizer, learning rate or decay of their
own. The mask is updated at intervals, not at every step. And from `end` on it is fixed, so that the last part of the
training adapts the weights to it; the paper keeps changing it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from penjing.errors import RecipeError
from penjing.prune.gradual import check_schedule, due
from penjing.prune.masks import check_scope, fraction, keep_each
from penjing.prune.weights import as_stored, by_output, marked, prunable, tell
from penjing.steps.draft import Draft
from penjing.steps.hooks import Hook, TrainingEvent
from penjing.steps.identity import identity
from penjing.steps.settings import check, instance
from penjing.steps.step import Context
from penjing.train.finetune import Finetune, train


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Train, and remove the weights that move towards zero.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020.

    In YAML: ``- prune.Movement: {sparsity: 0.9, finetune: {Finetune: {epochs: 3}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of the weights that becomes zero; None follows from the pattern "N:M", else one half.
        finetune: The training. Scores need many steps to become reliable.
        pattern: "unstructured", "N:M" or blocks "RxC"; see `penjing.prune.masks`. "N:M" holds from `begin` on.
        scope: "per_layer" compares weights within a layer, "row" within an output, "global" across all layers.
        begin: The fraction of the training steps at which pruning begins; until then scores are collected.
        end: The fraction from which the mask is fixed. Between the two the sparsity rises as in `Gradual`.
        every: Training steps between mask updates.
        layers: Layers, or parts of the network, that are pruned; empty prunes all.
        keep: Layers, or parts of the network, that are not pruned; they are trained like the others.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sparsity: float | None = None
    finetune: Finetune = Finetune()
    pattern: str = "unstructured"
    scope: Literal["global", "per_layer", "row"] = "per_layer"
    begin: float = 0.1
    end: float = 0.75
    every: int = 20
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fraction(self.sparsity, self.pattern)
        check_scope(self.scope, self.pattern)
        check_schedule(self)
        check(self, finetune=instance(Finetune, "Finetune(epochs=3)"))
        if self.finetune.workers > 1:
            raise RecipeError(
                "Movement trains with one worker",
                code="settings",
                field="finetune",
                got=f"workers={self.finetune.workers}",
                expected="workers=1: scores accumulate over all batches in one process",
                remedy="prune.Gradual trains with several workers",
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and zeros."""
        network = copy.deepcopy(draft.network)
        modules = prunable(network, self.layers, self.keep)
        owners = _mask(network, modules, draft.sparse)
        others = tuple(name for name in draft.sparse if name.removesuffix(".weight") not in owners)
        hooks: tuple[Hook, ...] = (*self.finetune.hooks, _UpdateMasks(tuple(modules), self))
        train(network, context, replace(self.finetune.resolved(context, changed=True), hooks=hooks), others)
        for name in owners:
            parametrize.remove_parametrizations(network.get_submodule(name), "weight", leave_parametrized=True)
        done = draft.copy()
        done.network.load_state_dict(network.state_dict())
        done.network.eval()
        tell(done, context, "Movement", modules)
        return marked(done, modules)


@dataclass(frozen=True)
class _UpdateMasks:
    """A hook that updates the masks as scheduled."""

    layers: tuple[str, ...]
    step: Movement

    def to_data(self) -> Any:
        """Without the training, whose settings the saved state compares one by one."""
        return identity((self.layers, replace(self.step, finetune=Finetune())))

    def __call__(self, moment: TrainingEvent) -> None:
        step = self.step
        final = fraction(step.sparsity, step.pattern)
        sparsity = due(moment, final, step.begin, step.end, step.every)
        if sparsity is None:
            return
        modules: dict[str, Any] = {name: moment.network.get_submodule(name) for name in self.layers}
        masks = {name: module.parametrizations.weight[0] for name, module in modules.items()}
        scores = {name: by_output(modules[name], mask.scores) for name, mask in masks.items()}
        for name, mask in keep_each(scores, sparsity, step.pattern, step.scope).items():
            masks[name].mask.copy_(as_stored(modules[name], mask))


class _Masked(nn.Module):
    """W ⊙ M, as a parametrization of a layer's weight. Scores and mask are buffers, so a resumed training has them.

    Attributes:
        scores: In the shape of the weight; larger where the weight moves away from zero.
        mask: In the shape of the weight; True where it stays.
    """

    scores: torch.Tensor
    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor, removed: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros_like(weight).masked_fill_(removed, -torch.inf))
        self.register_buffer("mask", ~removed)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        masked: torch.Tensor = _StraightThrough.apply(weight, self.mask, self.scores)  # type: ignore[no-untyped-call]
        return masked


class _StraightThrough(torch.autograd.Function):
    """W' = W ⊙ M; backward gives W the gradient of W' under the mask, and takes ∂L/∂W'·W from the scores."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.mask, ctx.scores = mask, scores
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        ctx.scores.sub_(gradient.detach() * weight.detach())
        return gradient.masked_fill(~ctx.mask, 0.0), None, None


def _mask(network: nn.Module, modules: Mapping[str, Any], sparse: tuple[str, ...]) -> tuple[str, ...]:
    """Put a mask on these layers' weights, in place; layers that share a weight share its mask.

    Returns:
        The names of all layers with a mask.
    """
    every = [(n, m) for n, m in network.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    masked: list[str] = []
    for module in modules.values():
        weight = module.weight
        owners = [(name, owner) for name, owner in every if owner.weight is weight]
        zeros = weight.detach() == 0
        known = any(f"{name}.weight" in sparse for name, _ in owners)
        mask = _Masked(weight.detach(), zeros if known else torch.zeros_like(zeros))
        for name, owner in owners:
            parametrize.register_parametrization(owner, "weight", mask, unsafe=True)
            masked.append(name)
    return tuple(masked)


__all__ = ["Movement"]
