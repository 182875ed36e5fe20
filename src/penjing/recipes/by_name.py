"""Predefined recipes: pruning, distillation from the source and quantization in one run.

One teacher throughout, the source network: Polino et al., "Model compression via distillation and quantization", ICLR
2018; pruning in rounds: Molchanov et al., "Pruning Convolutional Neural Networks", ICLR 2017.

>>> import penjing as pj
>>> [type(step).__name__ for step in pj.recipes.joint(macs=0.5, epochs=10)]
['Iterative', 'Finetune', 'Static', 'QAT']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from penjing import prune, quantize
from penjing.distill import Outputs
from penjing.errors import RecipeError
from penjing.recipes.recipe import Recipe
from penjing.steps.step import Step
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune

SHALLOW = 0.2  # of all epochs: training after blocks were removed, if channels are pruned after them
ROUNDS = 0.3  # of all epochs: training within the pruning rounds
QUANTIZED = 0.2  # of all epochs: quantization-aware training
_LEARN = Finetune(clip=Clip())  # a network that was just pruned and reconstructed diverges under large gradients


def joint(
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    blocks: int = 0,
    epochs: float = 10.0,
    rounds: int = 2,
    learning_rate: float = 0.02,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_bits: int = 8,
    activation_bits: int = 8,
    temperature: float = 4.0,
) -> Recipe:
    """Prune in rounds, distil from the source, and continue with quantization-aware training.

    Args:
        macs: Fraction of the multiply-accumulates to keep; 0.5 if no target is given.
        params: Fraction of the parameters to keep, instead.
        latency: Fraction of the latency in the runtime to keep, instead.
        blocks: Residual blocks to remove first. A fraction above then refers to what remains, and without one no
            channels are pruned. In layers with fewer channels than a vector register holds, removing a block saves more
            time.
        epochs: Passes over `Task.train` in total: 30 % in the pruning rounds, 50 % in fine-tuning after them, 20 % in
            quantization-aware training. If blocks are removed, 20 of the 50 come before the rounds, because neither
            importance scores nor reconstruction are meaningful in a broken network.
        rounds: Number of pruning rounds.
        learning_rate: Peak learning rate; a tenth of it in quantization-aware training.
        optimizer: "sgd" or "adamw".
        weight_bits: Bits of weights.
        activation_bits: Bits of activations.
        temperature: Softening temperature of the distillation from the source.

    Raises:
        RecipeError: A setting is invalid.
    """
    _check(macs=macs, params=params, latency=latency, blocks=blocks, epochs=epochs, rounds=rounds)
    learn = replace(_LEARN, learning_rate=learning_rate, optimizer=optimizer, distill=Outputs(temperature=temperature))
    trained = quantize.QAT(finetune=_with_integers(learn, epochs))
    target = _target(macs, params, latency, blocks)
    return _composed(target, "auto", blocks, epochs, rounds, learn, (weight_bits, activation_bits), trained)


def label_free(
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    blocks: int = 0,
    epochs: float = 10.0,
    rounds: int = 2,
    learning_rate: float = 0.02,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_bits: int = 8,
    activation_bits: int = 8,
) -> Recipe:
    """Like `joint`, without labels: the network learns to reproduce the source's outputs.

    Without `Task.train` it trains on the calibration data; it soon overfits a few hundred samples.

    Args:
        macs: Fraction of the multiply-accumulates to keep; 0.5 where no target is given.
        params: Fraction of the parameters to keep, instead.
        latency: Fraction of the latency in the runtime to keep, instead.
        blocks: Residual blocks to remove first; a fraction above then refers to what remains.
        epochs: Passes over the data in total.
        rounds: Number of pruning rounds.
        learning_rate: Peak learning rate; a tenth of it with quantizers in place.
        optimizer: "sgd" or "adamw".
        weight_bits: Bits of weights.
        activation_bits: Bits of activations.

    Raises:
        RecipeError: A setting is invalid.
    """
    _check(macs=macs, params=params, latency=latency, blocks=blocks, epochs=epochs, rounds=rounds)
    learn = replace(_LEARN, learning_rate=learning_rate, optimizer=optimizer, distill=Outputs(), task_loss_weight=0.0)
    trained = quantize.QAT(finetune=_with_integers(learn, epochs), data="calibration")
    target = _target(macs, params, latency, blocks)
    return _composed(target, "jacobian", blocks, epochs, rounds, learn, (weight_bits, activation_bits), trained)


NAMES: dict[str, Callable[[], Recipe]] = {"joint": joint, "label-free": label_free}
"""The recipes that ``penjing compress --recipe`` knows by name, with default settings."""


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(
                f"a joint recipe can't use {name}", code="settings", field=name, got=repr(value), expected="a number"
            )


def _part(fraction: float, epochs: float) -> float:
    return round(fraction * epochs, 9)  # 0.9, not 0.8999999999999999, for readability


def _with_integers(learn: Finetune, epochs: float) -> Finetune:
    """The same training with fake quantizers in place, at a tenth of the learning rate."""
    rate = learn.learning_rate / 10
    return replace(learn, epochs=_part(QUANTIZED, epochs), learning_rate=rate, weight_decay=1e-4)


def _target(macs: float | None, params: float | None, latency: float | None, blocks: int) -> dict[str, float | str]:
    targets: dict[str, float | str] = {
        name: value for name, value in (("macs", macs), ("params", params), ("latency", latency)) if value is not None
    }
    return targets or ({} if blocks else {"macs": 0.5})


def _composed(
    target: dict[str, float | str],
    criterion: Literal["auto", "jacobian"],
    blocks: int,
    epochs: float,
    rounds: int,
    learn: Finetune,
    bits: tuple[int, int],
    trained: quantize.QAT,
) -> Recipe:
    steps: list[Step] = [prune.Blocks(blocks=blocks)] if blocks else []
    after = 1 - QUANTIZED
    if target:
        after -= ROUNDS
        if blocks:
            after -= SHALLOW
            steps.append(replace(learn, epochs=_part(SHALLOW, epochs)))
        channels = prune.Channels(**target, criterion=criterion)  # type: ignore[arg-type]
        each = replace(learn, epochs=_part(ROUNDS / max(1, rounds), epochs))
        steps.append(prune.Iterative(step=channels, finetune=each, rounds=rounds))
    steps.append(replace(learn, epochs=_part(after, epochs)))
    return Recipe(*steps, quantize.Static(weight_bits=bits[0], activation_bits=bits[1]), trained)


__all__ = ["NAMES", "joint", "label_free"]
