"""Wanda: weights are pruned by magnitude times input norm.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024. The score of a weight is
|w_ij|·‖x_j‖₂, the norm of its contribution to the output over the calibration data, and scores are compared within an
output. Nothing is trained, and the remaining weights are not changed.

For convolutions ‖x_j‖₂ is computed per input channel, not per position of the unfolded patch: the positions of one
channel see the same values, except at the border and for what a stride skips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from penjing.analyze.channel_statistics import SQUARES, shared
from penjing.prune.masks import fraction, keep
from penjing.prune.weights import as_stored, by_output, prunable, with_zeros
from penjing.steps.draft import Draft
from penjing.steps.settings import NAMES, check, whole
from penjing.steps.step import Context


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Set the weights with the smallest |w|·‖x‖ of every output to zero. It needs calibration data, but no labels.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of every output's weights that becomes zero; None follows from the pattern "N:M", else
            one half.
        pattern: "unstructured", "N:M" (for example "2:4") or blocks "RxC", compared within a row of blocks.
        layers: Layers, or parts of the network, that are pruned; empty prunes all.
        keep: Layers, or parts of the network, that are not pruned.
        batches: At most this many calibration batches are read, in one pass; only sums are held in memory.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sparsity: float | None = None
    pattern: str = "unstructured"
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    batches: int = 20

    def __post_init__(self) -> None:
        fraction(self.sparsity, self.pattern)
        check(self, layers=NAMES, keep=NAMES, batches=whole())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with zeros."""
        modules = prunable(draft.network, self.layers, self.keep)
        norms = input_norms(draft.network, modules, context, self.batches)
        weights: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            weight = module.weight.detach()
            importance = scores(by_output(module, weight), norms[name])
            mask = keep(importance, fraction(self.sparsity, self.pattern), self.pattern, "row")
            weights[name] = weight.masked_fill(~as_stored(module, mask), 0)
        return with_zeros(draft, context, "Wanda", weights)


def scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|w|·‖x‖ of every weight.

    Args:
        weight: (out, in, *kernel), `in` being the input channels of one group.
        norms: (groups · in,), ‖x‖ of all input channels.

    Returns:
        (out, in, *kernel).
    """
    by_group = norms.to(weight.dtype).reshape(-1, weight.shape[1])
    rows = by_group.repeat_interleave(weight.shape[0] // by_group.shape[0], dim=0)
    return weight.abs() * rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def input_norms(
    network: fx.GraphModule, modules: Mapping[str, Any], context: Context, batches: int
) -> dict[str, torch.Tensor]:
    """Layer → ‖x_j‖₂ of its input channels over the calibration data, (in_channels,), float64."""
    sums = shared(network, modules, context, SQUARES, batches=batches, label="input norms")
    return {name: value.sqrt() for name, value in sums.items()}


__all__ = ["Wanda", "input_norms", "scores"]
