"""What is done by itself where a few huge channels cost an activation its other values.

One scale serves all channels of an activation. Where some are far larger than the rest (Dettmers et al., "LLM.int8()",
NeurIPS 2022), the rest is rounded to nothing, and no rounding of weights mends that. From the cheapest to the dearest:
the weights take the difference over, the channels are split off, the additions stay in floating point (a residual
stream carries its huge channels through all of them, while most of the work is in products), all of the operators do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from penjing.analyze import noise
from penjing.analyze.samples import chunks
from penjing.network.graph import flat_inputs, kind, sites, tensor_inputs
from penjing.quantize.outliers import SplitOutliers
from penjing.quantize.smoothquant import SmoothQuant
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.surgery.outliers import FLOAT
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Call

POOR_DB = 15.0  # of an output: below it something is wrong that is looked into
GOOD_DB = 20.0  # nothing dearer is tried then
GAIN_DB = 3.0  # half of the noise: less is no reason for another plan
FACTOR = 6.0  # a channel so many times larger than the median one is an outlier, as in `SplitOutliers`
FAINT = 64.0  # a channel so many times smaller than the largest one has two steps left of 8 bits
SAMPLES = 32
ALPHA = 0.75  # of `SmoothQuant` beside additions in floating point: all but the weights' own differences
Quantize = Callable[..., Draft]


def eased(quantize: Quantize, draft: Draft, made: Draft, context: Context) -> Draft:
    """`made` itself where every output keeps its values or no channels are huge; the best of the remedies otherwise.

    Args:
        quantize: Makes the plan of a draft: called with it, the context, names of operators that stay in floating point
            besides, and settings of the step that are others.
        draft: Before quantization.
        made: What `quantize` makes of it.
        context: Its task has the calibration data.
    """
    calls = chunks(context, draft.network, SAMPLES)
    before = best = _worst(draft.network, made, calls)
    if before >= POOR_DB or not (names := outliers(made.network, made.plan, calls)):
        return made
    split = SplitOutliers(factor=FACTOR, most=0.1)
    smooth = SmoothQuant(alpha=ALPHA, multiply=True)
    nodes = sites(made.network)
    additions: tuple[str, ...] = ()
    if any(kind(made.network, nodes[name]) == "add" for name in names):  # the stream is one: all of its additions
        additions = tuple(name for name, node in nodes.items() if kind(made.network, node) == "add")
    remedies: dict[str, Callable[[], Draft]] = {
        "SmoothQuant": lambda: quantize(SmoothQuant()(draft, context), context, ()),
        "SplitOutliers": lambda: quantize(split(draft, context), context, ()),
        "additions in floating point": lambda: _in_floats(quantize(draft, context, additions), additions),
        "SmoothQuant and additions in floating point": lambda: _in_floats(
            quantize(smooth(draft, context), context, additions, activation_range="minmax"), additions
        ),
        "floating point": lambda: _in_floats(quantize(draft, context, names), names),
    }
    chosen = made
    for word, remedy in remedies.items():
        if "additions" in word and not additions:
            continue
        tried = remedy()
        reached = _worst(draft.network, tried, calls)
        kept = reached > max(best, before + GAIN_DB)
        context.events("remedy", name=word, snr_db=reached, before_db=before, kept=kept, slower=False, seconds=0.0)
        if kept:
            text = f"{word}, as {len(names)} operators read huge channels: {reached:.1f} dB instead of {before:.1f}"
            best, chosen = reached, replace(tried, plan=replace(tried.plan, remedy=text))
        if best >= GOOD_DB:
            break
    return chosen


def outliers(network: fx.GraphModule, plan: Plan, calls: list[Call]) -> tuple[str, ...]:
    """Sites of the quantized operators that read a value whose channels one scale can't serve.

    A few are far larger than the others, or a tenth of those that are not always 0 are lost beside the largest, as
    where raw measurements of many sizes come together.
    """
    nodes = sites(network)
    read: dict[str, list[str]] = {}
    for edge in plan.entries:
        name, _, port = edge.rpartition(":")
        if name in nodes and port.startswith("in"):
            read.setdefault(tensor_inputs(nodes[name])[int(port.removeprefix("in"))].name, []).append(name)
    largest: dict[str, torch.Tensor] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in read and isinstance(result, torch.Tensor) and result.dim() > 1:
                axis = 1 if result.dim() > 3 else -1
                now = result.abs().movedim(axis, 0).flatten(1).amax(1)
                known = largest.get(n.name, now)
                largest[n.name] = torch.maximum(known, now) if known.shape == now.shape else now
            return result

    with torch.no_grad():
        for call in calls:
            Observer(network).run(*flat_inputs(network, call))
    huge = [name for name, values in largest.items() if _apart(values)]
    return tuple(dict.fromkeys(site for name in huge for site in read[name]))


def _apart(largest: torch.Tensor) -> bool:
    """Of the largest magnitude of every channel, (channels,)."""
    used, most = largest[largest > 0], float(largest.max())
    few = 0 < FACTOR * float(largest.median()) < most
    return few or (len(used) > 1 and FAINT * float(used.quantile(0.1)) < most)


def _in_floats(made: Draft, names: tuple[str, ...]) -> Draft:
    floats = {name: FLOAT if name in names else reason for name, reason in made.plan.floats.items()}
    return replace(made, plan=replace(made.plan, floats=floats))


def _worst(reference: fx.GraphModule, made: Draft, calls: list[Call]) -> float:
    """Signal-to-noise ratio of the floating-point output that loses most, in dB."""
    network = insert(made.network, made.plan)
    signal: list[float] = []
    lost: list[float] = []
    with torch.no_grad():
        for args, kwargs in calls:
            pairs = zip(*(flatten_outputs(n(*args, **kwargs))[0] for n in (reference, network)), strict=True)
            sums = [(noise.energy(a), noise.energy(a - b)) for a, b in pairs if a.is_floating_point()]
            signal = [x + s for x, (s, _) in zip(signal or [0.0] * len(sums), sums, strict=True)]
            lost = [x + n for x, (_, n) in zip(lost or [0.0] * len(sums), sums, strict=True)]
    return min((noise.decibels(n / s) for s, n in zip(signal, lost, strict=True) if s), default=float("inf"))
