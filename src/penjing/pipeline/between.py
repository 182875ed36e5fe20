"""Artifacts with integers of different runtimes, compared with each other on the samples that parity uses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from penjing import measure
from penjing.measure import between, limits
from penjing.measure.between import Side
from penjing.pipeline import evidence
from penjing.pipeline.run import Run
from penjing.records import Candidate, PairParity
from penjing.records.manifest import read_manifest


def pairs(run: Run, candidates: Sequence[Candidate]) -> tuple[PairParity, ...]:
    """Every pair of runtimes whose INT8 artifacts are offered; a warning where one is beyond what was stated."""
    offered = [c for c in candidates if c.precision == evidence.COMPARED and c.rejection is None]
    if len(offered) < 2:
        return ()
    limit = limits.SELECTED_DB if evidence.selects_boxes(run.network) else limits.of(evidence.COMPARED).snr_db
    stored = {c.name: evidence.integer_answers(run.folder, c.runtime) for c in offered}
    sides = {name: Side(*both, limit) for name, both in stored.items() if both is not None}
    source = evidence.originals(run.folder)
    parts = measure.split(source)
    manifest = read_manifest(run.folder.path / offered[0].folder)
    names = [port.name for port in manifest.programs[0].outputs]
    equal = limits.of(evidence.COMPARED).equal
    compared = []
    for (first, one), (second, other) in itertools.combinations(sides.items(), 2):
        agreement = measure.parity([one.answers], [other.answers], second).agreement
        rows = between.rows(source, one, other, parts, names, equal)
        compared.append(PairParity(first=first, second=second, agreement=agreement, rows=rows))
    for pair in compared:
        if pair.worst is not None and not pair.holds:
            run.warn(
                f"{pair.first} and {pair.second} are further apart than their plans and parity's limit explain: "
                f"{pair.worst.place}: {limits.failure(pair.worst)}"
            )
    return tuple(compared)
