"""Text files that are there whole or not at all. This module never imports torch."""

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
