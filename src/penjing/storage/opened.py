"""What reading a packed file and reading an update have in common: their ends, and bounds on what they claim."""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Self

from penjing.errors import ArtifactError
from penjing.records import reading

TAIL = struct.Struct("<QQ32s8s")  # place and length of the contents, a SHA-256, and the magic bytes


class OpenedFile(ABC):
    """An opened file; damage of any kind is an ArtifactError that names it.

    Attributes:
        path: The file.
        size: In bytes.
    """

    magic: ClassVar[bytes]
    what: ClassVar[str]  # for errors: "the packed file"
    expected: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        try:
            with reading.regular(self.path) as file:
                self.size = os.fstat(file.fileno()).st_size
                self._open(file)
        except reading.UNREADABLE as error:
            raise self._damaged(error) from None
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, reading.UNREADABLE) and not isinstance(error, OSError):
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> ArtifactError:
        return ArtifactError(
            f"{self.what} can't be read",
            code="unreadable",
            got=f"{self.path}: {error or type(error).__name__}",
            expected=self.expected,
            remedy="copy the file again",
        )

    @abstractmethod
    def _open(self, file: IO[bytes]) -> None:
        """Read the contents."""

    def _ends(self, file: IO[bytes]) -> tuple[int, int, bytes]:
        """Place and length of the contents, and the hash.

        Raises:
            ValueError: The file begins or ends otherwise.
        """
        if file.read(len(self.magic)) != self.magic:
            raise ValueError("it does not begin as such a file")
        file.seek(max(0, self.size - TAIL.size))
        place, length, digest, magic = TAIL.unpack(file.read(TAIL.size))
        if magic != self.magic or not len(magic) <= place <= place + length == self.size - TAIL.size:
            raise ValueError("it does not end as such a file: a part is missing")
        return place, length, digest


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where the name of a file leads out of the folder that it is written to, or stands twice."""
    paths = [PurePosixPath(name) for name in names]
    inside = all(path.parts and not path.is_absolute() and ".." not in path.parts for path in paths)
    plain = not any(set(str(path)) & set("\\:\0") for path in paths)
    if not inside or not plain or len(set(paths)) != len(paths):
        raise ValueError("the name of a file leads elsewhere")


def whole(value: Any) -> int:
    """A number from 0 on, or ValueError."""
    if number(value) < 0:
        raise ValueError("a negative size")
    return int(value)


def number(value: Any) -> int:
    """A whole number, or ValueError."""
    if type(value) is not int:
        raise ValueError("a size that is not a whole number")
    return value


__all__ = ["TAIL", "OpenedFile", "check_names", "number", "whole"]
