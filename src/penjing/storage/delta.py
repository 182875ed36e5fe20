"""Updates: what changed between two versions of a network's files, entropy-coded; docs/deltas.md describes the format.

A patch on other files than those that the update was made from is refused by their hashes, what comes out is compared
with its hash before it takes its place, and until then the old files are as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from penjing.errors import ArtifactError, OutputError
from penjing.numerics.copies import Copier
from penjing.records.folder import check_writable, writing
from penjing.storage import changes, chunks, packed
from penjing.storage.delta_file import (
    CHANGED,
    FORMAT,
    KERNEL,
    MAGIC,
    NEW,
    SAME,
    File,
    Opened,
    Part,
    Tensor,
    digest_of,
    gaps,
    joined,
    old_bytes,
    parts_of,
    pieces,
)
from penjing.storage.destination import SPACE, beside, check_free, check_no_stranger, check_space, replaced
from penjing.storage.opened import TAIL
from penjing.storage.packed_file import MAGIC as PACKED
from penjing.storage.packed_file import columns_of, in_order, width_of
from penjing.storage.pairing import Place, pairs
from penjing.storage.regions import Bytes, Region, regions

_TRIED = 1 << 16  # bytes of a tensor by which it is decided whether the old one helps
_SMALL = 256  # values of a tensor that is not tried


@dataclass(frozen=True)
class Update:
    """What an update holds.

    Attributes:
        path: The file.
        size_bytes: Of the update.
        bases: Name of every old file → its SHA-256.
        files: Name of every new file → its bytes.
        tensors: "unchanged", "changed" and "new" → number of tensors, their bytes, their bytes in the update.
        other: The same of the bytes that are not of a tensor, with the number of files.
    """

    path: Path
    size_bytes: int
    bases: dict[str, str]
    files: dict[str, int]
    tensors: dict[str, tuple[int, int, int]]
    other: tuple[int, int, int]

    @property
    def new_bytes(self) -> int:
        """Of all new files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class _Old:
    """The files of a version of a network."""

    root: Path
    names: list[str]

    def contents(self) -> list[Bytes]:
        return [_bytes(self.root / name) for name in self.names]


def delta(
    old: Path | str, new: Path | str, out: Path | str, *, threads: int | None = None, force: bool = False
) -> Update:
    """Write what changed from one version of a network to another.

    Args:
        old: What `packed.pack` takes, or a packed file.
        new: The same.
        out: The file to write.
        threads: None takes every core.
        force: Replace `out`.

    Raises:
        ArtifactError: A version is missing, or a damaged packed file.
        OutputError: `out` exists, or can't be written.
        MissingDependency: numba is not installed.
    """
    out = Path(out)
    with _version(Path(old)) as before, _version(Path(new)) as after:
        check_writable(out)
        check_free(out, force)
        if any(out.exists() and out.samefile(v.root / name) for v in (before, after) for name in v.names):
            raise OutputError(
                "the update would replace a version", code="exists", got=str(out), expected="the name of another file"
            )
        with beside(out) as file, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            _write(file, before, after, Path(new).is_file() and len(after.names) == 1, pool)
    return contents(out)


def patch(
    old: Path | str, update: Path | str, out: Path | str, *, threads: int | None = None, force: bool = False
) -> tuple[Path, ...]:
    """Write the new version of a network from the old one and an update; returns its files.

    Args:
        old: What the update was made from: the same files, whatever their names.
        update: What `delta` wrote.
        out: A file where the new version was one; else a folder. A name that ends in ``.pj`` is written packed.
        threads: None takes every core.
        force: Replace `out`, which may be `old`.

    Raises:
        ArtifactError: The update was made from other files, or is damaged; nothing is written.
        OutputError: `out` exists, can't be written, or is a folder with other files than those of a version.
        MissingDependency: numba is not installed.
    """
    out = Path(out)
    with Opened(Path(update)) as opened, _version(Path(old)) as before:
        olds = _bases(opened, before)
        names = [file.name for file in opened.files]
        check_free(out, force)
        check_no_stranger(out, {*(before.root / name for name in before.names), *(out / name for name in names)})
        with writing(out.parent, what="the folder of the new version", remedy=SPACE):
            out.parent.mkdir(parents=True, exist_ok=True)
            check_space(out.parent, sum(file.size for file in opened.files))
            aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            try:
                files = aside / "files"
                files.mkdir()
                with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
                    for file in opened.files:
                        opened.restore(file, olds, files / file.name, pool)
                result = files / names[0] if opened.single else files
                if out.suffix == ".pj":
                    result = packed.pack(result, aside / "new.pj", threads=threads).path
                replaced(out, result, aside)
                return tuple(out / name for name in names) if out.is_dir() else (out,)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def contents(path: Path | str) -> Update:
    """What an update holds.

    Raises:
        ArtifactError: It is not an update, is damaged, or is of a newer version.
    """
    with Opened(Path(path)) as opened:
        tensors = {}
        for word, mode in (("unchanged", SAME), ("changed", CHANGED), ("new", NEW)):
            some = [t for f in opened.files for t in f.tensors if t.mode == mode]
            coded = sum(row.length for f in opened.files for row in _rows(f, mode))
            tensors[word] = len(some), sum(t.size for t in some), coded
        other = (
            len(opened.files),
            sum(f.size - sum(t.size for t in f.tensors) for f in opened.files),
            sum(row.length for f in opened.files for row in _rows(f, -1)),
        )
        return Update(
            Path(path), opened.size, {name: digest for name, _, digest in opened.bases},
            {f.name: f.size for f in opened.files}, tensors, other,
        )  # fmt: skip


