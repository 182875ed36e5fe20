"""Which tensor of a network's new version was which of its old one: by name, by content, by likeness."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from penjing.storage.number_types import numbers
from penjing.storage.regions import Bytes, Region

_SAMPLE = 1024  # bytes by which likeness is judged


class Place(NamedTuple):
    """A tensor of a file, by its number."""

    file: int
    region: Region


Listed = Sequence[tuple[Bytes, Sequence[Region]]]
"""Of every file, its bytes and its tensors."""


def pairs(old: Listed, new: Listed, base_of: Sequence[int]) -> dict[Place, Place]:
    """Tensor of the new version → tensor of the old one, of the same number type and the same number of values.

    Args:
        old: Files of the old version.
        new: Files of the new version.
        base_of: Of every new file, the number of the old one that it replaces; -1: none.
    """
    after = [Place(i, region) for i, (_, regions) in enumerate(new) for region in regions]
    before = [Place(i, region) for i, (_, regions) in enumerate(old) for region in regions]
    matched: dict[Place, Place] = {}
    for key in (
        lambda p, is_new: (base_of[p.file] if is_new else p.file, p.region.name, p.region.dtype, p.region.shape),
        lambda p, is_new: (p.region.name, p.region.dtype, p.region.shape),
        lambda p, is_new: (p.region.dtype, p.region.count, _digest((new if is_new else old)[p.file][0], p.region)),
    ):
        free: dict[object, list[Place]] = defaultdict(list)
        taken = set(matched.values())
        for p in before:
            if p not in taken:
                free[key(p, False)].append(p)
        for p in after:
            if p not in matched and (some := free.get(key(p, True))):
                matched[p] = some.pop(0)
    return matched | dict(_alike(old, new, after, before, matched))


def _alike(
    old: Listed, new: Listed, after: list[Place], before: list[Place], matched: dict[Place, Place]
) -> Iterator[tuple[Place, Place]]:
    """Of the tensors that remain, pairs of one type and shape, those first that differ least."""
    groups: dict[object, tuple[list[Place], list[Place]]] = defaultdict(lambda: ([], []))
    taken = set(matched.values())
    for p in after:
        if p not in matched:
            groups[p.region.dtype, p.region.shape][0].append(p)
    for p in before:
        if p not in taken:
            groups[p.region.dtype, p.region.shape][1].append(p)
    for some, others in groups.values():
        rows = [(p, _sample(new[p.file][0], p.region)) for p in some]
        columns = [(p, _sample(old[p.file][0], p.region)) for p in others]
        if not rows or not columns:
            continue
        apart = np.stack([[np.abs(a - b).mean() for _, b in columns] for _, a in rows])
        for _ in range(min(apart.shape)):
            i, j = np.unravel_index(int(apart.argmin()), apart.shape)
            yield rows[i][0], columns[j][0]
            apart[i], apart[:, j] = np.inf, np.inf


def _digest(content: Bytes, region: Region) -> bytes:
    return hashlib.sha256(content[region.offset : region.offset + region.size].data).digest()


def _sample(content: Bytes, region: Region) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    start = region.offset + (region.size - _SAMPLE) // 8 * 4 if region.size > _SAMPLE else region.offset
    part = np.ascontiguousarray(content[start : min(start + _SAMPLE, region.offset + region.size)])
    return numbers(part, region.dtype).astype(np.float64)


__all__ = ["Place", "pairs"]
