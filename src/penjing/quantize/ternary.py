"""Ternary weights: −α, 0 or α for every output. Li et al., "Ternary Weight Networks", 2016."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penjing.numerics.signs import THRESHOLD
from penjing.quantize.binary import TRAINING
from penjing.quantize.levels import chosen, train_levels
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, NAMES, between, check, instance
from penjing.steps.step import Context
from penjing.train.finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """Train a network whose weights are −α, 0 or α, with α and the threshold of 0 for every output.

    Li et al., "Ternary Weight Networks", 2016.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        finetune: The training. `distill="auto"` always means `penjing.distill.Outputs` of the source here.
        threshold: Weights within this many mean magnitudes are 0; more than 0 and at most 1.
        activations: Whether layers read the signs of their inputs, see `penjing.quantize.Binary`.
        edges: Whether the first and the last layer are taken, too.
        layers: Layers, or parts of the network; empty takes all 2-D convolutions of several taps and linear layers.
        keep: Layers, or parts of the network, that are left as they are.
    """

    stage: ClassVar[str] = "levels"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    finetune: Finetune = TRAINING
    threshold: float = THRESHOLD
    activations: bool = False
    edges: bool = False
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(
            self,
            finetune=instance(Finetune, "Finetune(...)"),
            threshold=between(0.01, 1),
            activations=FLAG,
            edges=FLAG,
            layers=NAMES,
            keep=NAMES,
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with ternary weights.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            QuantizationError: No layer is left.
            TaskError: The task has no training data or no loss.
        """
        layers = chosen(draft.network, self.layers, self.keep, self.edges)
        return train_levels(
            draft, context, layers, self.finetune, threshold=self.threshold, activations=self.activations
        )


__all__ = ["Ternary"]
