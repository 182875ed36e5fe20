"""Sparsity-inducing training: a penalty shrinks weights or whole channels before a later step removes them.

| penalty | term added to the loss, times `strength` | source |
|---|---|---|
| ``l1`` | Σ abs(w) over the weights of convolutions and linear layers | Han et al., NeurIPS 2015 |
| ``l2`` | ½ Σ w² over the same | Han et al., NeurIPS 2015 |
| ``bn_l1`` | Σ abs(γ) over the scales of batch norms | Liu et al., "Network Slimming", ICCV 2017 |
| ``group_lasso`` | Σ √size · ‖all weights of the unit‖₂ over the units | Wen et al., "SSL", NeurIPS 2016 |

A *unit* is everything that is removed with one channel (`penjing.analyze.coupling`): rows of the weights that compute
it, columns of those that read it, its entries in biases and norms. Shrinking whole coupled groups follows Fang et al.,
"DepGraph", CVPR 2023. A weight that lies on two axes of its unit (a layer inside a residual path) counts twice, as in
the criterion ``l2`` of `penjing.prune.criteria`.

The factor √size (Yuan & Lin 2006) makes one `strength` suit units of all sizes and all four penalties: it is roughly
the pull on a single weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from penjing.analyze.coupling import Coupling, Group, couple
from penjing.errors import PruningError
from penjing.prune.weights import prunable
from penjing.steps.draft import Draft
from penjing.steps.hooks import TrainingEvent
from penjing.steps.identity import identity
from penjing.steps.settings import FLAG, NAMES, above, check, instance, one_of
from penjing.steps.step import Context
from penjing.train.finetune import Finetune

PENALTIES = ("l1", "l2", "bn_l1", "group_lasso")


@dataclass(frozen=True, kw_only=True)
class Regularized:
    """Train with a penalty that shrinks what a later step will remove; nothing is removed here.

    Liu et al., "Network Slimming", ICCV 2017; Wen et al., "Learning Structured Sparsity", NeurIPS 2016.

    The penalty's subgradient (0 where a weight, or a whole unit, is 0) is added to the gradient of the loss between
    backward and the update, in 32 bits also under autocast, and before `Finetune.clip` clips the sum: the same as if
    the penalty were a term of the loss. Zeros of earlier steps stay.

    In YAML: ``- prune.Regularized: {penalty: bn_l1, finetune: {Finetune: {epochs: 2}}}``.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        penalty: One of `PENALTIES`. "bn_l1" and "group_lasso" prepare `Channels`, "l1" and "l2" `Magnitude`.
        strength: The coefficient of the penalty.
        finetune: The training. Its own weight decay applies in addition.
        growing: Whether the strength rises linearly from 0 to `strength` over the training, after Wang et al., "Neural
            Pruning via Growing Regularization", ICLR 2021. There it rises for selected filters; here for all.
        keep: Layers, or parts of the network, that are not penalized; for "bn_l1" and "group_lasso" those whose outputs
            are not pruned, as in `Channels`.
        approximate: Also penalize groups that norms and averages compute statistics over; set it as in `Channels`.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    penalty: Literal["l1", "l2", "bn_l1", "group_lasso"] = "group_lasso"
    strength: float = 1e-3
    finetune: Finetune = Finetune()
    growing: bool = False
    keep: tuple[str, ...] = ()
    approximate: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            penalty=one_of(*PENALTIES),
            strength=above(0),
            finetune=instance(Finetune, "Finetune(epochs=2)"),
            growing=FLAG,
            keep=NAMES,
            approximate=FLAG,
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights.

        Raises:
            PruningError: The network has nothing that this penalty applies to.
            RecipeError: `keep` names what does not exist.
        """
        penalty = penalty_for(self, draft.network, context)
        settings = replace(self.finetune, hooks=(*self.finetune.hooks, _AddSubgradient(self, penalty)))
        done = settings(draft, context)
        before, after = float(penalty.value(draft.network)), float(penalty.value(done.network))
        context.events("regularized", penalty=self.penalty, before=before, after=after)
        return done


@dataclass(frozen=True, eq=False)
class Slices:
    """The positions of one group's units along one axis of one parameter.

    Attributes:
        tensor: Name of the parameter.
        axis: Its axis.
        unit: (length of the axis,) the unit of each position; the number of units where a position belongs to none.
        positions: (units, most) the positions of each unit, padded with the length of the axis. Sums over units are
            gathered with it in a fixed order: index_add is not deterministic on a GPU.
    """

    tensor: str
    axis: int
    unit: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, eq=False)
class Single:
    """A penalty on single weights.

    Attributes:
        power: 1 for Σ abs(w), 2 for ½ Σ w².
        taken: Parameter → 1 where a weight is penalized and 0 elsewhere, in a shape that broadcasts.
    """

    power: int
    taken: Mapping[str, torch.Tensor]

    def value(self, network: nn.Module) -> torch.Tensor:
        """The penalty, a scalar."""
        weights = [(_weight(network, name), taken) for name, taken in self.taken.items()]
        terms = [(w.abs() if self.power == 1 else w.square() / 2) * taken.to(w) for w, taken in weights]
        return torch.stack([term.sum() for term in terms]).sum()

    def gradients(self, network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameter → the penalty's subgradient."""
        for name, taken in self.taken.items():
            weight = _weight(network, name)
            yield name, (weight.sign() if self.power == 1 else weight) * taken.to(weight)


