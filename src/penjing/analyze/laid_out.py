"""Several axes laid out along one: (out, in, places) as out·in·places rows of a layer that makes kernels.

A position of such an axis is no channel by itself. It goes as soon as one of the positions that it stands for goes:
that of its output, or that of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.analyze.atoms import Walk

DEPTH = 4  # times that what is laid out may be laid out again


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
        mine = np.where(components < 0, -1, place[components])
        return [np.where(mine < 0, -1, row[mine]) for row in self.parts]


def laid_out(walk: Walk) -> tuple[np.ndarray, LaidOut]:
    """Component of every atom, and which of the components stand for others.

    What stands for two sets of parts ties them to each other, side by side, or holds both where they differ in kind.
    """
    nothing = LaidOut(np.empty(0, int), np.empty((0, 0), int))
    if not walk.layouts:
        return walk.components(), nothing
    atoms = np.concatenate([axis for axis, _ in walk.layouts])
    sides = _padded([parts for _, parts in walk.layouts])
    while True:
        unit = walk.components()
        components, parts = unit[atoms], np.where(sides < 0, -1, unit[sides])
        _, first, number = np.unique(components, return_index=True, return_inverse=True)
        before = first[number]  # where the same component stands for parts first
        unlike = ((sides < 0) != (sides[:, before] < 0)).any(0) | (parts == components).any(0)
        unlike |= np.isin(components, components[unlike])
        tied = ~unlike & (parts != parts[:, before]).any(0)
        if not tied.any():
            break
        mine, other = sides[:, tied], sides[:, before[tied]]
        walk.join(mine[mine >= 0], other[other >= 0], "it is taken apart twice")
    if unlike.any():
        walk.hold(sides[:, unlike][sides[:, unlike] >= 0], "it is taken apart in two ways")
        walk.hold(atoms[unlike], "it is taken apart in two ways")
    one_of_each = np.zeros(len(atoms), bool)
    one_of_each[first] = True
    bottom = _bottom(LaidOut(components[one_of_each & ~unlike], parts[:, one_of_each & ~unlike]))
    if bottom is None:
        walk.hold(np.concatenate([atoms, sides[sides >= 0]]), "what it is made of is taken apart too often")
    return unit, bottom or nothing


def _padded(tables: list[np.ndarray]) -> np.ndarray:
    """Tables of parts beside each other, −1 below the shorter ones."""
    most = max(map(len, tables))
    return np.concatenate([np.pad(t, ((0, most - len(t)), (0, 0)), constant_values=-1) for t in tables], 1)


def _bottom(layouts: LaidOut) -> LaidOut | None:
    """Parts that are laid out themselves give way to theirs; None where that has no end."""
    parts = layouts.parts
    for _ in range(DEPTH):
        sides = [inner for row in parts for inner in (row, *layouts.sides(row))]
        inner = np.stack(sides) if sides else parts
        deeper = np.isin(parts, layouts.of)
        if not deeper.any():
            return LaidOut(layouts.of, parts)
        step = 1 + len(layouts.parts)
        inner[::step][deeper] = -1
        inner = -np.sort(-inner, axis=0)  # what is there first
        parts = inner[: int((inner >= 0).sum(0).max())]
    return None


def held_components(walk: Walk, unit: np.ndarray, layouts: LaidOut) -> dict[int, str]:
    """Components that never go, and why: with what stands for others these, and it with the last of them."""
    held: dict[int, str] = {}
    for atoms, why in walk.holds:
        for component in np.unique(unit[atoms]).tolist():
            held.setdefault(component, why)
    stuck: np.ndarray = np.isin(layouts.of, list(held))
    for component, parts in zip(layouts.of[stuck].tolist(), layouts.parts.T[stuck].tolist(), strict=True):
        for part in parts:
            held.setdefault(part, held[component])
    stuck = np.logical_and.reduce(np.isin(layouts.parts, list(held)) | (layouts.parts < 0), axis=0)
    for component, parts in zip(layouts.of[stuck].tolist(), layouts.parts.T[stuck].tolist(), strict=True):
        held.setdefault(component, held[parts[0]])
    return held
