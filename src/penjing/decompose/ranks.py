"""The ways of choosing ranks: named ones, by noise, by energy, and under a budget for all layers together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penjing.analyze import meter, noise
from penjing.analyze.samples import chunks
from penjing.decompose import svd
from penjing.decompose.allocation import Chosen, Walk, refilled
from penjing.decompose.candidates import Candidate, Place, by_noise, candidates, gains, priced
from penjing.decompose.eligible import Eligible
from penjing.decompose.moments import Basis
from penjing.errors import DecompositionError, RecipeError
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery.factorize import factorize

NO_GAIN = "no rank saves multiply-accumulates and parameters"
PROBED = 32  # samples on which the error of every layer is weighed by the error of the outputs
PROBE = 0.9  # of the energy of a layer's outputs that is kept for it


@dataclass(frozen=True)
class Problem:
    """What ranks are chosen for.

    Attributes:
        draft: Of the network.
        context: Its task and runtime.
        layers: Those that can be decomposed; `refused` is added to.
        bases: Layer → the basis of its inputs.
        round_to: Ranks are multiples of this.
        data: A context with the samples on which the layers' errors are weighed; None without data.
    """

    draft: Draft
    context: Context
    layers: Eligible
    bases: Mapping[str, Basis]
    round_to: int
    data: Context | None


def named(problem: Problem, ranks: Mapping[str, Any]) -> Chosen:
    """Ranks by layer.

    Raises:
        RecipeError: A layer can't be decomposed, or a rank is above what its matrix has.
    """
    chosen: Chosen = {}
    layers = problem.layers
    for name, of_layer in ranks.items():
        if name not in layers.places:
            raise RecipeError(
                f"LowRank can't decompose {name}",
                code="no-layer",
                field="ranks",
                got=layers.refused.get(name, f"no such layer, or one that is left out: {name}"),
                expected=f"one of {', '.join(list(layers.places)[:8])}",
            )
        place, forms = layers.places[name], layers.forms[name]
        numbers = tuple(of_layer) if isinstance(of_layer, tuple | list) else (of_layer,)
        form = next((form for form in forms if (form == "tucker") == (len(numbers) == 2)), forms[0])
        out, inputs, _ = place.sizes
        most = {"svd": [min(out, inputs)], "tucker": [inputs, out], "cp": [place.params // max(out, inputs)]}[form]
        if len(numbers) != len(most) or any(n > limit for n, limit in zip(numbers, most, strict=True)):
            raise RecipeError(
                f"the ranks of {name} do not fit its weight",
                code="rank",
                field="ranks",
                got=f"{name}: {of_layer}",
                expected=f"{form}: " + ", ".join(f"a rank of at most {limit}" for limit in most),
            )
        candidate = priced(place, form, numbers, math.nan)
        if _saves(problem, place, candidate):
            chosen[name] = candidate
    return chosen


def by_vbmf(problem: Problem) -> Chosen:
    """The ranks at which weights stand out of their noise."""
    chosen: Chosen = {}
    for name, place in problem.layers.places.items():
        form = problem.layers.forms[name][0]
        candidate = priced(place, form, by_noise(place, form, problem.round_to), math.nan)
        if _saves(problem, place, candidate):
            chosen[name] = candidate
    return chosen


def by_energy(problem: Problem, energy: float) -> Chosen:
    """For every layer the cheapest ranks that keep so much of the energy of its outputs."""
    chosen: Chosen = {}
    for name, options in _options(problem).items():
        enough = [candidate for candidate in options if candidate.energy >= energy - 1e-9]
        if enough:
            chosen[name] = min(enough, key=lambda candidate: (candidate.macs, -candidate.energy))
        elif options:
            problem.layers.refused[name] = f"{NO_GAIN} and keeps {energy:g} of its energy"
    return chosen


def by_budget(problem: Problem, unit: str, target: float, precision: str) -> Chosen:
    """The ranks of all layers together that keep this fraction of a cost, with the least noise at the outputs.

    Args:
        problem: The layers.
        unit: "macs", "params", "size" or "latency".
        target: The fraction to keep.
        precision: That of a measured latency.

    Raises:
        DecompositionError: The target can't be reached.
    """
    if target == 1:
        return {}
    options, places = _options(problem), problem.layers.places
    price, weight = _price(problem, unit, precision), _weights(problem)
    whole = {name: price(name, places[name]) for name in options}

    def error(name: str, candidate: Candidate) -> float:
        return weight[name] * (1 - candidate.energy)

    walk = Walk.of(options, whole, price, error)
    if unit == "latency":
        measured = meter.latency_left(problem.context, precision)
        steps = _reached(problem, walk, lambda chosen: measured(problem.draft, shaped(problem.draft, chosen)), target)
        return _measured(problem, walk.at(steps), precision)
    total = max(1.0, meter.amount(unit, problem.draft.network, problem.context.task.call()))

    def left(chosen: Chosen) -> float:
        return 1 - sum(whole[name] - price(name, candidate) for name, candidate in chosen.items()) / total

    chosen = walk.at(_reached(problem, walk, left, target))
    return refilled(chosen, options, (target - left(chosen)) * total, price, error)


def _price(problem: Problem, unit: str, precision: str) -> Callable[[str, Candidate | Place], float]:
    """What a layer, or a candidate for it, costs; a latency is that of the layer in proportion to its MACs."""
    places = problem.layers.places
    each = {name: 1.0 for name in places}
    if unit == "size":
        each = {name: float(place.module.weight.element_size()) for name, place in places.items()}
    if unit == "latency" and problem.context.profile is not None:
        times = _times(problem.context.profile(problem.draft, precision), {name: [name] for name in places})
        mean = sum(times.values()) / sum(place.macs for place in places.values()) or 1.0
        each = {name: times[name] / place.macs or mean for name, place in places.items()}

    def price(name: str, layer: Candidate | Place) -> float:
        return each[name] * (layer.macs if unit in ("macs", "latency") else layer.params)

    return price


def shaped(draft: Draft, chosen: Chosen) -> Draft:
    """A draft of the same shape as the decomposed one, without its weights: enough to be timed."""
    network = copy.deepcopy(draft.network)
    edits = [factorize(network, name, c.form, c.ranks) for name, c in chosen.items()]
    return replace(draft, network=network, edits=(*draft.edits, *edits))


def _options(problem: Problem) -> dict[str, list[Candidate]]:
    """Layer → its candidates; a layer without one is refused."""
    options: dict[str, list[Candidate]] = {}
    layers = problem.layers
    for number, (name, place) in enumerate(layers.places.items()):
        problem.context.events("progress", label="spectra", done=number, total=len(layers.places))
        options[name] = [
            candidate
            for form in layers.forms[name]
            for candidate in candidates(place, problem.bases[name], form, problem.round_to)
        ]
        if not options[name]:
            layers.refused[name] = NO_GAIN
    return {name: of_layer for name, of_layer in options.items() if of_layer}


def _saves(problem: Problem, place: Place, candidate: Candidate) -> bool:
    """Whether a candidate gains something; otherwise its layer is refused."""
    if gains(place, candidate):
        return True
    macs, params = candidate.macs / place.macs, candidate.params / place.params
    problem.layers.refused[place.name] = f"{candidate.text} takes {macs:.2f}× its MACs and {params:.2f}× its parameters"
    return False


def _weights(problem: Problem) -> dict[str, float]:
    """Layer → noise at the network's outputs per lost energy of its own; 1 without data, and where there is none."""
    places = problem.layers.places
    weights = dict.fromkeys(places, 1.0)
    if problem.data is None:
        return weights
    changed, lost = {}, {}
    for name, place in places.items():
        energies = svd.energies(place.weight, problem.bases[name])
        rank = max(1, int((energies <= PROBE).sum()) - 1)
        first, second = svd.factors(place.weight, problem.bases[name], rank)
        product = second.flatten(1) @ first.flatten(1)
        changed[name] = product.reshape(place.module.weight.shape).to(place.module.weight)
        lost[name] = 1 - float(energies[rank])
    calls = chunks(problem.data, problem.draft.network, PROBED)
    noises = noise.of_weights(problem.draft.network, changed, calls)
    if not any(noises.values()):  # outputs that are classes show none
        return weights
    return {name: noises[name] / lost[name] if lost[name] > 1e-6 else 1.0 for name in places}


