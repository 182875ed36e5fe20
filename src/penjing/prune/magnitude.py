"""Single weights that matter least become zeros, by their size or by what a gradient says of them.

The scores stand in `penjing.prune.criteria`. A weight that is zero already scores zero.
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
    """Set the weights with the smallest scores to zero; biases, norms and embeddings stay.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of the weights that becomes zero, those included that are zero already; None is what
            the pattern "N:M" says, else one half.
        threshold: Instead of `sparsity`: scores below it go. With "magnitude" that is a weight's size.
        pattern: "unstructured", "N:M" (for example "2:4") or blocks "RxC"; see `penjing.prune.masks`.
        scope: "global" compares the weights of all layers, "per_layer" those of one layer, "row" those of one output;
            None is "global" for unstructured sparsity, else "per_layer". "N:M" compares neighbours whatever it says.
        criterion: One of `penjing.prune.criteria.OF_WEIGHTS`; those with gradients need labelled data and a loss.
        layers: Layers, or parts of the network, that take part; empty takes all, the first and the last too.
        keep: Layers, or parts of the network, that stay as they are.
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
            "it stands in the place of sparsity": self.sparsity is None,
            "it is for unstructured sparsity": Pattern.parse(self.pattern).unstructured,
            "random scores have no scale": criteria.CRITERIA[self.criterion].has_scale,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError(
                "Magnitude(threshold=...) contradicts its other settings",
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
        found = criteria.score_weights(self.criterion, draft.network, modules, context, self.batches)
        kept = self.kept({name: by_output(modules[name], value) for name, value in found.items()})
        masks = {name: as_stored(modules[name], mask) for name, mask in kept.items()}
        weights = {name: modules[name].weight.detach().masked_fill(~mask, 0) for name, mask in masks.items()}
        return with_zeros(draft, context, "Magnitude", weights)

    def kept(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where weights stay, by their scores; both (out, in, *kernel)."""
        if self.threshold is not None:
            return {name: value >= self.threshold for name, value in found.items()}
        scope = self.scope or ("global" if Pattern.parse(self.pattern).unstructured else "per_layer")
        return keep_each(found, fraction(self.sparsity, self.pattern), self.pattern, scope)
