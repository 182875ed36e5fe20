"""Reading a packed file: its contents within bounds, and its chunks. docs/packed.md describes the format."""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from penjing.errors import ArtifactError
from penjing.records import reading
from penjing.storage import chunks
from penjing.storage.regions import BITS, Region

FORMAT = 1
MAGIC = b"PENJING\0"
TAIL = struct.Struct("<QQ32s8s")  # place and length of the contents, their SHA-256, and the magic bytes
LENGTH = struct.Struct("<I")
PIECE = 1 << 20  # bytes of a chunk of bytes
ROW = ("coding", "length", "checksum", "file", "tensor", "first", "count")
"""What the contents tell of a chunk, in lists of their own."""
WITHIN = "contents"
"""The coding of bytes that follow the contents' text: a few, such as a header, which has the same names in it."""
ASIDE = 1 << 16  # bytes between the tensors of a file, at most, that are a part of the contents
_CONTENTS_BYTES = 1 << 28
_ROW = 1024


@dataclass(frozen=True)
class Chunk:
    """A row of the contents: where a chunk lies, and what it is a part of."""

    coding: str
    place: int
    length: int
    checksum: int
    file: int
    tensor: int  # of the file; -1: the bytes between tensors
    first: int  # value, or byte
    count: int


class Opened:
    """An opened packed file; damage of any kind is an ArtifactError that names the file."""

    files: list[tuple[str, int, str, list[Region]]]
    chunks: list[Chunk]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Opened:
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
            "the packed file can't be read",
            code="unreadable",
            got=f"{self.path}: {error or type(error).__name__}",
            expected=f"a file that `penjing pack` wrote, of format {FORMAT}",
            remedy="copy the file again",
        )

    def _open(self, file: IO[bytes]) -> None:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as a packed file")
        file.seek(max(0, self.size - TAIL.size))
        place, length, digest, magic = TAIL.unpack(file.read(TAIL.size))
        if magic != MAGIC or not len(MAGIC) <= place <= place + length == self.size - TAIL.size:
            raise ValueError("it does not end as a packed file: a part is missing")
        file.seek(place)
        packed = file.read(length)
        if hashlib.sha256(packed).digest() != digest:
            raise ValueError("its contents are damaged")
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=chunks.XZ)
        text = unpacker.decompress(packed, _CONTENTS_BYTES)
        if not unpacker.eof:
            raise ValueError("its contents are too large")
        end = LENGTH.size + LENGTH.unpack_from(text)[0]
        data = reading.json_text(text[LENGTH.size : end].decode())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}: a newer version of Penjing wrote it")
        self.files = [(str(f["name"]), _whole(f["bytes"]), str(f["sha256"]), _regions(f)) for f in data["files"]]
        self.chunks, self._within = _chunks(data["chunks"]), text[end:]
        self._check(place)

    def _check(self, end: int) -> None:
        """Names stay inside the folder, tensors inside their files, chunks inside this one."""
        names = [PurePosixPath(name) for name, _, _, _ in self.files]
        inside = all(name.parts and not name.is_absolute() and ".." not in name.parts for name in names)
        plain = not any(set(str(name)) & set("\\:\0") for name in names)
        if not inside or not plain or len(set(names)) != len(names):
            raise ValueError("the name of a file leads elsewhere")
        for _, size, _, tensors in self.files:
            last = 0
            for t in tensors:
                if t.dtype not in BITS or t.offset < last or t.offset + t.size > size:
                    raise ValueError(f"the tensor {t.name[:100]!r} is outside its file")
                last = t.offset + t.size
        for c in self.chunks:
            last, room = (c.place + c.count, len(self._within)) if c.coding == WITHIN else (c.place + c.length, end)
            if last > room or c.file >= len(self.files) or c.first < 0 or c.count < 1:
                raise ValueError("a chunk is outside the file")
            _, size, _, tensors = self.files[c.file]
            most = tensors[c.tensor].count if 0 <= c.tensor < len(tensors) else size if c.tensor == -1 else -1
            if c.first + c.count > most or c.count > max(chunks.VALUES, PIECE):
                raise ValueError("a chunk is outside its tensor")

    def decoded(self, chunk: Chunk) -> bytes:
        """The bytes of a chunk."""
        if chunk.coding == WITHIN:
            return self._within[chunk.place : chunk.place + chunk.count]
        with open(self.path, "rb") as file:
            file.seek(chunk.place)
            coded = file.read(chunk.length)
        if zlib.crc32(coded) != chunk.checksum:
            raise ValueError("a chunk is damaged")
        if chunk.tensor < 0:
            return chunks.decode(chunk.coding, coded, "bytes", 1, chunk.count)
        tensor = self.files[chunk.file][3][chunk.tensor]
        size = -(-chunk.count * BITS[tensor.dtype] // 8)
        return chunks.decode(chunk.coding, coded, tensor.dtype, columns_of(tensor), size)

    def restore(self, number: int, folder: Path, pool: ThreadPoolExecutor) -> None:
        """Write one file, and compare it with its hash."""
        name, size, digest, tensors = self.files[number]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = _gaps(size, tensors)
        with path.open("wb+") as file:
            file.truncate(size)
            # The largest first, so that no thread begins with one when the others are done.
            mine = iter(sorted((c for c in self.chunks if c.file == number), key=lambda c: -c.length))
            for chunk, content in in_order(pool, lambda c: (c, self.decoded(c)), mine):
                if chunk.tensor >= 0:
                    tensor = tensors[chunk.tensor]
                    file.seek(tensor.offset + chunk.first * BITS[tensor.dtype] // 8)
                    file.write(content)
                    continue
                for place, first, count in _over(starts, chunk.first, chunk.count):
                    file.seek(place)
                    file.write(content[first : first + count])
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{name!r} does not come out as it was packed")


def _gaps(size: int, tensors: list[Region]) -> list[tuple[int, int]]:
    """Place and number of the bytes between tensors."""
    ends = [0, *(t.offset + t.size for t in tensors)]
    return [(a, b - a) for a, b in zip(ends, [*(t.offset for t in tensors), size], strict=True)]


def _over(gaps: list[tuple[int, int]], first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Where bytes `first` to `first + count` of all gaps together lie: place in the file, first of them, number."""
    before = 0
    for place, length in gaps:
        start, end = max(first, before), min(first + count, before + length)
        if start < end:
            yield place + start - before, start - first, end - start
        before += length


def _regions(file: Any) -> list[Region]:
    """The tensors of a file, each at its gap behind the one before."""
    listed: list[Region] = []
    end = 0
    for name, gap, dtype, shape in zip(file["tensors"], file["gaps"], file["types"], file["shapes"], strict=True):
        sizes = tuple(_whole(n) for n in shape)
        if not reading.fits(sizes, 1 << 48) or dtype not in BITS:
            raise ValueError("a tensor is too large, or of an unknown type")
        listed.append(Region(str(name), end + _whole(gap), str(dtype), sizes))
        end = listed[-1].offset + listed[-1].size
    return listed


def _chunks(lists: Any) -> list[Chunk]:
    """The chunks; they lie one after another, those within the contents apart from the others."""
    listed: list[Chunk] = []
    places = {True: 0, False: len(MAGIC)}
    for coding, *row in zip(*(lists[key] for key in ROW), strict=True):
        length, checksum, file, tensor, first, count = map(_number, row)
        within = coding == WITHIN
        place = places[within]
        places[within] += _whole(count if within else length)
        listed.append(Chunk(str(coding), place, length, checksum, _whole(file), tensor, first, count))
    return listed


def _whole(value: Any) -> int:
    if _number(value) < 0:
        raise ValueError("a negative size")
    return int(value)


def _number(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("a size that is not a whole number")
    return value


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterator[Any]) -> Iterator[Any]:
    """The results of `work` in the order of the jobs, of which so many are under way that no core waits."""
    waiting = [pool.submit(work, job) for job in islice(jobs, 8)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(work, job) for job in islice(jobs, 1)]


def columns_of(tensor: Region) -> int:
    """Values of one row: of one output channel as they lie, or `_ROW` where there are few and long ones."""
    count = max(1, tensor.count)
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return count // rows if rows and (rows >= 4 or count < 4 * _ROW) else min(count, _ROW)


def width_of(tensor: Region) -> int:
    """Values of one row of a convolution's kernel; 1 for other tensors."""
    return min(max(1, tensor.shape[-1]), 255) if len(tensor.shape) > 3 else 1
