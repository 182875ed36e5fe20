"""Finished runs by their folders, with names that tell them apart. Opens without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penjing.errors import RecordError, UsageError
from penjing.records.folder import EVENTS, RECORD, STATE
from penjing.records.json_form import read
from penjing.records.record import Record

MOST_RUNS = 100


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run among several.

    Attributes:
        name: The end of its path that no other of them has.
        folder: The run folder, as it was named.
        record: What `record.json` there holds.
    """

    name: str
    folder: str
    record: Record


def read_runs(folders: Sequence[Path | str]) -> tuple[RunRow, ...]:
    """Read the records of several runs, in this order.

    Args:
        folders: Run folders, or `record.json` files; at least two.

    Raises:
        UsageError: There are fewer than two, too many, or the same one twice.
        RecordError: One is no run, has not finished, is damaged, or was written by a newer Penjing; says which.
    """
    paths = [Path(folder) for folder in folders]
    paths = [path.parent if path.name == RECORD and path.is_file() else path for path in paths]
    if not 2 <= len(paths) <= MOST_RUNS:
        raise UsageError(
            "several runs are needed to compare them",
            code="number",
            got=f"{len(paths)}: {', '.join(map(str, paths[:3]))}" if paths else "none",
            expected=f"2 to {MOST_RUNS} run folders",
            remedy="`penjing measure RUN` shows one beside its source",
        )
    where = [path.resolve() for path in paths]
    twice = [path for path, count in Counter(where).items() if count > 1]
    if twice:
        raise UsageError(
            "the same run was named twice", code="twice", got=str(twice[0]), expected="folders of different runs"
        )
    names = _names(where)
    rows = zip(names, paths, strict=True)
    return tuple(RunRow(name=name, folder=str(path), record=_read(path)) for name, path in rows)


def _read(path: Path) -> Record:
    begun = [name for name in (STATE, EVENTS) if (path / name).exists()]
    if begun and not (path / RECORD).exists():
        raise RecordError(
            "a run has not finished, so that it has no record",
            code="unfinished",
            got=f"{path} with {' and '.join(begun)}",
            expected=f"a run folder with {RECORD}",
            remedy="wait until it ends, or continue it with `penjing compress --resume`",
        )
    try:
        return read(path)
    except RecordError as error:
        if str(path) in str(error.got):
            raise
        # Among several runs it has to be said which one is meant.
        raise RecordError(
            error.what,
            code=error.code,
            field=error.field,
            got=f"{path}: {error.got}",
            expected=error.expected,
            remedy=error.remedy,
        ) from None


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, of whole parts, that are all different.

    >>> _names([Path("/runs/a/first"), Path("/runs/b/first")])
    ['a/first', 'b/first']
    """
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
