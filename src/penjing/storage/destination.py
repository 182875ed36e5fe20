"""Where packed files, updates and versions go: what is checked before they are written, and how they take a place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from penjing.errors import OutputError
from penjing.records.files import umask
from penjing.records.folder import check_writable, writing

SPACE = "free some space, or choose another place"


def check_free(out: Path, force: bool) -> None:
    """Raise OutputError where a file can't be written, or something lies there that `force` does not allow to go."""
    if not out.is_dir():
        check_writable(out)
    if out.exists() and not force:
        what = "the folder exists already" if out.is_dir() else "the file exists already"
        raise OutputError(what, code="exists", got=str(out), expected="a new name", remedy="--force replaces it")


def check_no_stranger(out: Path, known: Collection[Path]) -> None:
    """Raise OutputError where a folder that would be replaced has other files than these: they would be lost.

    A run folder is one: a version is its artifact alone.
    """
    paths = {path.resolve() for path in known}
    strangers = [path for path in out.rglob("*") if not path.is_dir() and path.resolve() not in paths]
    if out.is_dir() and strangers:
        raise OutputError(
            "the folder holds more than a version of the network",
            code="foreign",
            got=f"{out} with {', '.join(path.relative_to(out).as_posix() for path in sorted(strangers)[:4])}",
            expected="the folder of the old version, or a new name",
            remedy="choose a new name",
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError where so many bytes do not fit on the disk."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            "the files do not fit on the disk",
            code="unwritable",
            got=f"{free:,} bytes free",
            expected=f"{needed:,}",
            remedy=SPACE,
        )


@contextlib.contextmanager
def beside(out: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `out` at the end, and is removed where that is not reached.

    Raises:
        OutputError: It can't be written.
    """
    with writing(out.parent, what="the folder of the file", remedy=SPACE):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(handle, "wb+") as file:
                yield file
            os.chmod(aside, 0o666 & ~umask())
            os.replace(aside, out)
        finally:
            Path(aside).unlink(missing_ok=True)


def replaced(out: Path, result: Path, aside: Path) -> None:
    """Move a file or a folder to the place of `out`, which may exist; `aside` is a folder on the same disk."""
    if out.is_dir() or (result.is_dir() and out.exists()):
        # One folder can't take another's place at once: the old one waits beside it.
        waiting = aside / "old"
        os.replace(out, waiting)
        try:
            os.replace(result, out)
        except OSError:
            os.replace(waiting, out)
            raise
    else:
        os.replace(result, out)


__all__ = ["SPACE", "beside", "check_free", "check_no_stranger", "check_space", "replaced"]
