"""Integer artifacts of which no operator runs in integers: offered where they are smaller, and said to be no faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penjing.pipeline.building import INTEGER
from penjing.records import STORED, Candidate, Rejection


def weighed(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, of which integer ones without an integer operator got a warning, or are rejected.

    Such an artifact is rejected if its files are not smaller than the smallest in floating point of the same runtime;
    where the run has none of those, if it stores no weights as integers either.
    """
    return tuple(_weighed(c, candidates) if c.rejection is None and c.only_stored else c for c in candidates)


def _weighed(candidate: Candidate, others: Sequence[Candidate]) -> Candidate:
    size = candidate.measured.size_bytes
    floats = [c for c in others if c.runtime == candidate.runtime and c.precision not in INTEGER]
    least = min(floats, key=lambda c: c.measured.size_bytes or 0, default=None)
    if least is None or not size or not least.measured.size_bytes:
        smaller, why = any(row.stored for row in candidate.layers), "no weights are stored as integers"
    else:
        smaller = size < least.measured.size_bytes
        sizes = f"({size} bytes, {least.measured.size_bytes} bytes)"
        why = f"the file is not smaller than that of {least.name} {sizes}"
    if smaller:
        return replace(candidate, doubts=(f"{candidate.name}: {STORED}", *candidate.doubts))
    return replace(candidate, rejection=Rejection(reason=f"no operator runs in integers, and {why}"), doubts=())
