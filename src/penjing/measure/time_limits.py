"""How long a runtime may take: a base, and a multiple of what the source network took in torch for the same work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penjing.records.manifest import MANIFEST, read_manifest

BASE_S = 60.0  # that every request may take: a machine may be busy
FACTOR = 100  # times what the source took in torch for the same work
UNKNOWN_S = 600.0  # for a call whose source has not been timed
BYTES_PER_S = 1 << 20  # of files that a runtime opens, converts and compiles; the slowest took a tenth of that time

_source: tuple[float, int] | None = None  # seconds of a call of the source in torch, and how many values it had


def expect(seconds: float, values: int) -> None:
    """Set the seconds and input values of one call of the source in torch, from which limits are derived."""
    global _source
    _source = (seconds, max(1, values))


def expect_nothing() -> None:
    """Forget the source's timing."""
    global _source
    _source = None


def call_s(inputs: Sequence[np.ndarray]) -> float:
    """Seconds that one call may take."""
    if _source is None:
        return BASE_S + UNKNOWN_S
    seconds, values = _source
    return BASE_S + FACTOR * seconds * max(1.0, sum(x.size for x in inputs) / values)


def opening_s(*paths: Path) -> float:
    """Seconds that opening, converting or compiling files, or all files of an artifact's folder, may take."""
    compiling = sum(read_manifest(path).opening_s for path in paths if (path / MANIFEST).is_file())
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    own = 0.0 if _source is None else FACTOR * _source[0]
    return BASE_S + own + compiling + sum(file.stat().st_size for file in files) / BYTES_PER_S
