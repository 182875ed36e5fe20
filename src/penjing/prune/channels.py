"""Structured pruning: whole channels, attention heads and neurons are removed, which every runtime benefits from.

Coupled channels (`penjing.analyze.coupling`) are removed together. The pruned network is compared with a masked
reference (`penjing.analyze.masked`), and has to agree up to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from penjing.analyze import meter
from penjing.analyze.coupling import Coupling, couple
from penjing.analyze.least_squares import samples
from penjing.analyze.masked import masked
from penjing.errors import CalibrationError, PruningError, RecipeError
from penjing.prune import criteria, sensitivity
from penjing.prune.ranking import Ranking, Removed
from penjing.prune.reconstruction import reconstructed
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, NAMES, check, number, one_of, optional, whole
from penjing.steps.step import Context
from penjing.surgery import resize
from penjing.tasks.task import Call

UNITS = ("macs", "params", "channels", "size", "latency")
FRACTION_KEPT = number(above=0, most=1, called="the fraction to keep,")
AGREEMENT = 1e-3  # tolerated difference, relative to the largest output: fp32 sums are reordered


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Remove the least important channels until the given fraction of the cost is left.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; Fang et al., "DepGraph", CVPR 2023.

    Exactly one of the first five settings is given: the fraction that is *kept*.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        macs: The fraction of multiply-accumulates that is kept.
        params: The fraction of parameters.
        channels: The fraction of the units of all prunable groups (with scope "layer": of each group).
        size: The fraction of the bytes of parameters and buffers.
        latency: The fraction of the latency, measured in the target runtime.
        criterion: Importance score of a unit, one of `penjing.prune.criteria.OF_UNITS`; "auto" is "taylor" where the
            task has labelled data and a loss, "jacobian" where it has calibration data, else "l2".
        scope: "global" compares units across all groups, "layer" removes the same fraction of each, "sensitivity" ranks
            them by a scan in which each group is pruned alone (`penjing.prune.sensitivity`; it needs calibration data
            and takes minutes).
        round_to: The channels that remain in a group are a multiple of this; None takes the multiple that the runtime
            is fast with, or 8.
        keep: Layers, or parts of the network, whose outputs are not pruned.
        approximate: Also prune groups that norms and averages compute statistics over (a transformer's residual
            width); the remaining units then compute other values than before.
        min_keep: The smallest fraction of a group that is kept.
        batches: Batches of data that a criterion reads.
        reconstruct: Refit the layers that read removed channels by least squares (`penjing.prune.reconstruction`),
            without labels; None does so where the task has calibration data. Sparse layers, whose zeros have to stay,
            are not refitted.
        precision: The precision at which the latency is measured.
    """

    stage: ClassVar[str] = "structure"
    for_floats: ClassVar[bool] = True

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    size: float | None = None
    latency: float | None = None
    criterion: str = "auto"
    scope: Literal["global", "layer", "sensitivity"] = "global"
    round_to: int | None = None
    keep: tuple[str, ...] = ()
    approximate: bool = False
    min_keep: float = 0.1
    batches: int = 20
    reconstruct: bool | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in UNITS if getattr(self, name) is not None}
        if len(given) != 1:
            raise RecipeError(
                "Channels takes exactly one target",
                code="one-target",
                got=", ".join(f"{k}={v}" for k, v in given.items()) or "none",
                expected=" or ".join(f"{name}=" for name in UNITS),
                remedy="for example Channels(macs=0.5) keeps half of the multiply-accumulates",
            )
        check(
            self,
            **dict.fromkeys(given, FRACTION_KEPT),
            criterion=one_of("auto", *criteria.OF_UNITS),
            scope=one_of("global", "layer", "sensitivity"),
            round_to=optional(whole()),
            keep=NAMES,
            approximate=FLAG,
            min_keep=number(least=0, below=1),
            batches=whole(),
            reconstruct=optional(FLAG),
        )

    @property
    def per_runtime(self) -> bool:
        """Whether what is removed depends on the runtime."""
        return self.latency is not None

    def ranking(self, network: fx.GraphModule, coupling: Coupling, context: Context) -> Ranking:
        """The units of a network in the order in which they are removed."""
        return Ranking.of(
            network,
            coupling,
            context,
            criterion=self.criterion,
            unit=self.unit,
            scope=self.scope,
            batches=self.batches,
            round_to=self.round_to,
            min_keep=self.min_keep,
            approximate=self.approximate,
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft without the least important channels.

        Raises:
            PruningError: The target can't be reached, or the pruned network disagrees with its masked reference.
        """
        coupling = couple(draft.network, context.task.call(), self.keep)
        ranking = self.ranking(draft.network, coupling, context)
        removed = self._chosen(draft, ranking, context)
        if removed and (calls := self._samples(draft, context)):
            draft = replace(draft, network=reconstructed(draft.network, coupling, removed, calls, draft.sparse))
        pruned = remove(draft, coupling, removed)
        error = disagreement(draft.network, pruned.network, coupling, removed, context.task.call())
        context.events(
            "pruned",
            groups=len(removed),
            units=sum(map(len, removed.values())),
            held=len(coupling.not_prunable),
            disagreement=error,
        )
        if not error < AGREEMENT:
            raise PruningError(
                "the pruned network disagrees with its masked reference; this is a defect of Penjing",
                code="disagrees",
                got=f"outputs that differ by {error:.1e} relative to the largest",
                expected=f"a difference below {AGREEMENT:.0e}",
                remedy="exclude the layers named in the report with keep=..., and report the network to us",
            )
        return pruned

    def _samples(self, draft: Draft, context: Context) -> list[Call]:
        """Samples for the reconstruction; none where it is switched off, or was left open and can't be done."""
        if self.reconstruct is False or (self.reconstruct is None and context.task.calibration is None):
            return []
        try:
            return samples(context, draft.network)
        except CalibrationError as error:
            if self.reconstruct:
                raise
            context.events("warning", text=f"pruned without reconstruction: {error.what}")
            return []

    @property
    def unit(self) -> str:
        """The cost that the target is a fraction of, one of `UNITS`."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    def _chosen(self, draft: Draft, ranking: Ranking, context: Context) -> Removed:
        target = float(getattr(self, self.unit))
        if target == 1:
            return {}
        if self.unit == "channels" and self.scope == "layer":
            return ranking.removed(round((1 - target) * ranking.steps))
        left = _meter(self.unit, draft, ranking, context, self.precision)
        low, high = 0, ranking.steps  # too few steps of the ranking, and enough of them
        smallest_left = left(ranking.removed(high))
        if smallest_left > target:
            raise PruningError(
                f"the target {self.unit}={target:g} is below what may be removed",
                code="unreachable",
                got=f"{self.unit}={target:g}; with everything prunable removed, {smallest_left:.3g} is left",
                expected=f"a fraction of at least {smallest_left:.3g}",
                remedy=_in_the_way(self, ranking),
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if left(ranking.removed(middle)) <= target else (middle, high)
            done = math.log2(ranking.steps / (high - low))
            context.events("progress", label="channels", done=round(done), total=round(math.log2(ranking.steps)))
        removed = ranking.removed(high)
        if self.unit == "latency":  # measuring every group again would take minutes
            return removed
        for name, fewer in ranking.refills(removed):
            if left(fuller := {**removed, name: fewer}) <= target:
                removed = {n: units for n, units in fuller.items() if units}
        return removed


def scanned(
    network: fx.GraphModule, coupling: Coupling, context: Context, file: Path | None = None
) -> sensitivity.Scan:
    """A sensitivity scan of every group that `Channels` prunes by default, in the order of its default criterion.

    Args:
        network: A captured network.
        coupling: `penjing.analyze.coupling.couple` of it.
        context: For its data.
        file: A JSON file that caches finished groups.
    """
    step = Channels(macs=0.5)
    groups = {name: g for name, g in coupling.groups.items() if g.units > 1 and not g.statistics}
    criterion = criteria.for_context(step.criterion, context)
    scores = criteria.score_units(criterion, network, coupling, context, step.batches)
    ranked = {name: np.argsort(scores[name], kind="stable").tolist() for name in groups}
    return sensitivity.scan(network, coupling, ranked, context, step.batches, file)


def remove(draft: Draft, coupling: Coupling, removed: Mapping[str, Sequence[int]]) -> Draft:
    """A draft without these units; the given one is left unchanged.

    Args:
        draft: Its network is the one that `coupling` was derived from.
        coupling: `penjing.analyze.coupling.couple` of it.
        removed: Group → units.
    """
    edits = coupling.edits(removed)
    network = copy.deepcopy(draft.network)
    resize(network, edits)
    return replace(draft, network=network, edits=(*draft.edits, *edits))


def disagreement(
    before: fx.GraphModule, after: fx.GraphModule, coupling: Coupling, removed: Removed, call: Any
) -> float:
    """The largest difference between the pruned network and the masked one, relative to the largest output."""
    masked_outputs = masked(before, coupling, removed)(*call[0], **call[1])
    with torch.no_grad():
        outputs = copy.deepcopy(after).eval()(*call[0], **call[1])
    worst = 0.0
    for reference, output in zip(pytree.tree_leaves(masked_outputs), pytree.tree_leaves(outputs), strict=True):
        if isinstance(reference, torch.Tensor) and reference.is_floating_point() and reference.numel():
            scale = float(reference.abs().max())
            difference = float((reference - output).abs().max())
            worst = max(worst, difference / scale if scale else difference)
            worst = math.inf if math.isnan(difference) else worst
    return worst


def _meter(unit: str, draft: Draft, ranking: Ranking, context: Context, precision: str) -> Callable[[Removed], float]:
    """A function from removed units to the fraction of the cost that is left."""
    coupling = ranking.coupling
    if unit == "latency":
        left = meter.latency_left(context, precision)
        return lambda removed: left(draft, remove(draft, coupling, removed))
    if unit == "channels":
        every = sum(coupling.groups[name].units for name in ranking.most)
        return lambda removed: 1 - sum(map(len, removed.values())) / every

    def amount(removed: Removed) -> float:
        return meter.resized_amount(unit, draft.network, *coupling.sizes(coupling.removed_atoms(removed)))

    return meter.fraction_left(amount, {})


def _in_the_way(step: Channels, ranking: Ranking) -> str:
    not_prunable = ranking.coupling.not_prunable
    left_out = [name for name, group in ranking.coupling.groups.items() if group.statistics]
    reasons = [f"{name} ({why})" for name, why in list(not_prunable.items())[:3]]
    texts = [f"min_keep={step.min_keep:g} of every group is kept"] if step.min_keep else []
    if reasons:
        texts.append(f"not prunable: {', '.join(reasons)}{' …' if len(not_prunable) > 3 else ''}")
    if left_out and not step.approximate:
        texts.append(f"approximate=True also prunes {', '.join(left_out[:3])}")
    return "; ".join(texts)


__all__ = ["AGREEMENT", "Channels", "Ranking", "Removed", "disagreement", "remove", "scanned"]
