"""An update file: its contents, read within bounds, and its chunks. docs/deltas.md describes the format.

Nothing that an update says is believed: what its numbers lead to lies within the old files and within the new one, and
the hash of the result decides.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from penjing.records import reading
from penjing.storage import changes, chunks
from penjing.storage.opened import TAIL, OpenedFile, check_names, number, whole
from penjing.storage.packed_file import PIECE, in_order
from penjing.storage.regions import BITS, Bytes

FORMAT = 1
MAGIC = b"PENJING\1"
NEW, CHANGED, SAME = range(3)
"""How a tensor is stored: alone, as changes of an old one, or not at all."""
KERNEL = 1 << 16  # values, at most
Pieces = list[tuple[int, bytes]]
"""Places of a file, and what is written there."""
_LZMA_BYTES = 1 << 28  # of memory that decompressing the contents may take


class Tensor(NamedTuple):
    """A tensor of a new file: where it lies, its number type, and where its old version lies."""

    offset: int
    dtype: str
    values: int
    width: int
    kernel_width: int
    kernel_values: int
    mode: int
    base: int
    base_offset: int

    @property
    def lies(self) -> tuple[int, int, int]:
        """Values of a row, width and values of a kernel."""
        return self.width, self.kernel_width, self.kernel_values

    @property
    def size(self) -> int:
        """In bytes."""
        return -(-self.values * BITS[self.dtype] // 8)


class Part(NamedTuple):
    """Values of a tensor, in bytes from its beginning."""

    tensor: Tensor
    first: int
    size: int

    @property
    def values(self) -> int:
        """How many, with an unused last half of a byte."""
        return self.size * 8 // BITS[self.tensor.dtype]

    def now(self, content: Bytes) -> Bytes:
        """These values, from the bytes of the new file."""
        return np.ascontiguousarray(content[self.tensor.offset + self.first :][: self.size])

    def before(self, content: Bytes) -> Bytes:
        """These values before, from the bytes of the old file."""
        start = self.tensor.base_offset + self.first
        return np.ascontiguousarray(content[start : start + self.size])


class Coded(NamedTuple):
    """A chunk: its coding, its place and length in the update, and of how many parts it is."""

    coding: str
    place: int
    length: int
    parts: int


@dataclass
class File:
    """A file of the new version.

    Attributes:
        name: Of it.
        size: In bytes.
        digest: Its SHA-256.
        base: The number of the old file that it replaces, or -1.
        tensors: In the order of their places.
        chunks: In the order of `parts_of`: those of changed tensors, of new ones, and of the other bytes.
    """

    name: str
    size: int
    digest: str
    base: int
    tensors: list[Tensor] = field(default_factory=list)
    chunks: list[Coded] = field(default_factory=list)


def parts_of(tensors: Sequence[Tensor], mode: int) -> Iterator[Part]:
    """The parts of the tensors that are stored in one mode, by number type."""
    for dtype in BITS:
        for tensor in tensors:
            if (tensor.mode, tensor.dtype) == (mode, dtype):
                for first, count in chunks.split(tensor.values, tensor.width):
                    bits = BITS[dtype]
                    yield Part(tensor, first * bits // 8, -(-count * bits // 8))


def gaps(size: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Beginning and end of what lies between (beginning, end), in their order; these may overlap."""
    between, at = [], 0
    for start, end in sorted(spans):
        if start > at:
            between.append((at, start))
        at = max(at, end)
    return between + [(at, size)] if at < size else between


def joined(content: Bytes, spans: Sequence[tuple[int, int]]) -> Bytes:
    """Parts of a file, one behind the other."""
    if len(spans) == 1:
        return content[spans[0][0] : spans[0][1]]
    return np.concatenate([np.empty(0, np.uint8), *(content[a:b] for a, b in spans)])


def old_bytes(file: File, content: Bytes) -> Bytes:
    """What the old file holds besides the tensors that are used."""
    spans = [(t.base_offset, t.base_offset + t.size) for t in file.tensors if t.mode != NEW and t.base == file.base]
    return joined(content, gaps(len(content), spans))


