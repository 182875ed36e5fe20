"""A choice: one point of the space, and the recipe that it stands for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from penjing import decompose, prune, quantize
from penjing.distill import Outputs
from penjing.pipeline.order import default_recipe
from penjing.recipes.by_name import QUANTIZED, joint, label_free
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Step
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune

Technique = Literal["none", "channels", "low rank"]
Integers = Literal["none", "corrected", "rounded", "mixed", "trained"]
TECHNIQUES: tuple[Technique, ...] = ("none", "channels", "low rank")
INTEGERS: tuple[Integers, ...] = ("none", "corrected", "rounded", "mixed", "trained")
WIDTHS = (8, 4, 3, 2)  # bits that layers are given where they have a mean


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a recipe does, in the terms that a search varies.

    Attributes:
        technique: What makes the network smaller: channels are pruned, or layers become products of smaller ones.
        keep: The fraction of the multiply-accumulates that the technique keeps; 1 with "none".
        blocks: Residual blocks that are removed before.
        epochs: Passes over the data that trains; 0 trains nothing.
        integers: How they are made: not at all, with biases corrected, with the rounding of every weight searched, with
            bits of its own for every layer, or by quantization-aware training.
        weight_bits: Bits of the integers of weights; their mean with "mixed".
    """

    technique: Technique = "none"
    keep: float = 1.0
    blocks: int = 0
    epochs: float = 0.0
    integers: Integers = "none"
    weight_bits: int = 8

    @property
    def structural(self) -> bool:
        """Whether the network becomes another one."""
        return self.technique != "none" or self.blocks > 0

    @property
    def untrained(self) -> Choice:
        """The same structure without training: what can be built and timed in seconds."""
        return replace(self, epochs=0.0, integers="none" if self.integers == "none" else "corrected", weight_bits=8)

    def data(self) -> dict[str, Any]:
        """Plain data, as a study keeps it."""
        return asdict(self)

    def words(self) -> str:
        """In a few words: ``channels to 50 % of the MACs, 2 epochs, INT8 trained``."""
        parts = [f"{self.blocks} block{'s' * (self.blocks > 1)} less"] if self.blocks else []
        if self.technique != "none":
            parts.append(f"{self.technique} to {self.keep:.0%} of the MACs")
        if self.epochs:
            parts.append(f"{self.epochs:g} epoch{'s' * (self.epochs != 1)}")
        if self.integers != "none":
            parts.append(f"INT{self.weight_bits} {self.integers}")
        return ", ".join(parts) or "as it is"


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the trainings of a search go.

    Attributes:
        labels: Whether there are any; otherwise the network learns to give the source's outputs.
        optimizer: "sgd" or "adamw".
        rate: Its peak learning rate; a tenth of it with quantizers in place.
    """

    labels: bool
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: float = 0.02


def recipe(choice: Choice, learning: Learning) -> Recipe:
    """The steps that a choice stands for."""
    if choice.epochs and choice.integers == "trained" and (choice.blocks or choice.technique == "channels"):
        return (joint if learning.labels else label_free)(
            macs=choice.keep if choice.technique == "channels" else None,
            blocks=choice.blocks,
            epochs=choice.epochs,
            learning_rate=learning.rate,
            optimizer=learning.optimizer,
            weight_bits=choice.weight_bits,
        )
    steps: list[Step] = [prune.Blocks(blocks=choice.blocks)] if choice.blocks else []
    if choice.technique == "channels":
        steps.append(prune.Channels(macs=choice.keep))
    elif choice.technique == "low rank":
        steps.append(decompose.LowRank(macs=choice.keep))
    if not choice.epochs:
        return Recipe(*steps, *_integers(choice))
    whole = Finetune(
        epochs=choice.epochs,
        learning_rate=learning.rate,
        optimizer=learning.optimizer,
        clip=Clip(),
        distill=Outputs(),
        task_loss_weight=1.0 if learning.labels else 0.0,
    )
    if choice.integers != "trained":
        return Recipe(*steps, whole, *_integers(choice))
    trained = replace(whole, learning_rate=learning.rate / 10, weight_decay=1e-4)
    if choice.structural:  # first its floats, then its integers
        part = round(QUANTIZED * choice.epochs, 9)
        steps.append(replace(whole, epochs=round(choice.epochs - part, 9)))
        trained = replace(trained, epochs=part)
    data: Literal["train", "calibration"] = "train" if learning.labels else "calibration"
    return Recipe(*steps, quantize.Static(weight_bits=choice.weight_bits), quantize.QAT(finetune=trained, data=data))


def _integers(choice: Choice) -> list[Step]:
    if choice.integers == "none":
        return []
    if choice.integers == "mixed":
        return [quantize.MixedPrecision(average_bits=choice.weight_bits, weight_bits=WIDTHS, floats=False)]
    static, *after = default_recipe(rounding=choice.integers == "rounded")
    return [replace(static, weight_bits=choice.weight_bits), *after]  # type: ignore[type-var]
