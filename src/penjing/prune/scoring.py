"""The interface of importance criteria, and how values of weights are summed over units of coupled channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

from penjing.analyze.coupling import Coupling, Group, Member
from penjing.steps.step import Context

Scores = dict[str, np.ndarray]
"""Group → importance score of every unit (units,), at least 0; units with small scores are removed first."""

WeightScores = dict[str, torch.Tensor]
"""Layer → importance score of every weight, at least 0, in the layout of the layer's weight."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a criterion may read.

    Attributes:
        network: A captured network; it is left unchanged.
        context: Has the labelled and the calibration data.
        batches: How many batches are read.
        seed: Seeds random directions and scores.
    """

    network: fx.GraphModule
    context: Context
    batches: int
    seed: int

    def generator(self) -> torch.Generator:
        """A new generator with the seed."""
        return torch.Generator().manual_seed(self.seed % 2**63)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One importance score, for units of coupled channels, for single weights, or for both.

    Attributes:
        name: As `Channels` and `Magnitude` take it.
        needs: "nothing", "calibration" data, or "labels" and a loss.
        units: Scores the units of coupled groups; None where the criterion is not defined for units.
        weights: Scores the weights of layers; None where the criterion is not defined for weights.
        estimates_loss: Whether scores estimate the change of one loss, and so compare across groups without scaling.
        has_scale: Whether scores can be compared with a fixed threshold.
    """

    name: str
    needs: Literal["nothing", "calibration", "labels"] = "nothing"
    units: Callable[[Evidence, Coupling], Scores] | None = None
    weights: Callable[[Evidence, Mapping[str, Any]], WeightScores] | None = None
    estimates_loss: bool = False
    has_scale: bool = True


def rows(member: Member, tensor: torch.Tensor) -> torch.Tensor:
    """The slices of a tensor at a member's positions, (positions, everything else), float64."""
    picked = tensor.detach().movedim(member.axis, 0)[torch.from_numpy(member.positions)]
    return picked.reshape(len(picked), -1).double()


def per_unit(member: Member, values: torch.Tensor, units: int) -> torch.Tensor:
    """Sum values over the positions of every unit: (positions,) → (units,)."""
    return torch.zeros(units, dtype=torch.float64).index_add(0, torch.from_numpy(member.units), values)


def readers(group: Group) -> tuple[Member, ...]:
    """The members whose weights read the units; where there are none, those that compute them."""
    reads = tuple(m for m in group.members if m.role == "its inputs")
    return reads or tuple(m for m in group.members if m.role == "its outputs") or group.members


def zeros_last(scores: WeightScores, modules: Mapping[str, Any]) -> WeightScores:
    """Scores in which weights that are zero already score zero, so that they are removed first."""
    return {name: value.masked_fill_(modules[name].weight == 0, 0) for name, value in scores.items()}
