"""What a criterion is, what it may read, and how scores of weights become scores of channels."""

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
"""Group → score of every unit (units,), each at least 0; larger matters more."""

WeightScores = dict[str, torch.Tensor]
"""Layer → score of every weight, at least 0, in the layout of its weight."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a criterion may read.

    Attributes:
        network: A captured network; it stays as it is.
        context: For its data: labelled, or that of the calibration.
        batches: How many batches of it are read.
        seed: Of random directions and numbers.
    """

    network: fx.GraphModule
    context: Context
    batches: int
    seed: int

    def generator(self) -> torch.Generator:
        """A generator that begins with the seed."""
        return torch.Generator().manual_seed(self.seed % 2**63)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One importance score, for units of coupled channels, for single weights, or for both.

    Attributes:
        name: As `Channels` and `Magnitude` take it.
        needs: "nothing", "calibration" data, or "labels" and a loss.
        units: Scores of the units of coupled groups; None where it has no meaning for them.
        weights: Scores of the weights of layers, by name; None where it has no meaning for them.
        estimates_loss: Whether scores are changes of one and the same loss: comparable between groups as they are.
        has_scale: Whether a threshold makes sense of it.
    """

    name: str
    needs: Literal["nothing", "calibration", "labels"] = "nothing"
    units: Callable[[Evidence, Coupling], Scores] | None = None
    weights: Callable[[Evidence, Mapping[str, Any]], WeightScores] | None = None
    estimates_loss: bool = False
    has_scale: bool = True


def rows(member: Member, tensor: torch.Tensor) -> torch.Tensor:
    """(positions, everything else): what one member holds, position by position."""
    picked = tensor.detach().movedim(member.axis, 0)[torch.from_numpy(member.positions)]
    return picked.reshape(len(picked), -1).double()


def per_unit(member: Member, values: torch.Tensor, units: int) -> torch.Tensor:
    """Sums over the positions of every unit: (positions,) to (units,)."""
    return torch.zeros(units, dtype=torch.float64).index_add(0, torch.from_numpy(member.units), values)


def readers(group: Group) -> tuple[Member, ...]:
    """The members whose weights multiply the units; where there are none, those that make them."""
    reads = tuple(m for m in group.members if m.role == "its inputs")
    return reads or tuple(m for m in group.members if m.role == "its outputs") or group.members


def zeros_last(scores: WeightScores, modules: Mapping[str, Any]) -> WeightScores:
    """Scores in which a weight that is zero already scores zero, whatever else is said of it."""
    return {name: value.masked_fill_(modules[name].weight == 0, 0) for name, value in scores.items()}
