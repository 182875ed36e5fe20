"""The ranks of all layers together: what is saved in every layer costs the same error, as far as ranks allow.

The sum of errors under a limit on the sum of costs is smallest where no layer could save the same for less (Everett,
"Generalized Lagrange Multiplier Method", Operations Research 11, 1963): each layer walks down the lower convex hull of
its own errors over its costs, and the step with the least error per saved cost comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from penjing.decompose.candidates import Candidate

Chosen = dict[str, Candidate]  # layer → what replaces it; layers that stay are left out


@dataclass(frozen=True)
class Walk:
    """All steps of all layers, the cheapest error first.

    Attributes:
        steps: (layer, what replaces it from then on).
    """

    steps: Sequence[tuple[str, Candidate]]

    @classmethod
    def of(
        cls,
        options: Mapping[str, Sequence[Candidate]],
        whole: Mapping[str, float],
        price: Callable[[str, Candidate], float],
        error: Callable[[str, Candidate], float],
    ) -> Walk:
        """Put the steps of all layers in order.

        Args:
            options: Layer → its candidates.
            whole: Layer → its cost as it is.
            price: The cost of a candidate for a layer.
            error: The error of a candidate in a layer.
        """
        steps: list[tuple[float, str, Candidate]] = []
        for name, candidates in options.items():
            points = [(whole[name], 0.0, None), *((price(name, c), error(name, c), c) for c in candidates)]
            slope = 0.0
            for (cost, noise, _), (less, more, candidate) in _pairs(hull(points)):
                assert candidate is not None
                slope = max(slope, (more - noise) / (cost - less))  # never before the step that leads to it
                steps.append((slope, name, candidate))
        steps.sort(key=lambda step: step[0])  # stable: the steps of a layer stay in order
        return cls([(name, candidate) for _, name, candidate in steps])

    def at(self, count: int) -> Chosen:
        """What the layers are replaced by after so many steps."""
        return dict(self.steps[:count])


Point = tuple[float, float, "Candidate | None"]  # cost, error, and what has them


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull from the largest cost down, of points that cost less and err more than the first.

    >>> [cost for cost, error, _ in hull([(9, 0, None), (6, 1, None), (5, 3, None), (3, 4, None)])]
    [9, 6, 3]
    """
    first, lower = points[0], sorted(points[1:], key=lambda p: (-p[0], p[1]))
    corners = [first]
    for point in lower:
        if point[0] >= corners[-1][0]:
            continue
        while len(corners) > 1 and _slope(corners[-2], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (left[0] - right[0])


def _pairs(corners: Sequence[Point]) -> list[tuple[Point, Point]]:
    return list(zip(corners, corners[1:], strict=False))


def refilled(
    chosen: Chosen,
    options: Mapping[str, Sequence[Candidate]],
    room: float,
    price: Callable[[str, Candidate], float],
    error: Callable[[str, Candidate], float],
) -> Chosen:
    """The same with the room that the last step left given to where it lowers the error most.

    Args:
        chosen: What replaces the layers.
        options: Layer → its candidates.
        room: By how much the cost may rise.
        price: The cost of a candidate for a layer.
        error: The error of a candidate in a layer.
    """
    chosen = dict(chosen)
    while True:
        better = [
            (error(name, now) - error(name, other), name, other)
            for name, now in chosen.items()
            for other in options[name]
            if 0 < price(name, other) - price(name, now) <= room and error(name, other) < error(name, now)
        ]
        if not better:
            return chosen
        _, name, other = max(better, key=lambda b: b[0])
        room -= price(name, other) - price(name, chosen[name])
        chosen[name] = other


__all__ = ["Chosen", "Walk", "hull", "refilled"]