def _rows(file: File, mode: int) -> list[Any]:
    """The chunks of a file that hold tensors of one mode; -1: other bytes."""
    if mode == SAME:
        return []
    first = sum(row.coding == changes.CHANGES for row in file.chunks)
    # A tensor may claim any size: there are no more parts than chunks.
    last = first + sum(1 for _ in itertools.islice(parts_of(file.tensors, NEW), len(file.chunks)))
    return file.chunks[:first] if mode == CHANGED else file.chunks[first:last] if mode == NEW else file.chunks[last:]


@contextlib.contextmanager
def _version(source: Path) -> Iterator[_Old]:
    """The files of a version, unpacked into a folder of their own where it is a packed file."""
    if source.is_file() and _begins(source) == PACKED:
        with tempfile.TemporaryDirectory() as folder:
            files = packed.unpack(source, Path(folder) / "net")
            yield _Old(Path(folder) / "net", [f.relative_to(Path(folder) / "net").as_posix() for f in files])
        return
    yield _Old(*packed.files(source))


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(PACKED))


def _bytes(path: Path) -> Bytes:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def _write(file: IO[bytes], old: _Old, new: _Old, single: bool, pool: ThreadPoolExecutor) -> None:
    file.write(MAGIC)
    olds, news = old.contents(), new.contents()
    base = [[name, len(content), _sha(content)] for name, content in zip(old.names, olds, strict=True)]
    bases = _bases_of(old, new)
    files = [File(name, len(c), _sha(c), b) for name, c, b in zip(new.names, news, bases, strict=True)]
    known = {digest: i for i, (_, _, digest) in reversed(list(enumerate(base)))}
    before = [(c, regions(old.root / name, c)) for name, c in zip(old.names, olds, strict=True)]
    after = [(c, [] if f.digest in known else regions(new.root / f.name, c)) for f, c in zip(files, news, strict=True)]
    matched = pairs(before, after, bases)
    listed = []
    for number, (f, content) in enumerate(zip(files, news, strict=True)):
        if f.digest in known:
            f.base = known[f.digest]
        f.tensors = [_tensor(region, content, matched.get(Place(number, region)), olds) for region in after[number][1]]
        rows = []
        for coding, coded, parts in in_order(pool, lambda job: job(), _jobs(f, content, olds)):
            file.write(coded)
            rows.append((coding, len(coded), parts))
        listed.append((f.name, f.size, f.digest, f.base, _listed(f.tensors, len(olds)), rows))
    text = json.dumps({"format": FORMAT, "single": single, "base": base, "files": listed}, separators=(",", ":"))
    packed_text = lzma.compress(text.encode(), lzma.FORMAT_XZ, lzma.CHECK_NONE)
    place = file.tell()
    file.write(packed_text)
    file.seek(0)
    digest = digest_of(file, place + len(packed_text))
    file.write(TAIL.pack(place, len(packed_text), digest, MAGIC))


def _bases_of(old: _Old, new: _Old) -> list[int]:
    """Of every new file, the old one of its name, or the only one of its kind."""
    kinds = [Path(name).suffix for name in old.names]
    bases = []
    for name in new.names:
        kind = Path(name).suffix
        alone = kinds.count(kind) == 1 == sum(Path(other).suffix == kind for other in new.names)
        bases.append(old.names.index(name) if name in old.names else kinds.index(kind) if alone else -1)
    return bases


