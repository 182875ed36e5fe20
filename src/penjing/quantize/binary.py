"""Binary layers: weights and inputs are signs, with a scale for every output.

Rastegari et al., "XNOR-Net", ECCV 2016; gradients: Hubara et al., "Binarized Neural Networks", NeurIPS 2016, and Liu et
al., "Bi-Real Net", ECCV 2018; thresholds: Liu et al., "ReActNet", ECCV 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from penjing.quantize.levels import chosen, train_levels
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, NAMES, check, instance, one_of
from penjing.steps.step import Context
from penjing.train.finetune import Finetune

TRAINING = Finetune(epochs=4, learning_rate=0.004, optimizer="adamw", weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Binary:
    """Train a network whose layers multiply signs: α·Σ sign(w)·sign(x − t).

    α is the mean magnitude of the weights of an output, t a trained threshold of every input channel. The batch norms
    stay. In XNOR-Net inputs have a scale of their own at every place; here what is behind the layer scales them, as in
    its successors. Zero padding stays zero.

    Raises:
        RecipeError: A setting is invalid.

    Attributes:
        finetune: The training. `distill="auto"` always means `penjing.distill.Outputs` of the source here.
        activations: Whether inputs are signs, too; without, weights alone have one bit (Binary Weight Networks).
        edges: Whether the first and the last layer are taken, too.
        layers: Layers, or parts of the network; empty takes all 2-D convolutions of several taps and linear layers.
        keep: Layers, or parts of the network, that are left as they are.
        rest: What the weights of other convolutions and linear layers are: "floats", or "bytes": after the training
            they become whole multiples, up to 127, of a step for every output, which take a byte in the runtime
            `kernels`.
    """

    stage: ClassVar[str] = "levels"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    finetune: Finetune = TRAINING
    activations: bool = True
    edges: bool = False
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    rest: Literal["floats", "bytes"] = "floats"

    def __post_init__(self) -> None:
        check(
            self,
            finetune=instance(Finetune, "Finetune(...)"),
            activations=FLAG,
            edges=FLAG,
            layers=NAMES,
            keep=NAMES,
            rest=one_of("floats", "bytes"),
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with binary layers.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            QuantizationError: No layer is left, or weights were removed before, which can't stay 0.
            TaskError: The task has no training data or no loss.
        """
        layers = chosen(draft.network, self.layers, self.keep, self.edges)
        return train_levels(
            draft,
            context,
            layers,
            self.finetune,
            threshold=0.0,
            activations=self.activations,
            rest_in_bytes=self.rest == "bytes",
        )


__all__ = ["Binary"]
