"""Reading untrusted files within bounds on kind, size, nesting, numbers and names.

A file is data of a stranger. What is not a regular file is not opened; what is too large is not read; a number that no
machine holds, a name that stands twice, brackets without end and arrays that are larger than their file are refused.
What is wrong is a `ValueError` here (an `OSError` where the system refuses), which the reader of each kind of file
turns into its own error. This module never imports torch.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import lzma
import math
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

TEXT_BYTES = 1 << 26  # of a JSON file; the record of a network of ten thousand layers has a tenth
DEPTH = 64  # of nesting
LARGEST = 1 << 63  # of a whole number
DIGITS = 400  # of a number's text
NAME = 1 << 16  # characters of a text within a file
HEADER = 1 << 16  # bytes of an array's header
MEMBERS = 10_000  # of an archive
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, MemoryError,
    SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip
"""What reading a damaged file raises, here and in the libraries that are handed one."""


@contextlib.contextmanager
def regular(path: Path | str, limit: int | None = None) -> Iterator[IO[bytes]]:
    """A file, opened to be read; a pipe, a device or a folder in its place is refused and not waited for.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: There is none, or it may not be read.
        ValueError: It is something else, or too large.
    """
    # A pipe without a writer would be waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"{status.st_size:,} bytes, and at most {limit:,} are read")
        yield file


def data(path: Path | str, limit: int) -> bytes:
    """All bytes of a file. Raises as `regular`."""
    with regular(path, limit) as file:
        return file.read(limit)


def text(path: Path | str, limit: int = TEXT_BYTES) -> str:
    """A text in UTF-8. Raises as `regular`."""
    try:
        return data(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8: {error}") from None


def json_file(path: Path | str, limit: int = TEXT_BYTES, *, finite: bool = True) -> Any:
    """What a JSON file holds. Raises as `regular`, and as `json_text`."""
    return json_text(text(path, limit), finite=finite)


def json_text(written: str, *, finite: bool = True) -> Any:
    """What a JSON text holds.

    Args:
        written: The text.
        finite: Whether NaN and infinity, which JSON does not have, are refused.

    Raises:
        ValueError: It is none, nests deeper than `DEPTH`, has a name twice in one object, a number beyond 64 bits,
            NaN or infinity.
    """
    try:
        value = json.loads(
            written,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant if finite else None,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    check(value)
    return value


def check(value: Any) -> None:
    """Raise ValueError where plain data nests too deep or holds a text that is too long."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH} levels")
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple):
                inner += part
            elif isinstance(part, str) and len(part) > NAME:
                raise ValueError(f"a text of {len(part):,} characters, and at most {NAME:,} are read")
        level, depth = inner, depth + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:100]!r} appears twice")
    return members


def _integer(written: str) -> int:
    if len(written) > DIGITS or not -LARGEST <= (value := int(written)) < 2 * LARGEST:
        raise ValueError(f"the number {written[:20]}…, which has more than 64 bits")
    return value


def _float(written: str) -> float:
    if len(written) > DIGITS or not math.isfinite(value := float(written)):
        raise ValueError(f"the number {written[:20]}…, which is too large")
    return value


def _constant(written: str) -> float:
    raise ValueError(f"{written}, which is not a number")


def array_names(path: Path | str) -> list[str]:
    """Names of the arrays of an ``.npz`` file. Raises as `arrays`."""
    try:
        with regular(path) as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()[:MEMBERS]]
    except OSError:
        raise
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from error


def array(path: Path | str) -> Any:
    """The array of an ``.npy`` file; no pickle is opened. Raises as `arrays`."""
    try:
        with regular(path, _memory() // 2) as file:
            return _array(file, os.fstat(file.fileno()).st_size, Path(path).name)
    except OSError:
        raise
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from error


def arrays(path: Path | str, limit: int | None = None, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The arrays of an ``.npz`` file; no pickle is opened.

    Args:
        path: The file.
        limit: Bytes that all arrays together may have; None is half of this machine's memory.
        names: Which of them; None is all.

    Raises:
        OSError: It can't be read.
        ValueError: It is not such a file; an array holds objects, is encrypted or damaged, or claims other numbers than
            it holds.
    """
    limit = limit if limit is not None else _memory() // 2
    by_name: dict[str, Any] = {}
    try:
        with regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS or len({m.filename for m in members}) != len(members):
                raise ValueError(f"{len(members)} members, some of the same name or more than {MEMBERS:,}")
            selected = [m for m in members if names is None or m.filename.removesuffix(".npy") in names]
            if (total := sum(m.file_size for m in selected)) > limit:
                raise ValueError(f"arrays of {total:,} bytes, and at most {limit:,} are read")
            for member in selected:
                name = member.filename.removesuffix(".npy")
                if member.flag_bits & 0x1:
                    raise ValueError(f"{name[:100]!r} is encrypted")
                with archive.open(member) as stream:
                    by_name[name] = _array(stream, member.file_size, name[:100])
    except OSError:
        raise
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return by_name


def _array(stream: IO[bytes], size: int, name: str) -> Any:
    """One array, whose header must claim as many bytes as there are."""
    import numpy as np

    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name!r} has NumPy's format {version}, and only 1.0 and 2.0 are read")
    shape, fortran, dtype = read(stream, max_header_size=HEADER)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds Python objects: opening them needs allow_pickle, and could run code")
    if len(shape) > 32 or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{name!r} claims to be {str(shape[:32])[:300]} of {dtype}, and has {size:,} bytes")
    flat = np.empty(math.prod(shape), dtype)
    view = flat.view(np.uint8).data if flat.nbytes else memoryview(b"")
    filled = 0
    while filled < len(view):
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{name!r} ends too early")
        filled += got
    if stream.read(1):  # also compares the checksum
        raise ValueError(f"{name!r} is longer than it says")
    return flat.reshape(shape, order="F" if fortran else "C")


def safetensors_header(path: Path | str) -> dict[str, Any]:
    """The header of a safetensors file: what each tensor's type, shape and place are.

    Raises:
        OSError: It can't be read.
        ValueError: It is not such a file, or its header claims more than there is.
    """
    with regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, TEXT_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json_text(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("a header that is not an object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        start, end = places if isinstance(places := entry.get("data_offsets"), list) and len(places) == 2 else (0, -1)
        whole = type(start) is int and type(end) is int and isinstance(entry.get("shape"), list)
        if not whole or not 0 <= start <= end <= size - 8 - length:
            raise ValueError(f"{name[:100]!r} is outside the file")
        shape = entry["shape"]
        # the narrowest type has four bits
        if not all(type(n) is int and n >= 0 for n in shape) or not fits(shape, 2 * (end - start)):
            raise ValueError(f"{name[:100]!r} claims the shape {str(shape[:20])[:100]} in {end - start:,} bytes")
    return header


def fits(shape: Sequence[int], most: int) -> bool:
    """Whether a shape of sizes ≥ 0 has at most so many elements.

    The product of a long list of sizes is a number of as many digits, which takes minutes to compute: the count ends
    where it is beyond the limit.
    """
    if 0 in shape:
        return True
    elements = 1
    for size in shape:
        elements *= size
        if elements > most:
            return False
    return elements <= most


@functools.cache
def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
