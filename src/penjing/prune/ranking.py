"""The order in which units are removed: importance scores, compared within the scope, in multiples for the runtime."""

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

FRACTIONS = 1000  # with scope "layer", fractions of every group are tried in steps of a thousandth


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order in which they are removed.

    Attributes:
        coupling: The groups of coupled channels.
        order: (group, unit), the least important first.
        most: Group → how many of its units may be removed.
        multiple: Group → the units that remain are a multiple of this.
        scope: As in `Channels`.
        steps: The largest step of `removed`: 0 removes nothing, this one everything that may be removed.
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
        """Score all units; the settings are those of `Channels`, `unit` is the name of its target.

        Raises:
            PruningError: The network has no group that can be pruned.
        """
        groups = {n: g for n, g in coupling.groups.items() if g.units > 1 and (approximate or not g.statistics)}
        if not groups:
            raise PruningError(
                "the network has no channels that can be removed",
                code="nothing-to-prune",
                got="; ".join(f"{k}: {v}" for k, v in list(coupling.not_prunable.items())[:3])
                or "no layer with channels",
                remedy="approximate=True also prunes channels that norms compute statistics over"
                if coupling.groups
                else "`penjing inspect` shows the reason for every layer",
            )
        criterion = criteria.for_context(criterion, context)
        scores = criteria.score_units(criterion, network, coupling, context, batches)
        scores = {name: scores[name] for name in groups}
        if scope == "sensitivity":
            scores = _by_sensitivity(unit, batches, network, coupling, context, scores)
        elif criteria.CRITERIA[criterion].estimates_loss:  # comparable as they are: rank by loss per saved cost
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
        steps = FRACTIONS if scope == "layer" else len(order)
        return cls(coupling, order, most, multiple, scope, steps)

    def removed(self, step: int) -> Removed:
        """Group → the units that are removed at a step of the ranking."""
        ranked: dict[str, list[int]] = {name: [] for name in self.most}
        for name, unit in self.order:
            ranked[name].append(unit)
        counts = dict.fromkeys(self.most, 0)
        if self.scope != "layer":
            for name, _ in self.order[:step]:
                counts[name] += 1
        else:
            counts = {name: -(-len(units) * step // self.steps) for name, units in ranked.items()}
        removed: Removed = {}
        for name, count in counts.items():
            left, multiple = len(ranked[name]) - count, self.multiple[name]
            left = max(round(left / multiple) * multiple, len(ranked[name]) - self.most[name])
            if left < len(ranked[name]):
                removed[name] = sorted(ranked[name][: len(ranked[name]) - left])
        return self._with_one_of_each(removed)

    def _with_one_of_each(self, removed: Removed) -> Removed:
        """The same, but a layer that would lose all of its channels keeps the most important one."""
        place = {unit: i for i, unit in enumerate(self.order)}
        while emptied := self.coupling.emptied(removed):
            name, unit = max(emptied[0], key=lambda u: place.get(u, -1))
            removed[name] = [u for u in removed[name] if u != unit]
        return {name: units for name, units in removed.items() if units}

    def refills(self, removed: Removed) -> list[tuple[str, list[int]]]:
        """For every group the units that are removed if the most important multiple of them stays, best group first.

        Rounding to multiples, and the last step, may have removed more than the target asks for.
        """
        place = {unit: i for i, unit in enumerate(self.order)}
        refills: list[tuple[int, str, list[int]]] = []
        for name, units in removed.items():
            ranked = sorted(units, key=lambda u, name=name: place[name, u])  # type: ignore[misc]
            fewer = ranked[: max(0, len(ranked) - self.multiple[name])]
            refills.append((-place[name, ranked[-1]], name, sorted(fewer)))
        return [(name, fewer) for _, name, fewer in sorted(refills)]


def _by_sensitivity(
    unit: str, batches: int, network: fx.GraphModule, coupling: Coupling, context: Context, scores: Scores
) -> Scores:
    """For every unit the output noise that its removal adds, per cost saved; a group goes in the order of `scores`."""
    ranked = {name: np.argsort(value, kind="stable") for name, value in scores.items()}
    file = context.folder / sensitivity.FILE if context.folder else None
    order = {name: units.tolist() for name, units in ranked.items()}
    curves = sensitivity.scan(network, coupling, order, context, batches, file)
    prices = meter.group_prices(unit, network, coupling, context.task.call())
    marginal: Scores = {}
    for name, units in ranked.items():
        places = np.empty(len(units))
        # Ties are broken in the ranked order, by less than the measurement resolves.
        places[units] = curves[name].marginal() * (1 + 1e-9 * np.arange(len(units)))
        marginal[name] = places / prices[name]
    return marginal


def _multiple(group: Group, round_to: int) -> int:
    """The number of units that make a multiple of `round_to` channels; fewer where a group is small."""
    each = len(group.members[0].positions) // group.units
    multiple = round_to // math.gcd(each, round_to)
    while multiple > 1 and group.units < 4 * multiple:
        multiple //= 2
    return max(1, multiple)


__all__ = ["Ranking", "Removed"]
