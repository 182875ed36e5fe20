"""Mixed precision: the bit width of every operator, chosen exactly under a budget and measured as a whole network.

Noise per operator: the noise at the outputs if it alone is quantized, with its weights rounded as they will be (Dong et
al., "HAWQ-V2", NeurIPS 2020, rank by curvature; here the noise itself is measured). At very few bits the noise of
operators is not additive, and noise measured with weights rounded to the nearest ranks them as well or better: under a
mean bit width both are tried, and the better of the two networks is taken. Time per operator: from the runtime's own
profile, once all-integer and once all floating point, scaled to the latency of the whole network, plus a cost for the
conversion on every edge between different formats, because layer times alone do not add up. The choice is an integer
linear program, solved by HiGHS, and every choice is measured: any excess over the prediction makes conversions more
expensive in the next round.

A file has one floating-point format beside its integers, fp32 or bfloat16: the problem is solved for each that the
processor supports, and the better solution is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from penjing.analyze import noise
from penjing.analyze.samples import part, split
from penjing.errors import RecipeError, UsageError
from penjing.network.graph import shapes, sites, tensor_inputs
from penjing.quantize.choice import FLOAT, Costs, solve
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.placement import carries
from penjing.quantize.static import Static
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC, Plan
from penjing.steps.settings import FLAG, Rule, above, check, number, one_of, optional
from penjing.steps.step import Context
from penjing.surgery import insert

RANKED = 16  # samples on which noise is measured
ROUNDS = 4  # times that the budget is tightened if the measured network exceeds it
MARGIN = 0.97  # of a latency: repeated measurements of the same network vary by a few percent
INTEGERS = ("int8", "int8-bf16")  # precisions of an artifact with integers
CALL_BYTES = 50_000  # the fixed cost of a conversion, its call, expressed in bytes: some microseconds
LEAST_RATE = 1e-8  # milliseconds per byte: no conversion is free, or the choice would be arbitrary
BITS = Rule(
    lambda value: isinstance(value, tuple | list) and 0 < len(value) == len(set(map(repr, value))),
    "different numbers of bits, for example (8, 4)",
)


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Choose every operator's bit width: least noise within a latency or mean bit width, or fastest within a noise.

    Exactly one limit is given. Replaces `Static`; weights are rounded by `CoordinateRounding` at the end.

    Attributes:
        latency_ms: Largest latency in the target runtime, as measured on the whole network.
        latency_ratio: The same as a multiple of the latency of the all-integer network (at the most bits), measured
            next to it, which is robust against changes in clock rate and load.
        snr_db: Smallest signal-to-noise ratio of the outputs, as measured on held-out calibration data.
        average_bits: Largest mean number of bits of a weight.
        weight_bits: The bit widths to choose from.
        floats: Whether operators may stay in floating point.
        precision: The format of operators in floating point: "int8" is fp32, "int8-bf16" bfloat16; "auto" tries both if
            the runtime supports bfloat16 on this processor. `Plan.precision` records the choice.
        exclude: As in `Static`.
        samples: As in `Static`.
    """

    stage: ClassVar[str] = "quantize and repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    latency_ms: float | None = None
    latency_ratio: float | None = None
    snr_db: float | None = None
    average_bits: float | None = None
    weight_bits: tuple[int, ...] = (8,)
    floats: bool = True
    precision: str = "auto"
    exclude: tuple[str, ...] = ()
    samples: int = 300

    def __post_init__(self) -> None:
        limits = (self.latency_ms, self.latency_ratio, self.snr_db, self.average_bits)
        constraints = [v for v in limits if v is not None]
        if len(constraints) != 1:
            raise RecipeError(
                "MixedPrecision takes exactly one limit",
                code="limits",
                got=f"{len(constraints)} of them",
                expected="latency_ms=, latency_ratio=, snr_db= or average_bits=",
                remedy="for example MixedPrecision(average_bits=5, weight_bits=(8, 4, 2))",
            )
        check(
            self,
            latency_ms=optional(above(0)),
            latency_ratio=optional(above(0)),
            snr_db=optional(number()),
            average_bits=optional(above(0)),
            weight_bits=BITS,
            floats=FLAG,
            precision=one_of("auto", *INTEGERS),
        )
        for bits in self.weight_bits:
            self._static(bits)

    def _static(self, bits: int) -> Static:
        return Static(weight_bits=bits, exclude=self.exclude, samples=self.samples)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a repaired draft with the first plan that satisfies the limit, or the nearest one."""
        if self._timed and context.profile is None:
            raise UsageError(
                "a latency limit needs a runtime that profiles its operators",
                code="no-profile",
                got=context.capabilities.runtime if context.capabilities else "no runtime",
                expected="openvino, through pj.run or penjing compress",
            )
        precisions = self._precisions(context)
        fitting, held_out = split(context)
        drafts = {bits: self._static(bits)(draft, fitting) for bits in self.weight_bits}
        noises = [
            _alone(drafts, fitting, held_out, repaired=r) for r in ((True, False) if self.average_bits else (True,))
        ]
        plain = dict.fromkeys(noises[0], max(self.weight_bits))
        reckoned = [
            (precision, _costs(self, drafts, alone, precision, held_out, context))
            for precision in precisions
            for alone in noises
        ]
        limit = self._limit(min(costs.time(plain) for _, costs in reckoned))
        tried: list[_Tried] = []
        for precision, costs in reckoned:
            candidates = _Candidates(draft, drafts, costs, precision, plain)
            tried += self._rounds(candidates, limit, fitting, held_out, context)
        if not tried:
            raise RecipeError(
                "no choice of bits satisfies this limit",
                code="unreachable",
                got=f"average_bits={self.average_bits} of {self.weight_bits}",
                expected="a looser limit, or more bit widths in weight_bits",
            )
        best = min(tried, key=lambda t: (max(t.missed, 1.0), t.worth))
        for name, bits in best.chosen.items():
            context.events("bits", site=name, bits=bits or "float", precision=best.precision)
        final = {bits: self._static(bits)(draft, context) for bits in self.weight_bits}
        rounded = CoordinateRounding()(_planned(final, best.chosen), context)
        return replace(rounded, plan=replace(rounded.plan, precision=best.precision))

    def _precisions(self, context: Context) -> tuple[str, ...]:
        """The artifact precisions, and so the floating-point formats, to choose from."""
        there = [p for p in (context.capabilities or GENERIC).precisions if p in INTEGERS]
        if not there or self.precision not in ("auto", *there):
            raise UsageError(
                "MixedPrecision(precision=...) is not available in this runtime on this processor",
                code="precision" if there else "no-integers",
                got=self.precision,
                expected=" or ".join(there) or "a runtime with integers",
                remedy="precision='auto' takes what is available" if there else "`penjing runtimes` lists them",
            )
        if self.precision != "auto":
            return (self.precision,)
        return tuple(there) if self.floats and self.average_bits is None else tuple(there[:1])

    def _rounds(
        self, candidates: _Candidates, limit: float, fitting: Context, held_out: list[Any], context: Context
    ) -> list[_Tried]:
        """Choices with one floating-point format, each built and measured, until one satisfies the limit."""
        costs, precision, plain = candidates.costs, candidates.precision, candidates.plain
        budget = MARGIN * limit if self._timed else limit
        tried: list[_Tried] = []
        for _ in range(ROUNDS):
            chosen = solve(costs, budget, self._objective(), max(self.weight_bits))
            chosen = chosen or (self._nearest(costs) if not tried else None)
            if chosen is None:
                break
            rounded = CoordinateRounding()(_planned(candidates.drafts, chosen), fitting)
            snr = noise.signal_to_noise(candidates.draft.network, insert(rounded.network, rounded.plan), held_out)
            power = 10 ** (-snr / 10) + sum(costs.noise[n][FLOAT] for n, bits in chosen.items() if bits == FLOAT)
            snr = noise.decibels(power)
            missed, costs, budget = self._judged(rounded, candidates, chosen, snr, costs, limit, budget, context)
            context.events("mixed", snr_db=snr, met=missed <= 1, limit=limit, missed=missed, precision=precision)
            tried.append(_Tried(missed, costs.time(chosen) if self.snr_db is not None else power, precision, chosen))
            if missed <= 1:
                break
        if tried and tried[-1].missed > 1 and self._timed:
            tried.append(_Tried(costs.time(plain) / limit, math.inf, precision, plain))
        return tried

    @property
    def _timed(self) -> bool:
        return self.latency_ms is not None or self.latency_ratio is not None

    def _limit(self, integer_ms: float) -> float:
        """The limit in its unit: milliseconds, noise power over signal power, or mean bits.

        `integer_ms` is the latency of the all-integer network, with the rest in the faster format.
        """
        if self.snr_db is not None:
            return 10 ** (-self.snr_db / 10)
        if self.latency_ratio is not None:
            return self.latency_ratio * integer_ms
        return self.latency_ms if self.latency_ms is not None else float(self.average_bits or 0)

    def _nearest(self, costs: Costs) -> dict[str, int] | None:
        """The choice nearest to a limit that none is predicted to satisfy; as measured it may satisfy it."""
        if self._timed:
            return solve(costs, math.inf, "latency", max(self.weight_bits))
        if self.snr_db is not None:
            return {name: min(choices, key=lambda b: choices[b]) for name, choices in costs.noise.items()}
        return None

    def _objective(self) -> str:
        return "latency" if self.snr_db is not None else "bits" if self.average_bits is not None else "noise"

    def _judged(
        self, rounded: Draft, candidates: _Candidates, chosen: Mapping[str, int], snr: float, costs: Costs,
        limit: float, budget: float, context: Context,
    ) -> tuple[float, Costs, float]:  # fmt: skip
        """The measured figure as a multiple of the limit, and the costs and budget of the next round.

        The all-integer network is measured next to `rounded`. A latency has to be satisfied with a margin, except by
        that network itself, which only other formats could make faster.
        """
        if self.average_bits is not None:
            return 1.0, costs, budget
        if self.snr_db is not None:
            missed = 10 ** ((self.snr_db - snr) / 10)
            return missed, costs, budget * min(1 / missed, 0.95)
        reckoned = costs.time(candidates.plain)
        if chosen == candidates.plain:
            return reckoned / limit, costs, budget * 0.95
        assert context.latency is not None
        widest = candidates.drafts[max(candidates.drafts)]
        integer, latency = context.latency([widest, rounded], candidates.precision)
        if reckoned:
            latency *= reckoned / integer  # the machine may be faster or slower than when the times were measured
        costs = costs.corrected(chosen, latency)
        aim = MARGIN * limit
        if costs.time(chosen) <= budget:  # conversions do not explain the excess: tighten the budget
            budget *= min(aim / latency, 0.95)
        return latency / aim, costs, budget


@dataclass(frozen=True)
class _Candidates:
    """What the choices with one floating-point format start from.

    The source, drafts by bit width, their costs, the format, and the choice of the most bits for all operators.
    """

    draft: Draft
    drafts: Mapping[int, Draft]
    costs: Costs
    precision: str
    plain: Mapping[str, int]


@dataclass(frozen=True)
class _Tried:
    """A measured choice: its figure as a multiple of the limit, the figure to minimize, and the choice itself."""

    missed: float
    worth: float
    precision: str
    chosen: Mapping[str, int]


def _alone(
    drafts: Mapping[int, Draft], fitting: Context, held_out: list[Any], *, repaired: bool
) -> dict[str, dict[int, float]]:
    """Site → bits → noise if this operator alone is quantized, for every operator with a choice.

    Weights are rounded by `CoordinateRounding`, or, if not `repaired`, to the nearest.
    """
    few = _few(held_out, fitting)
    widest = drafts[max(drafts)]
    capabilities = fitting.capabilities or GENERIC
    nodes = sites(widest.network)
    names = [n for n in nodes if any(e.startswith(f"{n}:") for e in widest.plan.entries)]
    names = [n for n in names if not carries(widest.network, nodes[n], capabilities)]
    alone: dict[str, dict[int, float]] = {n: {} for n in names}
    for bits, draft in drafts.items():
        rounded = CoordinateRounding()(draft, fitting).network if repaired else None
        for name, powers in noise.isolated(draft.network, draft.plan, few, repaired=rounded).items():
            if name in alone and (f"{name}:weight" in draft.plan.entries or bits == max(drafts)):
                alone[name][bits] = powers.total
    return alone


def _costs(
    settings: MixedPrecision, drafts: Mapping[int, Draft], alone: Mapping[str, Mapping[int, float]], precision: str,
    held_out: list[Any], context: Context,
) -> Costs:  # fmt: skip
    """The input of the solver for one floating-point format."""
    widest, names = drafts[max(drafts)], list(alone)
    weights = {n: _numel(widest, n) for n in names}
    if not settings.floats or settings.average_bits is not None:
        return Costs(noise=alone, ms={}, weights=weights)
    halves = noise.in_bfloat16(widest.network, names, _few(held_out, context)) if precision == "int8-bf16" else {}
    both = {name: {**choices, FLOAT: halves.get(name, 0.0)} for name, choices in alone.items()}
    if context.profile is None or context.latency is None:
        return Costs(noise=both, ms={}, weights=weights)
    edges = [e for e in _edges(widest, names, context) if e[0] != e[1]]
    return _timed(precision, widest, names, Costs(both, {}, {}, weights), edges, context)


def _few(held_out: list[Any], context: Context) -> list[Any]:
    return [part(call, 0, 4, context.task.dynamic) for call in held_out[: RANKED // 4]]


def _timed(
    precision: str, integer: Draft, names: list[str], costs: Costs, edges: list[tuple[str, str, int]],
    context: Context,
) -> Costs:  # fmt: skip
    """`costs` with times: the operators' shares from profiles, scaled to the latency of whole networks.

    A network with alternating formats yields the cost of conversions.
    """
    assert context.profile is not None and context.latency is not None
    floating = replace(integer, plan=Plan())
    widest = max(bits for choices in costs.noise.values() for bits in choices)
    alternating = {name: FLOAT if i % 2 else widest for i, name in enumerate(names)}
    mixed = _planned({widest: integer}, alternating)
    whole = context.latency([integer, floating, mixed], precision)
    own, rest = _attributed(context.profile(integer, precision), set(names))
    scale = whole[0] / (sum(own.values()) + rest)
    own, rest = {n: ms * scale for n, ms in own.items()}, rest * scale
    other, _ = _attributed(context.profile(floating, "bf16" if precision == "int8-bf16" else "fp32"), set(names))
    scale = max(0.0, whole[1] - rest) / sum(other.values())
    ms = {n: {b: other.get(n, 0.0) * scale if b == FLOAT else own.get(n, 0.0) for b in costs.noise[n]} for n in names}
    sizes = {(a, b): size + CALL_BYTES for a, b, size in edges}
    costs = replace(costs, ms=ms, rest_ms=rest, edges=dict.fromkeys(sizes, 0.0))
    crossing = sum(sizes[e] for e in costs.crossings(alternating))
    rate = max(LEAST_RATE, (whole[2] - costs.time(alternating)) / crossing) if crossing else LEAST_RATE
    context.events("conversion", ms_per_megabyte=rate * 1e6, precision=precision)
    return replace(costs, edges={e: size * rate for e, size in sizes.items()})


def _edges(draft: Draft, names: list[str], context: Context) -> list[tuple[str, str, int]]:
    """Values passed from one operator to another, through whatever is fused in between: (producer, consumer, bytes)."""
    between = []
    known = shapes(draft.network, context.task.call())
    nodes = sites(draft.network)
    chosen = {nodes[n]: n for n in names}
    for name in names:
        for producer in tensor_inputs(nodes[name]):
            value = known.get(producer.name)
            while producer not in chosen and len(tensor_inputs(producer)) == 1:
                producer = tensor_inputs(producer)[0]
            if producer in chosen and isinstance(value, torch.Tensor):
                between.append((chosen[producer], name, value.numel() * value.element_size()))
    return between


def _attributed(timed: list[tuple[tuple[str, ...], float]], names: set[str]) -> tuple[dict[str, float], float]:
    """Time of every operator, a fused group's attributed to its first; and the time of everything else."""
    by_operator: dict[str, float] = {}
    rest = 0.0
    for group, ms in timed:
        owner = next((site for site in group if site in names), None)
        if owner is None:
            rest += ms
        else:
            by_operator[owner] = by_operator.get(owner, 0.0) + ms
    return by_operator, rest


def _planned(drafts: Mapping[int, Draft], chosen: Mapping[str, int]) -> Draft:
    """The draft with every operator's entries from the plan of its bits."""
    widest = drafts[max(drafts)]
    returned = {name: "mixed precision" for name, bits in chosen.items() if bits == FLOAT}
    entries = dict(widest.plan.without(returned).entries)
    for name, bits in chosen.items():
        edge = f"{name}:weight"
        if bits != FLOAT and edge in drafts[bits].plan.entries:
            entries[edge] = drafts[bits].plan.entries[edge]
    return replace(widest, plan=replace(widest.plan.without(returned), entries=entries))


def _numel(draft: Draft, name: str) -> int:
    if f"{name}:weight" not in draft.plan.entries:
        return 0
    module: Any = draft.network.get_submodule(name.split("@")[0])
    return int(module.weight.numel())
