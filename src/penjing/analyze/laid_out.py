"""Several axes flattened into one: (out, in, taps) as out·in·taps rows of a layer that generates kernels.

A position of such an axis is not a channel by itself. It is removed as soon as one of the positions that it stands for
is removed: that of its output, or that of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.analyze.atoms import Walk

DEPTH = 4  # levels of flattened axes within flattened axes


@dataclass(frozen=True, eq=False)
class LaidOut:
    """Which components stand for several others.

    Attributes:
        of: (n,) components that are removed as soon as any of their parts is.
        parts: (most, n) the components that they stand for, none of which is flattened itself; padded with −1.
    """

    of: np.ndarray
    parts: np.ndarray

    def spread(self, flags: np.ndarray) -> None:
        """Flag every component that stands for a flagged one, in place; `flags` has one entry per component."""
        flags[self.of] |= np.where(self.parts < 0, False, flags[self.parts]).any(0)

    def sides(self, components: np.ndarray) -> list[np.ndarray]:
        """For every row of `parts` the component that each of these stands for; −1 where there is none."""
        place = np.full(max(int(components.max(initial=-1)), int(self.of.max(initial=-1))) + 1, -1)
        place[self.of] = np.arange(len(self.of))
        places = np.where(components < 0, -1, place[components])
        return [np.where(places < 0, -1, row[places]) for row in self.parts]


def laid_out(walk: Walk) -> tuple[np.ndarray, LaidOut]:
    """Component of every atom, and which of the components stand for others.

    A component that stands for two sets of parts couples them side by side, or makes both not prunable where they
    differ in kind.
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
        parts_here, parts_before = sides[:, tied], sides[:, before[tied]]
        walk.join(parts_here[parts_here >= 0], parts_before[parts_before >= 0], "it is taken apart twice")
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
    """Replace parts that are flattened themselves by their own parts; None if deeper than `DEPTH`."""
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


def not_prunable_components(walk: Walk, unit: np.ndarray, layouts: LaidOut) -> dict[int, str]:
    """Components that are not prunable → the reason, propagated between flattened components and their parts."""
    reasons: dict[int, str] = {}
    for atoms, why in walk.holds:
        for component in np.unique(unit[atoms]).tolist():
            reasons.setdefault(component, why)
    stuck: np.ndarray = np.isin(layouts.of, list(reasons))
    for component, parts in zip(layouts.of[stuck].tolist(), layouts.parts.T[stuck].tolist(), strict=True):
        for part in parts:
            reasons.setdefault(part, reasons[component])
    stuck = np.logical_and.reduce(np.isin(layouts.parts, list(reasons)) | (layouts.parts < 0), axis=0)
    for component, parts in zip(layouts.of[stuck].tolist(), layouts.parts.T[stuck].tolist(), strict=True):
        reasons.setdefault(component, reasons[parts[0]])
    return reasons