def _reached(problem: Problem, walk: Walk, left: Any, target: float) -> int:
    """The fewest steps after which at most the target is left."""
    low, high = 0, len(walk.steps)
    smallest = left(walk.at(high)) if high else 1.0
    if smallest > target:
        refused = [f"{name} ({reason})" for name, reason in list(problem.layers.refused.items())[:3]]
        raise DecompositionError(
            "the target is below what low rank can reach",
            code="unreachable",
            got=f"{target:g}; with every layer at its smallest rank, {smallest:.3g} is left",
            expected=f"a fraction of at least {smallest:.3g}",
            remedy=f"these layers stay whole: {', '.join(refused)}"
            if refused
            else "prune.Channels before it makes layers narrower",
        )
    total = max(1, math.ceil(math.log2(max(2, high))))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(walk.at(middle)) <= target else (middle, high)
        done = total - math.ceil(math.log2(max(1, high - low)))
        problem.context.events("progress", label="ranks", done=min(done, total), total=total)
    return high


def _measured(problem: Problem, chosen: Chosen, precision: str) -> Chosen:
    """Without the layers whose factors take longer than they did, where the runtime times its operators."""
    if problem.context.profile is None:
        return chosen
    after = shaped(problem.draft, chosen)
    old, new = (dict(draft.network.named_modules()) for draft in (problem.draft, after))
    own = {name: [name, *(n for n in new if n.rpartition("_")[0] == name and n not in old)] for name in chosen}
    before_ms, after_ms = (_times(problem.context.profile(d, precision), own) for d in (problem.draft, after))
    slower = {name for name in chosen if before_ms[name] > 0 and after_ms[name] >= before_ms[name]}
    for name in slower:
        text = chosen[name].text
        problem.layers.refused[name] = f"{text} takes {after_ms[name]:.3g} ms, the layer {before_ms[name]:.3g} ms"
    return {name: candidate for name, candidate in chosen.items() if name not in slower}


def _times(profile: list[tuple[tuple[str, ...], float]], own: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Layer → milliseconds of the operators that stem from one of its sites."""
    return {name: sum(ms for seen, ms in profile if set(sites) & set(seen)) for name, sites in own.items()}


__all__ = ["Problem", "by_budget", "by_energy", "by_vbmf", "named", "shaped"]
