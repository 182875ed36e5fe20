"""Choose a format for every operator: the costs of the formats, and the exact optimum under a constraint.

An integer linear program with a cost on every edge between different formats, solved by HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

FLOAT = 0  # "bits" of an operator in floating point


@dataclass(frozen=True)
class Costs:
    """The input of the solver.

    Attributes:
        noise: Site → bits → noise power over signal power at the outputs, if this operator alone is quantized.
        ms: Site → bits → time.
        edges: (producer, consumer) → time of a conversion, paid if exactly one of them is an integer operator.
        weights: Site → number of weights.
        rest_ms: Time of everything whose format is not chosen.
    """

    noise: Mapping[str, Mapping[int, float]]
    ms: Mapping[str, Mapping[int, float]]
    edges: Mapping[tuple[str, str], float] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    rest_ms: float = 0.0

    def crossings(self, chosen: Mapping[str, int]) -> list[tuple[str, str]]:
        """Return the edges that need a conversion."""
        return [(a, b) for a, b in self.edges if (chosen[a] == FLOAT) != (chosen[b] == FLOAT)]

    def time(self, chosen: Mapping[str, int]) -> float:
        """Return the milliseconds of a choice."""
        own = sum(self.ms.get(name, {}).get(bits, 0.0) for name, bits in chosen.items())
        return self.rest_ms + own + sum(self.edges[e] for e in self.crossings(chosen))

    def corrected(self, chosen: Mapping[str, int], measured: float) -> Costs:
        """Return the costs with conversions made more expensive by the excess of the measured time of this choice."""
        crossing = sum(self.edges[e] for e in self.crossings(chosen))
        extra = measured - self.time(chosen)
        if extra <= 0 or not crossing:
            return self
        return replace(self, edges={e: ms * (1 + extra / crossing) for e, ms in self.edges.items()})


@dataclass
class _Constraints:
    """Linear constraints lows ≤ A·x ≤ highs, with the non-zero entries of A as (rows, columns, values)."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)

    def add(self, entries: list[tuple[int, float]], low: float, high: float) -> None:
        """Add a row low ≤ Σ value·x[column] ≤ high; `entries` are pairs of column and value."""
        for column, value in entries:
            self.rows.append(len(self.lows))
            self.columns.append(column)
            self.values.append(value)
        self.lows.append(low)
        self.highs.append(high)


def solve(costs: Costs, budget: float, objective: str, widest: int) -> dict[str, int] | None:
    """Compute the optimal choice.

    Args:
        costs: Noise and time of every choice.
        budget: Milliseconds for "noise", mean bits for "bits", noise power over signal power for "latency".
        objective: "noise": least noise within a latency; "bits": least noise within a mean bit width; "latency":
            fastest within a noise.
        widest: Bit width assigned to operators without weights, and preferred in ties.

    Returns:
        Site → bits, 0 for floating point; None if the constraint can't be satisfied.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, for this alone
    from scipy.sparse import csr_matrix

    names = list(costs.noise)
    columns = [(name, bits) for name in names for bits in costs.noise[name]]
    at = {column: i for i, column in enumerate(columns)}
    edges = [e for e in costs.edges if e[0] in costs.noise and e[1] in costs.noise and costs.edges[e] > 0]
    size = len(columns) + len(edges)
    power = np.array([costs.noise[n][b] for n, b in columns] + [0.0] * len(edges))
    time = np.array([costs.ms.get(n, {}).get(b, 0.0) for n, b in columns] + [costs.edges[e] for e in edges])
    count = sum(costs.weights.get(n, 0) for n in names) or 1
    bits = np.array([costs.weights.get(n, 0) * (b or 32) / count for n, b in columns] + [0.0] * len(edges))
    constraints = _Constraints()
    for name in names:
        constraints.add([(at[name, b], 1.0) for b in costs.noise[name]], 1, 1)
    for i, (a, b) in enumerate(edges):  # y ≥ |float(a) − float(b)|
        one, two = at.get((a, FLOAT)), at.get((b, FLOAT))
        for sign in (1.0, -1.0):
            entries = [(len(columns) + i, 1.0)]
            entries += [(one, -sign)] if one is not None else []
            entries += [(two, sign)] if two is not None else []
            constraints.add(entries, 0, np.inf)
    limited = {"noise": time, "bits": bits, "latency": power}[objective]
    room = budget - (costs.rest_ms if objective == "noise" else 0.0)
    if room < math.inf:
        scale = max(abs(room), 1e-30)  # noise powers are far below the solver's tolerances, so they are rescaled
        constraints.add([(i, float(v) / scale) for i, v in enumerate(limited) if v], -np.inf, room / scale)
    aim = time if objective == "latency" else power
    aim = aim / max(aim.max(), 1e-30)
    c = constraints
    matrix = csr_matrix((c.values, (c.rows, c.columns)), shape=(len(c.lows), size))
    solution = milp(
        aim, constraints=LinearConstraint(matrix, c.lows, c.highs), integrality=np.ones(size), bounds=Bounds(0, 1)
    )
    if solution.x is None:
        return None
    return {name: b for (name, b), x in zip(columns, solution.x, strict=False) if x > 0.5}


__all__ = ["FLOAT", "Costs", "solve"]
