"""Time limits of runtimes: a constant plus a multiple of the source network's time in torch for the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penjing.records.manifest import MANIFEST, read_manifest

BASE_S = 60.0  # for every request, as a machine may be busy
FACTOR = 100  # times the source's time in torch for the same inputs
UNKNOWN_S = 600.0  # for a call whose source has not been timed
BYTES_PER_S = 1 << 20  # of files that a runtime opens, converts or compiles: a tenth of the slowest speed measured

_source: tuple[float, int] | None = None  # seconds of a call of the source in torch, and its number of input values


def expect(seconds: float, values: int) -> None:
    """Set the seconds and input values of one call of the source in torch, from which limits are derived."""
    global _source
    _source = (seconds, max(1, values))


def expect_nothing() -> None:
    """Forget the source's timing."""
    global _source
    _source = None


def call_s(inputs: Sequence[np.ndarray]) -> float:
    """Time limit of one call, in seconds."""
    if _source is None:
        return BASE_S + UNKNOWN_S
    seconds, values = _source
    return BASE_S + FACTOR * seconds * max(1.0, sum(x.size for x in inputs) / values)


def opening_s(*paths: Path) -> float:
    """Time limit in seconds of opening, converting or compiling files, or all files of an artifact's folder."""
    compiling = sum(read_manifest(path).opening_s for path in paths if (path / MANIFEST).is_file())
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    own = 0.0 if _source is None else FACTOR * _source[0]
    return BASE_S + own + compiling + sum(file.stat().st_size for file in files) / BYTES_PER_S