def _tensor(region: Region, content: Bytes, before: Place | None, olds: Sequence[Bytes]) -> Tensor:
    """How a tensor is stored: not at all where it is as before, and alone where the old one does not help."""
    width = columns_of(region)
    alone = Tensor(region.offset, region.dtype, region.count, width, *_kernel(region), NEW, -1, 0)
    if before is None:
        return alone
    old, start = olds[before.file], before.region.offset
    same = np.array_equal(content[region.offset : region.offset + region.size], old[start : start + region.size])
    changed = alone._replace(mode=SAME if same else CHANGED, base=before.file, base_offset=start)
    if same or region.count < _SMALL:
        return changed
    first = max(0, (region.size - _TRIED) // 2) // 4 * 4
    size = min(_TRIED, region.size - first)
    now = np.ascontiguousarray(content[region.offset + first :][:size])
    part = changes.Part(now, np.ascontiguousarray(old[start + first :][:size]), alone.lies)
    helps = len(changes.encode([part], region.dtype)) < len(
        chunks.encode(now, region.dtype, width, width_of(region))[1]
    )
    return changed if helps else alone


def _kernel(region: Region) -> tuple[int, int]:
    """Width and values of a convolution's kernel; 1 and 1 of other tensors."""
    width = width_of(region)
    return width, min(width * region.shape[-2], KERNEL) if len(region.shape) > 3 else 1


def _jobs(file: File, content: Bytes, olds: Sequence[Bytes]) -> Iterator[Any]:
    """What encodes each chunk of a file: its coding, its bytes, and of how many parts it is."""
    some: list[Part] = []
    for part in parts_of(file.tensors, CHANGED):
        full = sum(p.values for p in some) + part.values > chunks.VALUES
        if some and (full or some[0].tensor.dtype != part.tensor.dtype):
            yield partial(_changes, some, content, olds)
            some = []
        some.append(part)
    if some:
        yield partial(_changes, some, content, olds)
    for part in parts_of(file.tensors, NEW):
        yield partial(_alone, part, content)
    spans = gaps(file.size, [(t.offset, t.offset + t.size) for t in file.tensors])
    copier = Copier(old_bytes(file, olds[file.base]) if file.base >= 0 else np.empty(0, np.uint8))
    for piece in pieces(spans):
        yield partial(_other, piece, content, copier)


def _changes(some: Sequence[Part], content: Bytes, olds: Sequence[Bytes]) -> tuple[str, bytes, int]:
    parts = [changes.Part(p.now(content), p.before(olds[p.tensor.base]), p.tensor.lies) for p in some]
    return changes.CHANGES, changes.encode(parts, some[0].tensor.dtype), len(some)


def _alone(part: Part, content: Bytes) -> tuple[str, bytes, int]:
    return *chunks.encode(part.now(content), part.tensor.dtype, part.tensor.width, part.tensor.kernel_width), 1


def _other(piece: Sequence[tuple[int, int]], content: Bytes, copier: Copier) -> tuple[str, bytes, int]:
    return *changes.encode_bytes(joined(content, piece), copier), 1


def _listed(tensors: Sequence[Tensor], bases: int) -> list[tuple[Any, ...]]:
    """Rows of the contents: places from the end of the tensor before."""
    rows, end, ends = [], 0, [0] * bases
    for t in tensors:
        gap = t.base_offset - ends[t.base] if t.mode != NEW else 0
        rows.append((t.offset - end, t.dtype, t.values, *t.lies, t.mode, t.base, gap))
        end = t.offset + t.size
        if t.mode != NEW:
            ends[t.base] = t.base_offset + t.size
    return rows


def _bases(opened: Opened, old: _Old) -> list[Bytes]:
    """The bytes of the files that an update was made from, which are recognized by their hashes."""
    there = {(len(c), _sha(c)): c for c in old.contents()} if opened.bases else {}
    for name, size, digest in opened.bases:
        if (size, digest) not in there:
            names = ", ".join(f"{n} {sha[:12]}" for n, (_, sha) in zip(old.names, there, strict=False))
            raise ArtifactError(
                "the update is for another version",
                code="other-base",
                got=f"{old.root}: {names[:300]}",
                expected=f"{name} with {size:,} bytes and the SHA-256 {digest[:12]}…",
                remedy="patch the version that the update was made from",
            )
    return [there[size, digest] for _, size, digest in opened.bases]


def _sha(content: Bytes) -> str:
    return hashlib.sha256(content.data).hexdigest()


__all__ = ["Update", "contents", "delta", "patch"]
