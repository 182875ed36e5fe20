"""Artifacts that are machine code: Penjing opens those alone that this user compiled on this machine, or trusts.

Opening a shared library runs what is in it, whoever wrote it. So the hash of every library that is compiled here is
remembered in the user's own folder, and another is refused until the user says that its origin is trusted.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from penjing.errors import ArtifactError
from penjing.records.files import cache

VARIABLE = "PENJING_TRUST"
FOLDER = "compiled"  # of the cache: a file named after every hash


def remember(path: Path) -> None:
    """Note the hash of a library that was compiled here."""
    (cache(FOLDER) / _hash(path)).touch()


def check(path: Path) -> None:
    """Raise ArtifactError unless the library was compiled here, or its hash is what the user trusts."""
    sha = _hash(path)
    if (cache(FOLDER) / sha).is_file() or sha in os.environ.get(VARIABLE, "").split(","):
        return
    raise ArtifactError(
        "the artifact is machine code that was not compiled here, and opening it would run it",
        code="foreign-code",
        got=f"{path.name}, SHA-256 {sha}",
        expected="a library that Penjing compiled for this user on this machine",
        remedy=f"compress the network here; or, where you trust who wrote it, set {VARIABLE}={sha}",
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
