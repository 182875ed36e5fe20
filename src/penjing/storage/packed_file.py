"""Reading a packed file: its contents within bounds, and its chunks. docs/packed.md describes the format."""

from __future__ import annotations

import hashlib
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from penjing.records import reading
from penjing.storage import chunks
from penjing.storage.lzma2 import XZ
from penjing.storage.opened import OpenedFile, check_names, number, whole
from penjing.storage.regions import ALL_BITS as BITS
from penjing.storage.regions import Region
from penjing.storage.streams import Stream, streams
from penjing.storage.streams import columns_of as columns_of
from penjing.storage.streams import width_of as width_of

FORMAT = 1
MAGIC = b"PENJING\0"
LENGTH = struct.Struct("<I")
PIECE = 1 << 20  # bytes of a chunk of bytes
ROW = ("coding", "length", "checksum", "file", "tensor", "first", "count")
"""What the contents tell of a chunk, in lists of their own."""
COPY = "copy"
"""The coding of a chunk that is another one: its bytes are the number of that, which lies before it."""
WITHIN = "contents"
"""The coding of bytes that follow the contents' text: a few, such as a header, which has the same names in it."""
ASIDE = 1 << 16  # bytes between the tensors of a file, at most, that are a part of the contents
ALL_ASIDE = 1 << 24  # of all files
_CONTENTS_BYTES = reading.TEXT_BYTES + ALL_ASIDE


@dataclass(frozen=True)
class Chunk:
    """A row of the contents: where a chunk lies, and what it is a part of."""

    coding: str
    place: int
    length: int
    checksum: int
    file: int
    tensor: int  # of the file; below 0: another of its streams
    first: int  # value, or byte
    count: int


class Opened(OpenedFile):
    """An opened packed file."""

    files: list[tuple[str, int, str, list[Region]]]
    chunks: list[Chunk]
    streams: list[dict[int, Stream]]  # of every file

    magic = MAGIC
    what = "the packed file"
    expected = f"a file that `penjing pack` wrote, of format {FORMAT}"

    def _open(self, file: IO[bytes]) -> None:
        place, length, digest = self._ends(file)
        file.seek(place)
        packed = file.read(length)
        if hashlib.sha256(packed).digest() != digest:
            raise ValueError("its contents are damaged")
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=XZ)
        text = unpacker.decompress(packed, _CONTENTS_BYTES)
        if not unpacker.eof:
            raise ValueError("its contents are too large")
        end = LENGTH.size + LENGTH.unpack_from(text)[0]
        if end > reading.TEXT_BYTES:
            raise ValueError(f"contents of {end:,} bytes, and at most {reading.TEXT_BYTES:,} are read")
        data = reading.json_text(text[LENGTH.size : end].decode())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}: a newer version of Penjing wrote it")
        self.files = [(str(f["name"]), whole(f["bytes"]), str(f["sha256"]), _regions(f)) for f in data["files"]]
        self.chunks, self._within = _chunks(data["chunks"]), text[end:]
        self._check(place)

    def _check(self, end: int) -> None:
        """Names stay inside the folder, tensors inside their files, chunks inside this one."""
        check_names([name for name, _, _, _ in self.files])
        for _, size, _, tensors in self.files:
            last = 0
            for t in tensors:
                if t.dtype not in BITS or t.offset < last or t.offset + t.size > size:
                    raise ValueError(f"the tensor {t.name[:100]!r} is outside its file")
                last = t.offset + t.size
        self.streams = [streams(tensors, size) for _, size, _, tensors in self.files]
        for c in self.chunks:
            last, room = (c.place + c.count, len(self._within)) if c.coding == WITHIN else (c.place + c.length, end)
            if last > room or c.file >= len(self.files) or c.first < 0 or c.count < 1:
                raise ValueError("a chunk is outside the file")
            stream = self.streams[c.file].get(c.tensor)
            most = stream.count if stream else -1
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
        if chunk.coding == COPY:
            (number,) = LENGTH.unpack(coded)
            source = self.chunks[number]
            if source.place >= chunk.place or source.coding == COPY or self._kind(source) != self._kind(chunk):
                raise ValueError("a copy of another chunk")
            return self.decoded(source)
        stream = self.streams[chunk.file][chunk.tensor]
        _, size = stream.bytes_of(chunk.first, chunk.count)
        return chunks.decode(chunk.coding, coded, stream.dtype, stream.columns, size)

    def _kind(self, chunk: Chunk) -> tuple[str, int]:
        return self.streams[chunk.file][chunk.tensor].dtype, chunk.count

    def tensor(self, file: int, number: int) -> bytes:
        """The bytes of one tensor."""
        _, _, _, tensors = self.files[file]
        (stream,) = (s for s in self.streams[file].values() if number in s.members)
        mine = sorted((c for c in self.chunks if (c.file, c.tensor) == (file, stream.number)), key=lambda c: c.first)
        if sum(c.count for c in mine) != stream.count:
            raise ValueError("chunks that are not those of the tensor")
        before = sum(tensors[i].size for i in stream.members if i < number)
        return b"".join(self.decoded(c) for c in mine)[before : before + tensors[number].size]

    def restore(self, number: int, folder: Path, pool: ThreadPoolExecutor) -> None:
        """Write one file, and compare it with its hash."""
        name, size, digest, _ = self.files[number]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb+") as file:
            file.truncate(size)
            # The largest first, so that no thread begins with one when the others are done.
            mine = iter(sorted((c for c in self.chunks if c.file == number), key=lambda c: -c.length))
            for chunk, content in in_order(pool, lambda c: (c, self.decoded(c)), mine):
                for place, first, count in self.streams[number][chunk.tensor].places(chunk.first, chunk.count):
                    file.seek(place)
                    file.write(content[first : first + count])
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{name!r} does not come out as it was packed")


def _regions(file: Any) -> list[Region]:
    """The tensors of a file, each at its gap behind the one before."""
    listed: list[Region] = []
    end = 0
    for name, gap, dtype, shape in zip(file["tensors"], file["gaps"], file["types"], file["shapes"], strict=True):
        sizes = tuple(whole(n) for n in shape)
        if not reading.fits(sizes, 1 << 48) or dtype not in BITS:
            raise ValueError("a tensor is too large, or of an unknown type")
        listed.append(Region(str(name), end + whole(gap), str(dtype), sizes))
        end = listed[-1].offset + listed[-1].size
    return listed


def _chunks(lists: Any) -> list[Chunk]:
    """The chunks; they lie one after another, those within the contents apart from the others."""
    listed: list[Chunk] = []
    places = {True: 0, False: len(MAGIC)}
    for coding, *row in zip(*(lists[key] for key in ROW), strict=True):
        length, checksum, file, tensor, first, count = map(number, row)
        within = coding == WITHIN
        place = places[within]
        places[within] += whole(count if within else length)
        listed.append(Chunk(str(coding), place, length, checksum, whole(file), tensor, first, count))
    return listed


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterator[Any]) -> Iterator[Any]:
    """The results of `work` in the order of the jobs, of which so many are under way that no core waits."""
    waiting = [pool.submit(work, job) for job in islice(jobs, 8)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(work, job) for job in islice(jobs, 1)]
