"""Depth pruning: whole residual blocks and layers are removed, those first that the outputs need least.

Every candidate is tried on the current network and ranked by the noise that it adds to the outputs per cost saved: no
labels are needed. Chen & Zhao, "Shallowing Deep Networks: Layer-wise Pruning Based on Feature Representations", TPAMI
2019; Men et al., "ShortGPT", 2024, with the outputs of the whole network instead of a layer's.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from penjing.analyze import meter
from penjing.analyze.bypasses import Bypass, bypasses
from penjing.errors import PruningError, RecipeError
from penjing.modes import in_eval_mode
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, NAMES, check, number, whole
from penjing.steps.step import Context
from penjing.surgery import skip
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Call, calibration_calls

UNITS = ("blocks", "macs", "params", "size", "latency")
FRACTION_KEPT = number(above=0, most=1, called="the fraction to keep,")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Remove whole residual blocks, and optionally layers, until the given fraction of the cost is left.

    Removing a residual block leaves its shortcut: the network computes what it would if the block's output were 0.
    Exactly one of the first five settings is given.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        blocks: How many blocks are removed.
        macs: The fraction of multiply-accumulates that is kept.
        params: The fraction of parameters.
        size: The fraction of the bytes of parameters and buffers.
        latency: The fraction of the latency, measured in the target runtime.
        layers: Also remove layers without a shortcut whose input and output have the same shape, with their norm and
            activation.
        keep: Layers, or parts of the network, that are not removed.
        batches: Batches of calibration data on which every candidate is evaluated.
        precision: The precision at which the latency is measured.
    """

    stage: ClassVar[str] = "structure"
    for_floats: ClassVar[bool] = True

    blocks: int | None = None
    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    layers: bool = False
    keep: tuple[str, ...] = ()
    batches: int = 2
    precision: str = "fp32"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in UNITS if getattr(self, name) is not None}
        if len(given) != 1:
            raise RecipeError(
                "Blocks takes exactly one target",
                code="one-target",
                got=", ".join(f"{k}={v}" for k, v in given.items()) or "none",
                expected=" or ".join(f"{name}=" for name in UNITS),
                remedy="for example Blocks(blocks=2) removes two blocks, Blocks(macs=0.75) keeps three quarters",
            )
        check(self, **{name: whole(0) if name == "blocks" else FRACTION_KEPT for name in given})
        check(self, layers=FLAG, keep=NAMES, batches=whole())

    @property
    def unit(self) -> str:
        """The cost that the target is given in, one of `UNITS`."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    @property
    def per_runtime(self) -> bool:
        """Whether what is removed depends on the runtime."""
        return self.latency is not None

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft without the least important blocks.

        Raises:
            PruningError: The network has no removable block, or the target can't be reached.
        """
        protected = self._protected(draft.network)
        if not self._candidates(draft, context, protected):
            raise PruningError(
                "the network has no block that can be removed",
                code="nothing-to-prune",
                got="no residual addition" + (", and no layer with equal shapes around it" if self.layers else ""),
                expected="a branch beside a shortcut, outside of keep=...",
                remedy="layers=True also removes layers without a shortcut; prune.Channels makes layers narrower",
            )
        calls = list(calibration_calls(context.task, limit=self.batches))
        references = [_outputs(draft.network, call) for call in calls]
        left, target = self._meter(draft, context), float(getattr(self, self.unit))
        done: list[str] = []
        current, noise = draft, 0.0
        while not (len(done) >= target if self.unit == "blocks" else left(current) <= target):
            tried: list[tuple[float, float, str, Draft]] = []
            candidates = self._candidates(current, context, protected)
            layers = {part: part.layers for part in candidates}
            prices = meter.part_prices(self.unit, current.network, layers, context.task.call())
            for i, part in enumerate(candidates):
                context.events("progress", label=f"block {len(done) + 1}", done=i, total=len(candidates))
                without = _without(current, part)
                noise_without = _noise(without.network, calls, references)
                tried.append(((noise_without - noise) / prices[part], noise_without, part.name, without))
            if not tried:
                so_far = "" if self.unit == "blocks" else f", {left(current):.3g} is left"
                raise PruningError(
                    "no block is left that can be removed",
                    code="unreachable",
                    got=f"{self.unit}={target:g}; {', '.join(done)} removed{so_far}",
                    expected=f"at most {len(done)} blocks" if self.unit == "blocks" else "a larger fraction",
                    remedy="prune.Channels prunes in smaller steps"
                    + ("" if self.layers else "; layers=True also removes layers without a shortcut"),
                )
            _, noise, name, current = min(tried, key=lambda t: t[0])
            done.append(name)
            context.events("block", name=name, snr_db=-10 * math.log10(noise) if noise > 0 else math.inf)
        return current

    def _protected(self, network: fx.GraphModule) -> tuple[str, ...]:
        """Name prefixes of layers that are not removed."""
        modules = {name for name, _ in network.named_modules()}
        for word in self.keep:
            if word not in modules:
                near = difflib.get_close_matches(word, modules, n=3)
                raise RecipeError(
                    "this part of the network does not exist",
                    code="no-layer",
                    got=word,
                    expected="the name of a layer or of a part of the network",
                    remedy=f"did you mean {' or '.join(near)}?" if near else None,
                )
        return tuple(f"{word}." for word in self.keep)

    def _candidates(self, draft: Draft, context: Context, protected: tuple[str, ...]) -> list[Bypass]:
        every = bypasses(draft.network, context.task.call())
        candidates = [c for c in every if self.layers or c.kind == "block"]
        return [c for c in candidates if not any(f"{name}.".startswith(protected) for name in c.layers)]

    def _meter(self, draft: Draft, context: Context) -> Callable[[Draft], float]:
        """A function from a draft to the fraction of the cost that is left."""
        if self.unit == "latency":
            left = meter.latency_left(context, self.precision)
            return lambda now: 1.0 if now is draft else left(draft, now)

        call = context.task.call()
        return meter.fraction_left(lambda now: meter.amount(self.unit, now.network, call), draft)


def _without(draft: Draft, part: Bypass) -> Draft:
    network = copy.deepcopy(draft.network)
    edit = skip(network, part.last, part.by)
    return replace(draft, network=network, edits=(*draft.edits, edit))


def _outputs(network: fx.GraphModule, call: Call) -> list[torch.Tensor]:
    args, kwargs = call
    with torch.no_grad(), in_eval_mode(network):
        return [x.double() for x in flatten_outputs(network(*args, **kwargs))[0] if x.is_floating_point()]


def _noise(network: fx.GraphModule, calls: Sequence[Call], references: Sequence[list[torch.Tensor]]) -> float:
    """Noise power over signal power at the outputs."""
    signal = noise = 0.0
    for call, outputs in zip(calls, references, strict=True):
        for reference, output in zip(outputs, _outputs(network, call), strict=True):
            signal += float(reference.square().sum())
            noise += float((reference - output).square().sum())
    ratio = noise / signal if signal else 0.0
    return ratio if math.isfinite(ratio) else 1e9


__all__ = ["Blocks"]