class Opened(OpenedFile):
    """An opened update."""

    single: bool
    bases: list[tuple[str, int, str]]
    files: list[File]

    magic = MAGIC
    what = "the update"
    expected = f"a file that `penjing delta` wrote, of format {FORMAT}"

    def _open(self, file: IO[bytes]) -> None:
        place, length, digest = self._ends(file)
        file.seek(0)
        if digest_of(file, self.size - TAIL.size) != digest:
            raise ValueError("it is damaged")
        file.seek(place)
        unpacker = lzma.LZMADecompressor(memlimit=_LZMA_BYTES)
        text = unpacker.decompress(file.read(length), reading.TEXT_BYTES)
        if not unpacker.eof:
            raise ValueError("its contents are too large")
        data = reading.json_text(text.decode())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}: a newer version of Penjing wrote it")
        self.single = bool(data["single"])
        self.bases = [(str(name), whole(size), str(sha)) for name, size, sha in data["base"]]
        at = len(MAGIC)
        self.files = []
        for row in data["files"]:
            name, size, sha, base, tensors, coded = row
            new = File(str(name), whole(size), str(sha), number(base), self._tensors(tensors))
            for coding, extent, parts in coded:
                new.chunks.append(Coded(str(coding), at, whole(extent), whole(parts)))
                at += extent
            self.files.append(new)
        if at != place:
            raise ValueError("chunks of another length")
        self._check()

    def _tensors(self, rows: Any) -> list[Tensor]:
        """From rows whose places are told from the end of the tensor before."""
        tensors, end, ends = [], 0, [0] * len(self.bases)
        for gap, dtype, values, width, kernel_width, kernel_values, mode, base, base_gap in rows:
            if dtype not in BITS or mode not in (NEW, CHANGED, SAME) or not 0 < whole(values) < 1 << 48:
                raise ValueError("a tensor of another kind")
            offset = end + whole(gap)
            lies = whole(width), whole(kernel_width), whole(kernel_values)
            if not 0 < width < 1 << 48 or not 0 < kernel_width <= kernel_values <= KERNEL:
                raise ValueError("a tensor with rows or kernels of no size, or of too large a one")
            if mode == NEW:
                tensors.append(Tensor(offset, dtype, values, *lies, mode, -1, 0))
            else:
                base_offset = ends[whole(base)] + number(base_gap)
                tensors.append(Tensor(offset, dtype, values, *lies, mode, base, base_offset))
                ends[base] = base_offset + tensors[-1].size
                if not 0 <= base_offset <= ends[base] <= self.bases[base][1]:
                    raise ValueError("a tensor outside the old file")
            end = offset + tensors[-1].size
        return tensors

    def _check(self) -> None:
        """Names stay inside the folder, tensors inside their files."""
        check_names([f.name for f in self.files])
        if not self.files or (self.single and len(self.files) > 1):
            raise ValueError("a version without a file, or a single file of several")
        for f in self.files:
            if not -1 <= f.base < len(self.bases) or (f.tensors and f.tensors[-1].offset + f.tensors[-1].size > f.size):
                raise ValueError(f"{f.name[:100]!r} does not fit its contents")

    def restore(self, new: File, olds: Sequence[Bytes], path: Path, pool: ThreadPoolExecutor) -> None:
        """Write a new file from the old ones, and compare it with its hash.

        Args:
            new: One of `files`.
            olds: The bytes of the old files, in the order of `bases`.
            path: Where it is written.
            pool: Decodes chunks.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb+") as file:
            file.truncate(new.size)
            for t in new.tensors:
                if t.mode == SAME:
                    file.seek(t.offset)
                    file.write(olds[t.base][t.base_offset : t.base_offset + t.size].data)
            for written in in_order(pool, lambda job: job(), self._jobs(new, olds)):
                for place, content in written:
                    file.seek(place)
                    file.write(content)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != new.digest:
                raise ValueError(f"{new.name!r} does not come out as it was")

    def _jobs(self, new: File, olds: Sequence[Bytes]) -> Iterator[Callable[[], Pieces]]:
        """What decodes each chunk of a file to the places and the bytes that it stands for."""
        rows = iter(new.chunks)
        parts = list(parts_of(new.tensors, CHANGED))
        while parts:
            row = next(rows, None)
            if row is None or row.coding != changes.CHANGES or not 0 < row.parts <= len(parts):
                raise ValueError("a chunk of changes is missing")
            some, parts = parts[: row.parts], parts[row.parts :]
            if len({p.tensor.dtype for p in some}) > 1 or sum(p.values for p in some) > 2 * chunks.VALUES:
                raise ValueError("a chunk of too many values")
            yield partial(self._changed, row, some, olds)
        for part in parts_of(new.tensors, NEW):
            yield partial(self._new, _row(rows), part)
        spans = gaps(new.size, [(t.offset, t.offset + t.size) for t in new.tensors])
        old = old_bytes(new, olds[new.base]) if new.base >= 0 else np.empty(0, np.uint8)
        for piece in pieces(spans):
            yield partial(self._bytes, _row(rows), piece, old)
        if next(rows, None) is not None:
            raise ValueError("a chunk too many")

    def _changed(self, row: Coded, some: Sequence[Part], olds: Sequence[Bytes]) -> Pieces:
        nothing = np.empty(0, np.uint8)
        parts = [changes.Part(nothing, p.before(olds[p.tensor.base]), p.tensor.lies) for p in some]
        after = changes.decode(self._read(row), parts, some[0].tensor.dtype)
        return [(p.tensor.offset + p.first, content) for p, content in zip(some, after, strict=True)]

    def _new(self, row: Coded, part: Part) -> Pieces:
        tensor = part.tensor
        content = chunks.decode(row.coding, self._read(row), tensor.dtype, tensor.width, part.size)
        return [(tensor.offset + part.first, content)]

    def _bytes(self, row: Coded, piece: Sequence[tuple[int, int]], old: Bytes) -> Pieces:
        size = sum(end - start for start, end in piece)
        content, at, written = changes.decode_bytes(row.coding, self._read(row), old, size), 0, []
        for start, end in piece:
            written.append((start, content[at : at + end - start]))
            at += end - start
        return written

    def _read(self, row: Coded) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(row.place)
            return file.read(row.length)


def pieces(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Spans of a file as lists of at most `PIECE` bytes each."""
    piece: list[tuple[int, int]] = []
    room = PIECE
    for start, end in spans:
        while start < end:
            part = min(room, end - start)
            piece.append((start, start + part))
            start, room = start + part, room - part
            if not room:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def digest_of(file: IO[bytes], size: int) -> bytes:
    """SHA-256 of the next bytes of a file."""
    digest = hashlib.sha256()
    while size > 0 and (some := file.read(min(size, PIECE))):
        digest.update(some)
        size -= len(some)
    return digest.digest()


def _row(rows: Iterator[Coded]) -> Coded:
    row = next(rows, None)
    if row is None:
        raise ValueError("a chunk is missing")
    return row
