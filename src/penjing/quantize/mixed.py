"""Mixed precision: which operators take how many bits, solved exactly under a budget and measured as a whole.

Noise per operator: what it alone brings to the outputs (Dong et al., "HAWQ-V2", NeurIPS 2020, rank by curvature; here
the noise itself is measured). Time per operator: from the runtime's own profile, once all integer and once all
floating point, scaled to the latency of the whole network, and a cost on every edge whose two ends differ, for the
conversion between them; layer times alone do not add up. The choice is an integer linear program, solved by HiGHS, and
every choice is measured: what took longer than reckoned makes conversions dearer in the next round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from penjing.analyze import noise
from penjing.draft import Draft
from penjing.errors import RecipeError, UsageError
from penjing.graph import shapes, sites, tensor_inputs
from penjing.plan import GENERIC, Plan
from penjing.quantize.adaround import AdaRound
from penjing.quantize.placement import carries
from penjing.quantize.samples import part, split
from penjing.quantize.static import Static
from penjing.step import Context
from penjing.surgery import insert

RANKED = 16  # samples that noise is measured on
ROUNDS = 4  # times that the budget is tightened when the measured network exceeds it
FLOAT = 0  # "bits" of an operator in floating point
CALL_BYTES = 50_000  # a conversion costs at least what so many bytes cost: its call, some microseconds
LEAST_RATE = 1e-8  # milliseconds a byte: no conversion is free, or the choice would be arbitrary


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Choose every operator's bits: the least noise within a latency or a mean of bits, or the fastest within a noise.

    Exactly one limit is given. Instead of `Static`; weights are rounded by `AdaRound` at the end.

    Attributes:
        latency_ms: Largest latency in the target runtime, as measured on the whole network.
        snr_db: Smallest signal-to-noise ratio of the outputs, as measured on held-out calibration data.
        average_bits: Largest mean number of bits of a weight.
        weight_bits: The bits that a weight may have.
        floats: Whether operators may stay in floating point (as bfloat16 where the candidate's precision says so).
        precision: "int8" or "int8-bf16": what the operators in floating point are computed in.
        exclude: As in `Static`.
        samples: As in `Static`.
    """

    per_runtime: ClassVar[bool] = True

    latency_ms: float | None = None
    snr_db: float | None = None
    average_bits: float | None = None
    weight_bits: tuple[int, ...] = (8,)
    floats: bool = True
    precision: str = "int8"
    exclude: tuple[str, ...] = ()
    samples: int = 300

    def __post_init__(self) -> None:
        given = [v for v in (self.latency_ms, self.snr_db, self.average_bits) if v is not None]
        if len(given) != 1:
            raise RecipeError(
                "MixedPrecision takes exactly one limit",
                got=f"{len(given)} of them",
                expected="latency_ms=, snr_db= or average_bits=",
                remedy="for example MixedPrecision(average_bits=5, weight_bits=(8, 4, 2))",
            )
        if not self.weight_bits or len(set(self.weight_bits)) != len(self.weight_bits):
            raise RecipeError("MixedPrecision(weight_bits=...) can't be used", got=self.weight_bits, expected="(8, 4)")
        if self.precision not in ("int8", "int8-bf16"):
            raise RecipeError(
                "MixedPrecision(precision=...) can't be used", got=self.precision, expected="'int8' or 'int8-bf16'"
            )
        for bits in self.weight_bits:
            self._static(bits)

    def _static(self, bits: int) -> Static:
        return Static(weight_bits=bits, exclude=self.exclude, samples=self.samples)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a repaired draft with the first plan that keeps the limit, or the nearest."""
        if self.latency_ms is not None and context.profile is None:
            raise UsageError(
                "a latency can only be held in a runtime that times its operators",
                got=context.accelerates.runtime if context.accelerates else "no runtime",
                expected="openvino, through pj.run or penjing compress",
            )
        fitting, held = split(context)
        drafts = {bits: self._static(bits)(draft, fitting) for bits in self.weight_bits}
        costs = _costs(self, drafts, held, context)
        limit = budget = self._budget()
        tried: list[tuple[float, dict[str, int]]] = []  # by how much the limit was missed, and the choice
        for _ in range(ROUNDS):
            chosen = solve(costs, budget, self._objective(), max(self.weight_bits))
            chosen = chosen or (self._nearest(costs) if not tried else None)
            if chosen is None:
                break
            made = AdaRound()(_planned(drafts, chosen), fitting)
            snr = noise.signal_to_noise(draft.network, insert(made.network, made.plan), held)
            missed, costs, budget = self._judged(made, drafts[max(drafts)], chosen, snr, costs, budget, context)
            context.events("mixed", snr_db=snr, met=missed <= 1, limit=limit, missed=missed)
            tried.append((missed, chosen))
            if missed <= 1:
                break
        if not tried:
            raise RecipeError(
                "no choice of bits keeps this limit",
                got=f"average_bits={self.average_bits} of {self.weight_bits}",
                expected="a looser limit, or more kinds in weight_bits",
            )
        if tried[-1][0] > 1 and self.latency_ms is not None:
            plain = dict.fromkeys(costs.noise, max(self.weight_bits))
            tried.append((costs.time(plain) / limit, plain))
        best = min(tried, key=lambda t: max(t[0], 1.0))[1]
        for name, bits in best.items():
            context.events("bits", site=name, bits=bits or "float")
        final = {bits: self._static(bits)(draft, context) for bits in self.weight_bits}
        return AdaRound()(_planned(final, best), context)

    def _budget(self) -> float:
        if self.snr_db is not None:
            return 10 ** (-self.snr_db / 10)
        return self.latency_ms if self.latency_ms is not None else float(self.average_bits or 0)

    def _nearest(self, costs: Costs) -> dict[str, int] | None:
        """What comes nearest to a limit that nothing keeps as reckoned: it may keep it as measured."""
        if self.latency_ms is not None:
            return solve(costs, math.inf, "latency", max(self.weight_bits))
        if self.snr_db is not None:
            return {name: min(choices, key=lambda b: choices[b]) for name, choices in costs.noise.items()}
        return None

    def _objective(self) -> str:
        return "latency" if self.snr_db is not None else "bits" if self.average_bits is not None else "noise"

    def _judged(
        self, made: Draft, plain: Draft, chosen: Mapping[str, int], snr: float, costs: Costs, budget: float,
        context: Context,
    ) -> tuple[float, Costs, float]:  # fmt: skip
        """How many times the limit was measured, and what the next round reckons with.

        `plain` is the network all in integers, measured beside `made`.
        """
        if self.average_bits is not None:
            return 1.0, costs, budget
        if self.snr_db is not None:
            missed = 10 ** ((self.snr_db - snr) / 10)
            return missed, costs, budget * min(1 / missed, 0.95)
        assert context.latency is not None and self.latency_ms is not None
        integer, latency = context.latency([plain, made], self.precision)
        if reckoned := costs.time(dict.fromkeys(chosen, max(self.weight_bits))):
            latency *= reckoned / integer  # a machine is not always as fast as when the times were taken
        costs = costs.corrected(chosen, latency)
        if costs.time(chosen) <= budget:  # conversions don't explain it: ask for less
            budget *= min(self.latency_ms / latency, 0.95)
        return latency / self.latency_ms, costs, budget


@dataclass(frozen=True)
class Costs:
    """What the solver chooses from.

    Attributes:
        noise: Site → bits → noise power over signal power that it alone brings.
        ms: Site → bits → time.
        edges: (producer, consumer) → time of a conversion where one is an integer operator and the other is not.
        weights: Site → number of weights.
        rest_ms: Time of everything that is not chosen.
    """

    noise: Mapping[str, Mapping[int, float]]
    ms: Mapping[str, Mapping[int, float]]
    edges: Mapping[tuple[str, str], float] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    rest_ms: float = 0.0

    def crossings(self, chosen: Mapping[str, int]) -> list[tuple[str, str]]:
        """The edges that convert."""
        return [(a, b) for a, b in self.edges if (chosen[a] == FLOAT) != (chosen[b] == FLOAT)]

    def time(self, chosen: Mapping[str, int]) -> float:
        """Milliseconds of a choice."""
        own = sum(self.ms.get(name, {}).get(bits, 0.0) for name, bits in chosen.items())
        return self.rest_ms + own + sum(self.edges[e] for e in self.crossings(chosen))

    def corrected(self, chosen: Mapping[str, int], measured: float) -> Costs:
        """The same with conversions as much dearer as this choice, as measured, took longer."""
        crossing = sum(self.edges[e] for e in self.crossings(chosen))
        extra = measured - self.time(chosen)
        if extra <= 0 or not crossing:
            return self
        return replace(self, edges={e: ms * (1 + extra / crossing) for e, ms in self.edges.items()})


def solve(costs: Costs, budget: float, objective: str, widest: int) -> dict[str, int] | None:
    """The best choice, exactly.

    Args:
        costs: Noise and time of every choice.
        budget: Milliseconds for "noise", mean bits for "bits", noise power over signal power for "latency".
        objective: "noise": least noise in a latency; "bits": least noise in a mean of bits; "latency": the fastest.
        widest: Bits that an operator without weights counts with, and that ties go to.

    Returns:
        Site → bits, 0 for floating point; None where nothing fits.
    """
    names = list(costs.noise)
    columns = [(name, bits) for name in names for bits in costs.noise[name]]
    at = {column: i for i, column in enumerate(columns)}
    edges = [e for e in costs.edges if e[0] in costs.noise and e[1] in costs.noise and costs.edges[e] > 0]
    size = len(columns) + len(edges)
    power = np.array([costs.noise[n][b] for n, b in columns] + [0.0] * len(edges))
    time = np.array([costs.ms.get(n, {}).get(b, 0.0) for n, b in columns] + [costs.edges[e] for e in edges])
    count = sum(costs.weights.get(n, 0) for n in names) or 1
    bits = np.array([costs.weights.get(n, 0) * (b or 32) / count for n, b in columns] + [0.0] * len(edges))
    rows: list[int] = []
    cols: list[int] = []
    values: list[float] = []
    lows: list[float] = []
    highs: list[float] = []

    def constrain(entries: list[tuple[int, float]], low: float, high: float) -> None:
        for column, value in entries:
            rows.append(len(lows))
            cols.append(column)
            values.append(value)
        lows.append(low)
        highs.append(high)

    for name in names:
        constrain([(at[name, b], 1.0) for b in costs.noise[name]], 1, 1)
    for i, (a, b) in enumerate(edges):  # y ≥ |float(a) − float(b)|
        one, two = at.get((a, FLOAT)), at.get((b, FLOAT))
        for sign in (1.0, -1.0):
            entries = [(len(columns) + i, 1.0)]
            entries += [(one, -sign)] if one is not None else []
            entries += [(two, sign)] if two is not None else []
            constrain(entries, 0, np.inf)
    limited = {"noise": time, "bits": bits, "latency": power}[objective]
    room = budget - (costs.rest_ms if objective == "noise" else 0.0)
    if room < math.inf:
        scale = max(abs(room), 1e-30)  # noise powers are far below the solver's tolerances
        constrain([(i, float(v) / scale) for i, v in enumerate(limited) if v], -np.inf, room / scale)
    aim = time if objective == "latency" else power
    aim = aim / max(aim.max(), 1e-30)
    matrix = csr_matrix((values, (rows, cols)), shape=(len(lows), size))
    found = milp(aim, constraints=LinearConstraint(matrix, lows, highs), integrality=np.ones(size), bounds=Bounds(0, 1))
    if found.x is None:
        return None
    return {name: b for (name, b), x in zip(columns, found.x, strict=False) if x > 0.5}


def _costs(settings: MixedPrecision, drafts: Mapping[int, Draft], held: list[Any], context: Context) -> Costs:
    few = [part(call, 0, 4) for call in held[: RANKED // 4]]
    widest = drafts[max(drafts)]
    accelerates = context.accelerates or GENERIC
    nodes = sites(widest.network)
    names = [n for n in nodes if any(e.startswith(f"{n}:") for e in widest.plan.entries)]
    names = [n for n in names if not carries(widest.network, nodes[n], accelerates)]
    alone: dict[str, dict[int, float]] = {n: {} for n in names}
    for bits, draft in drafts.items():
        for name, found in noise.isolated(draft.network, draft.plan, few).items():
            if name in alone and (f"{name}:weight" in draft.plan.entries or bits == max(drafts)):
                alone[name][bits] = found.total
    floats = settings.floats and settings.average_bits is None
    if floats:
        halves = noise.in_bfloat16(widest.network, names, few) if settings.precision == "int8-bf16" else {}
        for name, choices in alone.items():
            choices[FLOAT] = halves.get(name, 0.0)
    weights = {n: _numel(widest, n) for n in names}
    if context.profile is None or context.latency is None or not floats:
        return Costs(noise=alone, ms={}, weights=weights)
    edges = [e for e in _edges(widest, names, context) if e[0] != e[1]]
    return _timed(settings, widest, names, Costs(alone, {}, {}, weights), edges, context)


def _timed(
    settings: MixedPrecision, integer: Draft, names: list[str], costs: Costs, edges: list[tuple[str, str, int]],
    context: Context,
) -> Costs:  # fmt: skip
    """`costs` with times: shares of operators from profiles, scaled to what whole networks take.

    A network whose formats alternate gives the time of conversions.
    """
    assert context.profile is not None and context.latency is not None
    floating = replace(integer, plan=Plan())
    alternating = {name: FLOAT if i % 2 else max(settings.weight_bits) for i, name in enumerate(names)}
    mixed = _planned({max(settings.weight_bits): integer}, alternating)
    whole = context.latency([integer, floating, mixed], settings.precision)
    own, rest = _attributed(context.profile(integer, settings.precision), set(names))
    scale = whole[0] / (sum(own.values()) + rest)
    own, rest = {n: ms * scale for n, ms in own.items()}, rest * scale
    other, _ = _attributed(context.profile(floating, _whole(settings.precision)), set(names))
    scale = max(0.0, whole[1] - rest) / sum(other.values())
    ms = {n: {b: other.get(n, 0.0) * scale if b == FLOAT else own.get(n, 0.0) for b in costs.noise[n]} for n in names}
    sizes = {(a, b): size + CALL_BYTES for a, b, size in edges}
    costs = replace(costs, ms=ms, rest_ms=rest, edges=dict.fromkeys(sizes, 0.0))
    crossing = sum(sizes[e] for e in costs.crossings(alternating))
    rate = max(LEAST_RATE, (whole[2] - costs.time(alternating)) / crossing) if crossing else LEAST_RATE
    context.events("conversion", ms_per_megabyte=rate * 1e6)
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


def _whole(precision: str) -> str:
    return "bf16" if precision == "int8-bf16" else "fp32"


def _numel(draft: Draft, name: str) -> int:
    if f"{name}:weight" not in draft.plan.entries:
        return 0
    module: Any = draft.network.get_submodule(name.split("@")[0])
    return int(module.weight.numel())