@dataclass(frozen=True, eq=False)
class GroupLasso:
    """A penalty on the norms of whole units.

    Attributes:
        groups: For every group the slices of all parameters that its units own.
    """

    groups: tuple[tuple[Slices, ...], ...]

    def value(self, network: nn.Module) -> torch.Tensor:
        """The penalty, a scalar."""
        by_group = [unit_norms(_weights(network, group), group) for group in self.groups]
        return torch.stack([(norms * sizes.sqrt()).sum() for norms, sizes in by_group]).sum()

    def gradients(self, network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameter → its terms of the penalty's subgradient, one for every axis."""
        for group in self.groups:
            weights = _weights(network, group)
            norms, sizes = unit_norms(weights, group)
            pull = torch.where(norms > 0, sizes.sqrt() / norms, 0.0)
            for part in group:
                weight = weights[part.tensor]
                along = F.pad(pull, (0, 1))[part.unit.to(pull.device)]
                shape = [-1 if axis == part.axis else 1 for axis in range(weight.dim())]
                yield part.tensor, weight * along.reshape(shape)


def unit_norms(weights: Mapping[str, torch.Tensor], group: tuple[Slices, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The L2 norms (units,) of all weights of every unit, and their numbers (units,).

    Args:
        weights: The parameters that the group has slices of, by name.
        group: Its slices.
    """
    squares, sizes = [], []
    for part in group:
        lines = weights[part.tensor].square().movedim(part.axis, 0)
        length, each = len(lines), lines[0].numel()
        positions = part.positions.to(lines.device)
        squares.append(F.pad(lines.reshape(length, -1).sum(1), (0, 1))[positions].sum(1))
        sizes.append((positions < length).sum(1) * each)
    return torch.stack(squares).sum(0).sqrt(), torch.stack(sizes).sum(0).to(squares[0].dtype)


def penalty_for(step: Regularized, network: fx.GraphModule, context: Context) -> Single | GroupLasso:
    """The penalty of a step on a network.

    Raises:
        PruningError: The network has nothing that this penalty applies to.
    """
    if step.penalty in ("l1", "l2"):
        power = 1 if step.penalty == "l1" else 2
        whole = torch.ones((), device=context.device)
        return Single(power, {f"{name}.weight": whole for name in prunable(network, (), step.keep)})
    coupling = couple(network, context.task.call(), step.keep)
    chosen = [g for g in coupling.groups.values() if g.units > 1 and (step.approximate or not g.statistics)]
    if step.penalty == "bn_l1":
        if scales := _scales(network, chosen, context.device):
            return Single(1, scales)
    elif groups := tuple(parts for g in chosen if (parts := _slices(network, g, context.device))):
        return GroupLasso(groups)
    raise PruningError(
        f'penalty="{step.penalty}" applies to nothing in this network',
        code="nothing-to-prune",
        got=_not_prunable(coupling, step),
        expected="batch norms of prunable channels" if step.penalty == "bn_l1" else "prunable channels",
        remedy='penalty="group_lasso" needs no batch norms' if step.penalty == "bn_l1" and chosen else None,
    )


def _not_prunable(coupling: Coupling, step: Regularized) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in list(coupling.not_prunable.items())[:3])
    left_out = [name for name, group in coupling.groups.items() if group.statistics and not step.approximate]
    texts = [reasons] if reasons else []
    texts += [f"approximate=True also penalizes {', '.join(left_out[:3])}"] if left_out else []
    return "; ".join(texts) or f"{len(coupling.groups)} groups of channels"


def _scales(network: nn.Module, groups: Iterable[Group], device: str) -> dict[str, torch.Tensor]:
    parameters, taken = dict(network.named_parameters()), dict[str, torch.Tensor]()
    for member in (m for group in groups for m in group.members):
        layer, _, role = member.tensor.rpartition(".")
        norm = isinstance(network.get_submodule(layer), nn.modules.batchnorm._BatchNorm)
        if norm and role == "weight" and member.tensor in parameters:
            empty = torch.zeros(parameters[member.tensor].shape, device=device)
            taken.setdefault(member.tensor, empty)[torch.from_numpy(member.positions).to(device)] = 1.0
    return taken


def _slices(network: nn.Module, group: Group, device: str) -> tuple[Slices, ...]:
    parameters = dict(network.named_parameters())  # running statistics belong to a channel too, but are not trained
    slices: list[Slices] = []
    for member in (m for m in group.members if m.tensor in parameters):
        length = parameters[member.tensor].shape[member.axis]
        positions_of: list[list[int]] = [[] for _ in range(group.units)]
        unit = torch.full((length,), group.units)
        for position, number in zip(member.positions.tolist(), member.units.tolist(), strict=True):
            positions_of[number].append(position)
            unit[position] = number
        most = max(map(len, positions_of))
        positions = torch.tensor([row + [length] * (most - len(row)) for row in positions_of])
        slices.append(Slices(member.tensor, member.axis, unit.to(device), positions.to(device)))
    return tuple(slices)


def _weight(network: nn.Module, name: str) -> torch.Tensor:
    """A parameter in at least 32 bits: bfloat16 is too coarse for a sum of squares."""
    weight = network.get_parameter(name).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _weights(network: nn.Module, group: tuple[Slices, ...]) -> dict[str, torch.Tensor]:
    return {part.tensor: _weight(network, part.tensor) for part in group}


@dataclass(frozen=True, eq=False)
class _AddSubgradient:
    """A hook that adds the penalty's subgradient to the gradient of the loss. It has no state of its own."""

    step: Regularized
    penalty: Single | GroupLasso

    def to_data(self) -> Any:
        """The settings without the training, which the saved state compares field by field."""
        return identity(replace(self.step, finetune=Finetune()))

    @torch.no_grad()
    def __call__(self, moment: TrainingEvent) -> None:
        if moment.name != "gradients":
            return
        grown = (moment.step + 1) / moment.steps if self.step.growing else 1.0
        strength = self.step.strength * grown
        for name, term in self.penalty.gradients(moment.network):
            parameter = moment.network.get_parameter(name)
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # the loss did not reach it at this step
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(term, alpha=strength)


__all__ = ["PENALTIES", "GroupLasso", "Regularized", "Single", "Slices", "penalty_for", "unit_norms"]
