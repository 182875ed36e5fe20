"""Several axes laid out along one: (out, in, places) as out·in·places rows of a layer that makes kernels.

A position of such an axis is no channel by itself. It goes as soon as one of the positions that it stands for goes:
that of its output, or that of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.analyze.atoms import Walk


@dataclass(frozen=True, eq=False)
class LaidOut:
    """Which components stand for several others.

    Attributes:
        of: (n,) components that go as soon as any of their parts goes.
        parts: (most, n) components that they stand for, none of which is laid out itself; −1 behind the last.
    """

    of: np.ndarray
    parts: np.ndarray

    def spread(self, flags: np.ndarray) -> None:
        """Set the flag (one for every component) of all that stand for a flagged one, in place."""
        flags[self.of] |= np.where(self.parts < 0, False, flags[self.parts]).any(0)

    def sides(self, components: np.ndarray) -> list[np.ndarray]:
        """For every place among the parts what these components stand for there; −1 where it is nothing."""
        place = np.full(max(int(components.max(initial=-1)), int(self.of.max(initial=-1))) + 1, -1)
        place[self.of] = np.arange(len(self.of))
        mine = place[components]
        return [np.where(mine < 0, -1, row[mine]) for row in self.parts]


def laid_out(walk: Walk) -> tuple[np.ndarray, LaidOut]:
    """Component of every atom, and which of the components stand for others.

    What stands for two sets of parts ties them to each other, side by side, or holds both where they differ in kind.
    """
    while True:
        unit = walk.components()
        if not walk.layouts:
            return unit, LaidOut(np.empty(0, int), np.empty((0, 0), int))
        parts: dict[int, np.ndarray] = {}
        ties: list[tuple[np.ndarray, np.ndarray]] = []
        unlike: list[np.ndarray] = []
        for atoms, sides in walk.layouts:
            for component, mine in zip(unit[atoms].tolist(), sides.T, strict=True):
                before = parts.setdefault(component, mine)
                if len(before) != len(mine) or component in unit[mine]:
                    unlike += [before, mine]
                elif not np.array_equal(unit[before], unit[mine]):
                    ties.append((before, mine))
        if unlike:
            walk.hold(np.concatenate(unlike), "it is taken apart in two ways")
        if not ties:
            return unit, _flat({c: unit[mine] for c, mine in parts.items() if c not in unit[mine]})
        before, after = (np.concatenate(side) for side in zip(*ties, strict=True))
        walk.join(before, after, "it is taken apart twice")


def _flat(parts: dict[int, np.ndarray]) -> LaidOut:
    """Parts that are laid out themselves give way to theirs."""

    def bottom(component: int, above: frozenset[int]) -> list[int]:
        if component not in parts or component in above:
            return [component]
        return [c for part in parts[component].tolist() for c in bottom(part, above | {component})]

    rows = {component: bottom(component, frozenset()) for component in parts}
    table = np.full((max(map(len, rows.values()), default=0), len(rows)), -1)
    for i, row in enumerate(rows.values()):
        table[: len(row), i] = row
    return LaidOut(np.array(list(rows), int), table)


def held_components(walk: Walk, unit: np.ndarray, layouts: LaidOut) -> dict[int, str]:
    """Components that never go, and why: with what stands for others these, and it with the last of them."""
    held: dict[int, str] = {}
    for atoms, why in walk.holds:
        for component in np.unique(unit[atoms]).tolist():
            held.setdefault(component, why)
    stands_for = [
        (c, parts[parts >= 0].tolist()) for c, parts in zip(layouts.of.tolist(), layouts.parts.T, strict=True)
    ]
    for component, parts in stands_for:
        for part in parts if component in held else ():
            held.setdefault(part, held[component])
    for component, parts in stands_for:
        if all(part in held for part in parts):
            held.setdefault(component, held[parts[0]])
    return held
