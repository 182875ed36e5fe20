"""File sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from penjing.errors import ArtifactError


def size_bytes(folder: Path | str, files: Iterable[str]) -> int:
    """Total size in bytes of files, given by name relative to the folder; a file named twice counts once.

    Raises:
        ArtifactError: A file is missing.
    """
    return sum(_present(Path(folder) / name).stat().st_size for name in dict.fromkeys(files))


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        ArtifactError: The file is missing.
    """
    with open(_present(Path(path)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(
            "a file of the artifact is missing",
            code="missing",
            got=f"nothing at {path}" if not path.exists() else f"{path} is not a file",
            expected="every file that the artifact's manifest names",
            remedy="copy the whole folder, or build the artifact again",
        )
    return path
