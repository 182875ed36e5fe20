"""Where a quantized network's noise comes from, operator by operator, and which repair applies."""

from __future__ import annotations

import math

from penjing.analyze import lockstep, noise
from penjing.analyze.samples import chunks, part, split
from penjing.network.graph import kind, sites
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.placement import carries
from penjing.quantize.static import Static
from penjing.records import NoiseRow
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC, Entry
from penjing.steps.step import Context

SAMPLES = 16
FAINT = 1e-4  # noise over signal, 40 dB: it changes fewer predictions than bfloat16 does


def explain(draft: Draft, context: Context, static: Static | None = None) -> tuple[NoiseRow, ...]:
    """Measure the noise of every operator quantized alone, before and after `CoordinateRounding`, on held-out samples.

    Args:
        draft: A network that is not quantized yet.
        context: Its task must have calibration data.
        static: Quantization settings; None takes the defaults.
    """
    fitting, held_out = split(context)
    plain = (static or Static())(draft, fitting)
    repaired = CoordinateRounding()(plain, fitting)
    few = [part(call, 0, 4, context.task.dynamic) for call in held_out[: SAMPLES // 4]]

    def progress(done: int, total: int) -> None:
        context.events("progress", label="noise of every operator", done=done, total=total)

    nodes, capabilities = sites(plain.network), context.capabilities or GENERIC
    before = noise.isolated(plain.network, plain.plan, few, progress)
    # An operator that only moves values would count the noise of its reader a second time.
    before = {name: alone for name, alone in before.items() if not carries(plain.network, nodes[name], capabilities)}
    after = noise.isolated(plain.network, plain.plan, few, progress, repaired.network)
    ranges = _clipped(plain, context)
    total = sum(after[name].total for name in before) or 1.0
    rows = []
    for name, alone in before.items():
        entry = plain.plan.entries.get(f"{name}:in0")
        low, high = _range(entry) if entry is not None else (math.nan, math.nan)
        rows.append(
            NoiseRow(
                name=name,
                kind=kind(plain.network, nodes[name]),
                weights_db=_finite(noise.decibels(alone.weights)),
                repaired_db=_finite(noise.decibels(after[name].weights)),
                activations_db=_finite(noise.decibels(alone.activations)),
                low=low if entry is not None else None,
                high=high if entry is not None else None,
                clipped=ranges.get(name),
                share=after[name].total / total,
                remedy=_remedy(alone, after[name], total),
            )
        )
    return tuple(rows)


def _remedy(before: noise.Noise, after: noise.Noise, total: float) -> str:
    """The remedy for an operator, from the noise it causes at the outputs."""
    if after.total > max(0.2 * total, FAINT):
        return "floating point"  # a fifth of all noise comes from this operator
    if before.weights > 2 * after.weights and before.weights > max(0.05 * total, FAINT):
        return "rounding"
    return ""


def _range(entry: Entry) -> tuple[float, float]:
    low, high = entry.spec.limits
    return (low - entry.zero_point[0]) * entry.scale[0], (high - entry.zero_point[0]) * entry.scale[0]


def _clipped(draft: Draft, context: Context) -> dict[str, float]:
    """Site of a layer → share of its input values outside the range."""
    shares: dict[str, float] = {}

    def watch(layer: lockstep.Layer) -> None:
        entry = draft.plan.entries.get(f"{layer.site}:in0")
        if entry is not None:
            shares[layer.site] = sum(noise.clipped(x, entry) for x in layer.inputs) / len(layer.inputs)

    lockstep.run(draft.network, type(draft.plan)(), chunks(context, draft.network, SAMPLES), watch)
    return shares


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
