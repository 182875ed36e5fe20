"""The order in which units go: scores of a criterion, compared as the scope says, in multiples that runtimes use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from penjing.analyze import meter
from penjing.analyze.coupling import Coupling, Group
from penjing.errors import PruningError
from penjing.prune import criteria, sensitivity
from penjing.prune.scoring import Scores
from penjing.steps.step import Context

Removed = dict[str, list[int]]  # group → its units

SHARES = 1000  # with scope "layer", shares of every group are tried in steps of a thousandth


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order in which they go.

    Attributes:
        coupling: The groups.
        order: (group, unit), the least important first.
        most: Group → how many of its units may go.
        multiple: Group → units are kept in multiples of this.
        scope: As in `Channels`.
        steps: How many choices `removed` has, from nothing to everything that may go.
    """

    coupling: Coupling
    order: Sequence[tuple[str, int]]
    most: Mapping[str, int]
    multiple: Mapping[str, int]
    scope: str
    steps: int

    @classmethod
    def of(
        cls,
        network: fx.GraphModule,
        coupling: Coupling,
        context: Context,
        *,
        criterion: str,
        unit: str,
        scope: str,
        batches: int,
        round_to: int | None,
        min_keep: float,
        approximate: bool,
    ) -> Ranking:
        """Score all units; the settings are those of `Channels`, `unit` the name of its target."""
        groups = {n: g for n, g in coupling.groups.items() if g.units > 1 and (approximate or not g.statistics)}
        if not groups:
            raise PruningError(
                "the network has no channels that can be removed",
                got="; ".join(f"{k}: {v}" for k, v in list(coupling.not_prunable.items())[:3])
                or "no layer with channels",
                remedy="approximate=True takes those that norms look at, too"
                if coupling.groups
                else "`penjing inspect` shows the reason for every layer",
            )
        criterion = criteria.for_context(criterion, context)
        scores = criteria.score_units(criterion, network, coupling, context, batches)
        scores = {name: scores[name] for name in groups}
        if scope == "sensitivity":
            scores = _by_sensitivity(unit, batches, network, coupling, context, scores)
        elif criteria.CRITERIA[
            criterion
        ].estimates_loss:  # changes of one loss: what counts is the change for what is saved
            prices = meter.group_prices(unit, network, coupling, context.task.call())
            scores = {name: value / prices[name] for name, value in scores.items()}
        else:
            scores = criteria.relative(scores)
        capabilities = context.capabilities
        round_to = round_to or (capabilities.channel_multiple if capabilities else 8)
        multiple = {name: _multiple(group, round_to) for name, group in groups.items()}
        most = {n: g.units - max(1, multiple[n], math.ceil(min_keep * g.units)) for n, g in groups.items()}
        order = sorted(
            ((name, unit) for name, value in scores.items() for unit in range(len(value))),
            key=lambda u: (scores[u[0]][u[1]], u),
        )
        steps = SHARES if scope == "layer" else len(order)
        return cls(coupling, order, most, multiple, scope, steps)

    def removed(self, step: int) -> Removed:
        """What goes at a step of the ranking."""
        ranked: dict[str, list[int]] = {name: [] for name in self.most}
        for name, unit in self.order:
            ranked[name].append(unit)
        counts = dict.fromkeys(self.most, 0)
        if self.scope != "layer":
            for name, _ in self.order[:step]:
                counts[name] += 1
        else:
            counts = {name: -(-len(units) * step // self.steps) for name, units in ranked.items()}
        found: Removed = {}
        for name, count in counts.items():
            kept, multiple = len(ranked[name]) - count, self.multiple[name]
            kept = max(round(kept / multiple) * multiple, len(ranked[name]) - self.most[name])
            if kept < len(ranked[name]):
                found[name] = sorted(ranked[name][: len(ranked[name]) - kept])
        return self._with_one_of_each(found)

    def _with_one_of_each(self, removed: Removed) -> Removed:
        """The same, but a layer that would lose all of its channels keeps the one that matters most."""
        place = {unit: i for i, unit in enumerate(self.order)}
        while emptied := self.coupling.emptied(removed):
            name, unit = max(emptied[0], key=lambda u: place.get(u, -1))
            removed[name] = [u for u in removed[name] if u != unit]
        return {name: units for name, units in removed.items() if units}

    def refills(self, removed: Removed) -> list[tuple[str, list[int]]]:
        """For every group what goes when the most important multiple of its removed units stays, best first.

        What was rounded down to a multiple, or went with the last step, leaves room below a target.
        """
        place = {unit: i for i, unit in enumerate(self.order)}
        found: list[tuple[int, str, list[int]]] = []
        for name, units in removed.items():
            ranked = sorted(units, key=lambda u, name=name: place[name, u])  # type: ignore[misc]
            fewer = ranked[: max(0, len(ranked) - self.multiple[name])]
            found.append((-place[name, ranked[-1]], name, sorted(fewer)))
        return [(name, fewer) for _, name, fewer in sorted(found)]


def _by_sensitivity(
    unit: str, batches: int, network: fx.GraphModule, coupling: Coupling, context: Context, scores: Scores
) -> Scores:
    """For every unit the noise that it adds where its group goes in the order of `scores`, for what it saves."""
    ranked = {name: np.argsort(value, kind="stable") for name, value in scores.items()}
    kept = context.folder / sensitivity.FILE if context.folder else None
    order = {name: units.tolist() for name, units in ranked.items()}
    found = sensitivity.scan(network, coupling, order, context, batches, kept)
    prices = meter.group_prices(unit, network, coupling, context.task.call())
    marginal: Scores = {}
    for name, units in ranked.items():
        places = np.empty(len(units))
        # Of units that add the same the ranked order decides: by less than any figure that was measured.
        places[units] = found[name].marginal() * (1 + 1e-9 * np.arange(len(units)))
        marginal[name] = places / prices[name]
    return marginal


def _multiple(group: Group, round_to: int) -> int:
    """Units that together are a multiple of `round_to` channels; less where a group is small."""
    each = len(group.members[0].positions) // group.units
    multiple = round_to // math.gcd(each, round_to)
    while multiple > 1 and group.units < 4 * multiple:
        multiple //= 2
    return max(1, multiple)


__all__ = ["Ranking", "Removed"]
