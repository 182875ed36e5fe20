"""Automatic handling of outlier channels that cost an activation its other values.

One scale serves all channels of an activation. If some are far larger than the rest (Dettmers et al., "LLM.int8()",
NeurIPS 2022), the rest is rounded to zero, and no rounding of weights repairs that. The remedies, in order of cost: the
magnitude is migrated into the weights; the channels are split off; the additions stay in floating point (a residual
stream carries its outlier channels through all of them, while most of the work is in matrix products); or all affected
operators do.
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
from penjing.tasks.sample_axes import size_of
from penjing.tasks.task import Call

POOR_DB = 15.0  # of an output: below it the cause is looked for
GOOD_DB = 20.0  # from here on no costlier remedy is tried
CLEAR_DB = 21.0  # after a few samples: the others are not asked
GAIN_DB = 3.0  # half of the noise: a smaller gain does not justify another plan
FACTOR = 6.0  # a channel this many times larger than the median one is an outlier, as in `SplitOutliers`
FAINT = 64.0  # a channel this many times smaller than the largest one is left with two levels of 8 bits
SAMPLES, FEW = 32, 8
ALPHA = 0.75  # of `SmoothQuant` with additions in floating point
Quantize = Callable[..., Draft]


def mitigated(quantize: Quantize, draft: Draft, quantized: Draft, context: Context) -> Draft:
    """Return `quantized` if no output is too noisy or no channels are outliers; else the draft of the best remedy.

    Args:
        quantize: Quantizes a draft: called with the draft, the context, names of further operators to leave in floating
            point, and settings of the step to override.
        draft: Before quantization.
        quantized: The result of `quantize`.
        context: Its task has the calibration data.
    """
    calls = chunks(context, draft.network, SAMPLES)
    before = best = _worst(draft.network, quantized, calls)
    if before >= POOR_DB or not (names := outliers(quantized.network, quantized.plan, calls)):
        return quantized
    split = SplitOutliers(factor=FACTOR, most=0.1)
    smooth = SmoothQuant(alpha=ALPHA, multiply=True)
    nodes = sites(quantized.network)
    additions: tuple[str, ...] = ()
    if any(kind(quantized.network, nodes[name]) == "add" for name in names):  # all additions share one residual stream
        additions = tuple(name for name, node in nodes.items() if kind(quantized.network, node) == "add")
    remedies: dict[str, Callable[[], Draft]] = {
        "SmoothQuant": lambda: quantize(SmoothQuant()(draft, context), context, ()),
        "SplitOutliers": lambda: quantize(split(draft, context), context, ()),
        "additions in floating point": lambda: _in_floats(quantize(draft, context, additions), additions),
        "SmoothQuant and additions in floating point": lambda: _in_floats(
            quantize(smooth(draft, context), context, additions, activation_range="minmax"), additions
        ),
        "floating point": lambda: _in_floats(quantize(draft, context, names), names),
    }
    chosen = quantized
    for title, remedy in remedies.items():
        if "additions" in title and not additions:
            continue
        candidate = remedy()
        reached = _worst(draft.network, candidate, calls)
        improves = reached > max(best, before + GAIN_DB)
        context.events("remedy", name=title, snr_db=reached, before_db=before, kept=improves, slower=False, seconds=0.0)
        if improves:
            text = f"{title}, as {len(names)} operators read outlier channels: {reached:.1f} dB instead of {before:.1f}"
            best, chosen = reached, replace(candidate, plan=replace(candidate.plan, remedy=text))
        if best >= GOOD_DB:
            break
    return chosen


def outliers(network: fx.GraphModule, plan: Plan, calls: list[Call]) -> tuple[str, ...]:
    """Return the sites of quantized operators that read a value whose channels can't share a scale.

    Either a few channels are far larger than the others, or a tenth of the channels that are not always 0 vanish next
    to the largest, as when raw measurements of different magnitudes are concatenated.
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
    """Whether channels can't share a scale, from the largest magnitude of each, (channels,)."""
    used, most = largest[largest > 0], float(largest.max())
    few = 0 < FACTOR * float(largest.median()) < most
    return few or (len(used) > 1 and FAINT * float(used.quantile(0.1)) < most)


def _in_floats(quantized: Draft, names: tuple[str, ...]) -> Draft:
    floats = {name: FLOAT if name in names else reason for name, reason in quantized.plan.floats.items()}
    return replace(quantized, plan=replace(quantized.plan, floats=floats))


def _worst(reference: fx.GraphModule, quantized: Draft, calls: list[Call]) -> float:
    """Signal-to-noise ratio of the noisiest floating-point output, in dB: of a few samples if those are clear of it."""
    network = insert(quantized.network, quantized.plan)
    signal: list[float] = []
    lost: list[float] = []
    samples, worst = 0, float("inf")
    with torch.no_grad():
        for call in calls:
            args, kwargs = call
            pairs = zip(*(flatten_outputs(n(*args, **kwargs))[0] for n in (reference, network)), strict=True)
            sums = [(noise.energy(a), noise.energy(a - b)) for a, b in pairs if a.is_floating_point()]
            signal = [x + s for x, (s, _) in zip(signal or [0.0] * len(sums), sums, strict=True)]
            lost = [x + n for x, (_, n) in zip(lost or [0.0] * len(sums), sums, strict=True)]
            samples += size_of(call)
            worst = min((noise.decibels(n / s) for s, n in zip(signal, lost, strict=True) if s), default=float("inf"))
            if samples >= FEW and worst >= CLEAR_DB:
                break
    return worst
