"""Unstructured and semi-structured pruning: the weights with the smallest importance scores are set to zero.

The criteria are those of `penjing.prune.criteria`. A weight that is zero already scores zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from penjing.errors import RecipeError
from penjing.prune import criteria
from penjing.prune.masks import Pattern, check_scope, fraction, keep_each
from penjing.prune.weights import as_stored, by_output, prunable, with_zeros
from penjing.steps.draft import Draft
from penjing.steps.settings import NAMES, at_least, check, one_of, optional, whole
from penjing.steps.step import Context


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Set the weights with the smallest importance scores to zero; biases, norms and embeddings are not pruned.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of the weights that is zero afterwards, including those that were zero before; None
            follows from the pattern "N:M", else one half.
        threshold: Instead of `sparsity`: weights whose score is below it are removed. The score of "magnitude" is |w|.
        pattern: "unstructured", "N:M" (for example "2:4") or blocks "RxC"; see `penjing.prune.masks`.
        scope: "global" compares weights across all layers, "per_layer" within a layer, "row" within an output; None is
            "global" for unstructured sparsity, else "per_layer". "N:M" always compares M neighbours.
        criterion: One of `penjing.prune.criteria.OF_WEIGHTS`; those with gradients need labelled data and a loss.
        layers: Layers, or parts of the network, that are pruned; empty prunes all, including the first and the last.
        keep: Layers, or parts of the network, that are not pruned.
        batches: Batches of data that a criterion reads.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sparsity: float | None = None
    threshold: float | None = None
    pattern: str = "unstructured"
    scope: Literal["global", "per_layer", "row"] | None = None
    criterion: str = "magnitude"
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    batches: int = 20

    def __post_init__(self) -> None:
        fraction(self.sparsity, self.pattern)
        if self.scope is not None:
            check_scope(self.scope, self.pattern)
        check(
            self,
            threshold=optional(at_least(0)),
            criterion=one_of(*criteria.OF_WEIGHTS),
            layers=NAMES,
            keep=NAMES,
            batches=whole(),
        )
        if self.threshold is not None:
            self._check_threshold(self.threshold)

    def _check_threshold(self, threshold: float) -> None:
        fine = {
            "a threshold or a sparsity, not both": self.sparsity is None,
            "a threshold with unstructured sparsity only": Pattern.parse(self.pattern).unstructured,
            "a criterion other than random, whose scores have no scale": criteria.CRITERIA[self.criterion].has_scale,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError(
                "Magnitude(threshold=...) contradicts its other settings",
                code="contradiction",
                field="threshold",
                got=f"threshold={threshold!r}, sparsity={self.sparsity!r}, pattern={self.pattern!r}",
                expected=wrong[0],
                remedy="for example Magnitude(threshold=0.01), or Magnitude(sparsity=0.5)",
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with zeros.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            TaskError: The criterion needs data that the task does not have.
        """
        modules = prunable(draft.network, self.layers, self.keep)
        scores = criteria.score_weights(self.criterion, draft.network, modules, context, self.batches)
        by_layer = self.masks({name: by_output(modules[name], value) for name, value in scores.items()})
        masks = {name: as_stored(modules[name], mask) for name, mask in by_layer.items()}
        weights = {name: modules[name].weight.detach().masked_fill(~mask, 0) for name, mask in masks.items()}
        return with_zeros(draft, context, "Magnitude", weights)

    def masks(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Layer → mask, True where a weight stays, from its scores; both (out, in, *kernel)."""
        if self.threshold is not None:
            return {name: value >= self.threshold for name, value in scores.items()}
        scope = self.scope or ("global" if Pattern.parse(self.pattern).unstructured else "per_layer")
        return keep_each(scores, fraction(self.sparsity, self.pattern), self.pattern, scope)
