"""Text files that are there whole or not at all, and the user's own cache. This module never imports torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from penjing.errors import OutputError


def umask() -> int:
    """The permissions that a new file does not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache(name: str) -> Path:
    """The folder ``$PENJING_CACHE/NAME`` or ``~/.cache/penjing/NAME``, made if it is not there.

    What lies in it is loaded as machine code, so another user must not be able to put anything there.

    Raises:
        OutputError: It can't be made, it is another user's, or others may write it.
    """
    base = os.environ.get("PENJING_CACHE")
    folder = (Path(base) if base else Path.home() / ".cache" / "penjing") / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise OutputError(
            "the cache can't be written",
            code="unwritable",
            got=f"{folder}: {error.strerror or error}",
            expected="a folder with write permission",
            remedy="set PENJING_CACHE to another folder",
        ) from error
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise OutputError(
            "the cache of compiled code is open to other users",
            code="foreign-cache",
            got=f"{folder} of the user {status.st_uid}, mode {status.st_mode & 0o777:o}",
            expected=f"a folder of the user {os.geteuid()}, which nobody else may write",
            remedy=f"chmod 700 {folder}, or set PENJING_CACHE to another folder",
        )
    return folder


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all: beside its place first, then renamed over it.

    Raises:
        OutputError: The disk is full or the folder is not writable; what stood there before is untouched.
    """
    path = Path(path)
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~umask())  # mkstemp makes files that nobody else may read
        os.replace(name, path)
    except OSError as error:
        raise OutputError(
            f"{path.name} can't be written",
            code="unwritable",
            got=f"{type(error).__name__}: {error.strerror or error} ({path.parent})",
            expected="a folder with write permission and free space",
            remedy="free some space, or choose another folder with --out",
        ) from error
    finally:
        if name is not None and os.path.exists(name):
            os.unlink(name)
