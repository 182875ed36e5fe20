"""Mixed precision: which operators take how many bits, solved exactly under a budget and measured as a whole.

Noise per operator: what it alone brings to the outputs, its weights rounded as they will be (Dong et al., "HAWQ-V2",
NeurIPS 2020, rank by curvature; here the noise itself is measured). At very few bits noises do not add up, and what
rounding to the nearest brings ranks operators as well or better: a mean of bits is kept in both ways, and the better of
the two networks is taken. Time per operator: from the runtime's own profile,
once all integer and once all floating point, scaled to the latency of the whole network, and a cost on every edge whose
two ends differ, for the conversion between them; layer times alone do not add up. The choice is an integer linear
program, solved by HiGHS, and every choice is measured: what took longer than reckoned makes conversions dearer in the
next round.

A file has one floating-point format beside its integers, fp32 or bfloat16: the choice is made once for each that the
processor multiplies, and the better of them is kept.
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

RANKED = 16  # samples that noise is measured on
ROUNDS = 4  # times that the budget is tightened when the measured network exceeds it
MARGIN = 0.97  # of a latency: the same network, measured again, is some percent off
INTEGERS = ("int8", "int8-bf16")  # precisions of an artifact with integers in it
CALL_BYTES = 50_000  # a conversion costs at least what so many bytes cost: its call, some microseconds
LEAST_RATE = 1e-8  # milliseconds a byte: no conversion is free, or the choice would be arbitrary
BITS = Rule(
    lambda value: isinstance(value, tuple | list) and 0 < len(value) == len(set(map(repr, value))),
    "different numbers of bits, for example (8, 4)",
)


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Choose every operator's bits: the least noise within a latency or a mean of bits, or the fastest within a noise.

    Exactly one limit is given. Instead of `Static`; weights are rounded by `CoordinateRounding` at the end.

    Attributes:
        latency_ms: Largest latency in the target runtime, as measured on the whole network.
        latency_ratio: The same as a multiple of the latency of the network all in integers (of the most bits), measured
            beside it: it means the same on a machine whose clock or neighbours change.
        snr_db: Smallest signal-to-noise ratio of the outputs, as measured on held-out calibration data.
        average_bits: Largest mean number of bits of a weight.
        weight_bits: The bits that a weight may have.
        floats: Whether operators may stay in floating point.
        precision: What the operators in floating point are computed in: "int8" is fp32, "int8-bf16" bfloat16; "auto"
            tries both where the runtime multiplies bfloat16 here. What was taken stands in `Plan.precision`.
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
        given = [v for v in limits if v is not None]
        if len(given) != 1:
            raise RecipeError(
                "MixedPrecision takes exactly one limit",
                got=f"{len(given)} of them",
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
        """Return a repaired draft with the first plan that keeps the limit, or the nearest."""
        if self._timed and context.profile is None:
            raise UsageError(
                "a latency can only be held in a runtime that times its operators",
                got=context.capabilities.runtime if context.capabilities else "no runtime",
                expected="openvino, through pj.run or penjing compress",
            )
        precisions = self._precisions(context)
        fitting, held = split(context)
        drafts = {bits: self._static(bits)(draft, fitting) for bits in self.weight_bits}
        ways = [_alone(drafts, fitting, held, repaired=r) for r in ((True, False) if self.average_bits else (True,))]
        plain = dict.fromkeys(ways[0], max(self.weight_bits))
        reckoned = [
            (precision, _costs(self, drafts, alone, precision, held, context))
            for precision in precisions
            for alone in ways
        ]
        limit = self._limit(min(costs.time(plain) for _, costs in reckoned))
        tried: list[_Tried] = []
        for precision, costs in reckoned:
            candidates = _Candidates(draft, drafts, costs, precision, plain)
            tried += self._rounds(candidates, limit, fitting, held, context)
        if not tried:
            raise RecipeError(
                "no choice of bits keeps this limit",
                got=f"average_bits={self.average_bits} of {self.weight_bits}",
                expected="a looser limit, or more kinds in weight_bits",
            )
        best = min(tried, key=lambda t: (max(t.missed, 1.0), t.worth))
        for name, bits in best.chosen.items():
            context.events("bits", site=name, bits=bits or "float", precision=best.precision)
        final = {bits: self._static(bits)(draft, context) for bits in self.weight_bits}
        made = CoordinateRounding()(_planned(final, best.chosen), context)
        return replace(made, plan=replace(made.plan, precision=best.precision))

    def _precisions(self, context: Context) -> tuple[str, ...]:
        """What the rest may be computed in: the artifacts' precisions to choose from."""
        there = [p for p in (context.capabilities or GENERIC).precisions if p in INTEGERS]
        if not there or self.precision not in ("auto", *there):
            raise UsageError(
                "MixedPrecision(precision=...) is not to be had in this runtime on this processor",
                got=self.precision,
                expected=" or ".join(there) or "a runtime with integers",
                remedy="precision='auto' takes what there is" if there else "`penjing runtimes` lists them",
            )
        if self.precision != "auto":
            return (self.precision,)
        return tuple(there) if self.floats and self.average_bits is None else tuple(there[:1])

    def _rounds(
        self, candidates: _Candidates, limit: float, fitting: Context, held: list[Any], context: Context
    ) -> list[_Tried]:
        """Choices with one floating-point format, each made and measured, until one keeps the limit."""
        costs, precision, plain = candidates.costs, candidates.precision, candidates.plain
        budget = MARGIN * limit if self._timed else limit
        tried: list[_Tried] = []
        for _ in range(ROUNDS):
            chosen = solve(costs, budget, self._objective(), max(self.weight_bits))
            chosen = chosen or (self._nearest(costs) if not tried else None)
            if chosen is None:
                break
            made = CoordinateRounding()(_planned(candidates.drafts, chosen), fitting)
            snr = noise.signal_to_noise(candidates.draft.network, insert(made.network, made.plan), held)
            power = 10 ** (-snr / 10) + sum(costs.noise[n][FLOAT] for n, bits in chosen.items() if bits == FLOAT)
            snr = noise.decibels(power)
            missed, costs, budget = self._judged(made, candidates, chosen, snr, costs, limit, budget, context)
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
        """In the unit that is limited: milliseconds, noise power over signal power, or mean bits.

        `integer_ms` is what the network all in integers takes, with the rest in the format that is faster.
        """
        if self.snr_db is not None:
            return 10 ** (-self.snr_db / 10)
        if self.latency_ratio is not None:
            return self.latency_ratio * integer_ms
        return self.latency_ms if self.latency_ms is not None else float(self.average_bits or 0)

    def _nearest(self, costs: Costs) -> dict[str, int] | None:
        """What comes nearest to a limit that nothing keeps as reckoned: it may keep it as measured."""
        if self._timed:
            return solve(costs, math.inf, "latency", max(self.weight_bits))
        if self.snr_db is not None:
            return {name: min(choices, key=lambda b: choices[b]) for name, choices in costs.noise.items()}
        return None

    def _objective(self) -> str:
        return "latency" if self.snr_db is not None else "bits" if self.average_bits is not None else "noise"

    def _judged(
        self, made: Draft, candidates: _Candidates, chosen: Mapping[str, int], snr: float, costs: Costs, limit: float,
        budget: float, context: Context,
    ) -> tuple[float, Costs, float]:  # fmt: skip
        """How many times the limit was measured, and what the next round reckons with.

        The network all in integers is measured beside `made`. A latency has to be kept with a margin, but for that
        network itself, which nothing is faster than but by other formats.
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
        integer, latency = context.latency([widest, made], candidates.precision)
        if reckoned:
            latency *= reckoned / integer  # a machine is not always as fast as when the times were taken
        costs = costs.corrected(chosen, latency)
        aim = MARGIN * limit
        if costs.time(chosen) <= budget:  # conversions don't explain it: ask for less
            budget *= min(aim / latency, 0.95)
        return latency / aim, costs, budget


@dataclass(frozen=True)
class _Candidates:
    """What the choices of one floating-point format are made from.

    The source, drafts by bits, their costs, the format, and the choice of the most bits for all.
    """

    draft: Draft
    drafts: Mapping[int, Draft]
    costs: Costs
    precision: str
    plain: Mapping[str, int]


@dataclass(frozen=True)
class _Tried:
    """A choice that was measured: how many times the limit it takes, what to have little of, and itself."""

    missed: float
    worth: float
    precision: str
    chosen: Mapping[str, int]


def _alone(
    drafts: Mapping[int, Draft], fitting: Context, held: list[Any], *, repaired: bool
) -> dict[str, dict[int, float]]:
    """Site → bits → noise of its integers alone, for every operator that there is a choice for.

    Weights are those that CoordinateRounding gives, or, where not `repaired`, rounded to the nearest.
    """
    few = _few(held)
    widest = drafts[max(drafts)]
    capabilities = fitting.capabilities or GENERIC
    nodes = sites(widest.network)
    names = [n for n in nodes if any(e.startswith(f"{n}:") for e in widest.plan.entries)]
    names = [n for n in names if not carries(widest.network, nodes[n], capabilities)]
    alone: dict[str, dict[int, float]] = {n: {} for n in names}
    for bits, draft in drafts.items():
        rounded = CoordinateRounding()(draft, fitting).network if repaired else None
        for name, found in noise.isolated(draft.network, draft.plan, few, repaired=rounded).items():
            if name in alone and (f"{name}:weight" in draft.plan.entries or bits == max(drafts)):
                alone[name][bits] = found.total
    return alone


def _costs(
    settings: MixedPrecision, drafts: Mapping[int, Draft], alone: Mapping[str, Mapping[int, float]], precision: str,
    held: list[Any], context: Context,
) -> Costs:  # fmt: skip
    """What the solver chooses from, with one floating-point format."""
    widest, names = drafts[max(drafts)], list(alone)
    weights = {n: _numel(widest, n) for n in names}
    if not settings.floats or settings.average_bits is not None:
        return Costs(noise=alone, ms={}, weights=weights)
    halves = noise.in_bfloat16(widest.network, names, _few(held)) if precision == "int8-bf16" else {}
    both = {name: {**choices, FLOAT: halves.get(name, 0.0)} for name, choices in alone.items()}
    if context.profile is None or context.latency is None:
        return Costs(noise=both, ms={}, weights=weights)
    edges = [e for e in _edges(widest, names, context) if e[0] != e[1]]
    return _timed(precision, widest, names, Costs(both, {}, {}, weights), edges, context)


def _few(held: list[Any]) -> list[Any]:
    return [part(call, 0, 4) for call in held[: RANKED // 4]]


def _timed(
    precision: str, integer: Draft, names: list[str], costs: Costs, edges: list[tuple[str, str, int]],
    context: Context,
) -> Costs:  # fmt: skip
    """`costs` with times: shares of operators from profiles, scaled to what whole networks take.

    A network whose formats alternate gives the time of conversions.
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
    """Values that go from one operator to another, through whatever is fused in between: (from, to, bytes)."""
    found = []
    known = shapes(draft.network, context.task.call())
    nodes = sites(draft.network)
    chosen = {nodes[n]: n for n in names}
    for name in names:
        for producer in tensor_inputs(nodes[name]):
            value = known.get(producer.name)
            while producer not in chosen and len(tensor_inputs(producer)) == 1:
                producer = tensor_inputs(producer)[0]
            if producer in chosen and isinstance(value, torch.Tensor):
                found.append((chosen[producer], name, value.numel() * value.element_size()))
    return found


def _attributed(timed: list[tuple[tuple[str, ...], float]], names: set[str]) -> tuple[dict[str, float], float]:
    """Time of every operator, a fused group's to the first of it; and of everything else."""
    found: dict[str, float] = {}
    rest = 0.0
    for group, ms in timed:
        owner = next((site for site in group if site in names), None)
        if owner is None:
            rest += ms
        else:
            found[owner] = found.get(owner, 0.0) + ms
    return found, rest


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
