"""Integrity of a run folder: SHA-256 of every file but the record, which holds the hashes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penjing import measure
from penjing.records import Record
from penjing.records.folder import RECORD, SEARCH, STATE, STUDY
from penjing.records.lock import LOCK

MOST = 100_000  # files that are looked at; a run leaves some dozens


@dataclass(frozen=True)
class Differences:
    """Names relative to the run folder, with forward slashes.

    Attributes:
        missing: Files of the record that are not there, or are something else than a file.
        changed: Files with other bytes.
        strange: Files that the record does not know.
    """

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    strange: tuple[str, ...]

    def __str__(self) -> str:
        groups = (("missing", self.missing), ("changed", self.changed))
        return "; ".join(f"{word}: {listed(names)}" for word, names in groups if names)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a run leaves, by its name relative to the folder."""
    return {name: measure.sha256(folder / name) for name in sorted(_files(folder))}


def differences(folder: Path, record: Record) -> Differences:
    """What is not as the record says. No file outside the folder is read, whatever the record names."""
    there = set(itertools.islice(_files(folder), MOST))
    missing = tuple(sorted(record.files.keys() - there))
    changed = (n for n in sorted(record.files.keys() & there) if measure.sha256(folder / n) != record.files[n])
    return Differences(missing, tuple(changed), tuple(sorted(there - record.files.keys())))


def listed(names: tuple[str, ...]) -> str:
    """The first few names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _files(folder: Path) -> Iterator[str]:
    """Regular files below a folder, but the record and what is only there while a run goes on; links are none."""
    for place, folders, files in os.walk(folder, followlinks=False):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if name != STATE]
            files = [name for name in files if name not in (RECORD, LOCK)]
        elif here == folder / SEARCH:  # a dashboard that looks at a study writes into it
            files = [name for name in files if not name.startswith(STUDY)]
        for name in files:
            if (here / name).is_file() and not (here / name).is_symlink():
                yield (here / name).relative_to(folder).as_posix()
