"""Packed networks: files with their tensors entropy-coded, equal to the bit when they are unpacked.

docs/packed.md describes the format. Chunks are independent: they are coded in parallel, and one tensor is read alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from penjing.errors import ArtifactError, OutputError
from penjing.records.files import umask
from penjing.records.folder import ARTIFACT, check_writable, writing
from penjing.storage import chunks
from penjing.storage.destination import SPACE, beside, check_space
from penjing.storage.lzma2 import compressed
from penjing.storage.opened import TAIL
from penjing.storage.packed_file import (
    ALL_ASIDE,
    ASIDE,
    COPY,
    FORMAT,
    LENGTH,
    MAGIC,
    PIECE,
    ROW,
    WITHIN,
    Opened,
    in_order,
)  # fmt: skip
from penjing.storage.regions import ALL_BITS as BITS
from penjing.storage.regions import Bytes, Region, regions
from penjing.storage.streams import BETWEEN, Stream, streams

_NUMBERS = {
    "i8": "<i1", "u8": "<u1", "i16": "<i2", "u16": "<u2", "i32": "<i4", "u32": "<u4", "i64": "<i8", "u64": "<u8",
    "f16": "<f2", "f32": "<f4", "f64": "<f8",
}  # fmt: skip


_BYTES = np.arange(256)
_E4M3 = np.where(_BYTES & 127 == 127, np.nan, np.where(
    _BYTES & 120, np.ldexp(8.0 + (_BYTES & 7), (_BYTES >> 3 & 15) - 10), np.ldexp(_BYTES & 7, -9),
) * np.where(_BYTES & 128, -1, 1)).astype(np.float32)  # fmt: skip
"""Values of floats with 4 bits of exponent and 3 of mantissa, without infinity (OCP 8-bit floating point, 2023)."""


@dataclass(frozen=True)
class Packed:
    """What a packed file holds.

    Attributes:
        path: The file.
        size_bytes: Of the packed file.
        files: Name of every file in it → its bytes when unpacked.
        tensors: (name, number type, bytes unpacked, bytes packed) of every tensor, the largest first.
    """

    path: Path
    size_bytes: int
    files: dict[str, int]
    tensors: tuple[tuple[str, str, int, int], ...]

    @property
    def unpacked_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def pack(
    source: Path | str,
    out: Path | str,
    *,
    only: Sequence[str] = (),
    threads: int | None = None,
    force: bool = False,
) -> Packed:
    """Write the files of a network as one packed file.

    Args:
        source: A run folder (of which its artifact is packed), an artifact, a checkpoint, or one file.
        out: The file to write.
        only: The names of the files of the folder `source` to pack; empty packs as said there.
        threads: None takes every core.
        force: Replace `out`.

    Raises:
        ArtifactError: There is nothing to pack.
        OutputError: `out` exists, is one of the files to pack, or can't be written.
        MissingDependency: numba is not installed.
    """
    out = Path(out)
    root, names = (Path(source), list(only)) if only else files(Path(source))
    _check_present(root, names)
    check_writable(out)
    if out.exists() and not force:
        raise OutputError(
            "the file exists already", code="exists", got=str(out), expected="a new name", remedy="--force replaces it"
        )
    if out.exists() and any((root / name).samefile(out) for name in names):
        raise OutputError(
            "the packed file would replace a file that it packs", code="source", got=str(out), expected="a new name"
        )
    with beside(out) as file, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        _write(file, root, names, pool)
    return contents(out)


def packed_bytes(folder: Path, names: Sequence[str]) -> int:
    """Size in bytes of these files, packed as one.

    Raises:
        ArtifactError: A file is missing.
        MissingDependency: numba is not installed.
    """
    _check_present(folder, names)
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        _write(file, folder, sorted(set(names)), pool)
        return file.tell()


def _check_present(folder: Path, names: Sequence[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ArtifactError(
            "a file of the network is missing",
            code="missing",
            got=f"no file at {folder / missing[0]}",
            expected=", ".join(names),
            remedy="copy the whole folder, or build it again",
        )


def files(source: Path) -> tuple[Path, list[str]]:
    """The folder and the names of the files in it that are packed."""
    if source.is_file():
        return source.parent, [source.name]
    root = source / ARTIFACT if (source / ARTIFACT).is_dir() else source
    # Links to files are followed: a snapshot in Hugging Face's cache has nothing else.
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    if not names:
        raise ArtifactError(
            "there is nothing to pack",
            code="missing",
            got=f"no file in {root}" if root.is_dir() else f"nothing at {source}",
            expected="a run folder, an artifact, a checkpoint, or a file such as model.onnx",
        )
    return root, names


def _write(file: IO[bytes], root: Path, names: list[str], pool: ThreadPoolExecutor) -> None:
    file.write(MAGIC)
    listed: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    aside: list[bytes] = []
    room = ALL_ASIDE
    known: dict[tuple[Any, ...], int] = {}
    for number, name in enumerate(names):
        path = root / name
        content: Bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        tensors = regions(path, content, BITS)
        ends = [0, *(t.offset + t.size for t in tensors)]
        listed.append(
            {
                "name": name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content.data).hexdigest(),
                "tensors": [t.name for t in tensors],
                "gaps": [t.offset - end for t, end in zip(tensors, ends, strict=False)],
                "types": [t.dtype for t in tensors],
                "shapes": [t.shape for t in tensors],
            }
        )
        parts = streams(tensors, len(content))
        between = parts.pop(BETWEEN)
        if between.size > min(ASIDE, room):
            parts[BETWEEN] = between
        elif between.size:
            aside.append(between.part(content, 0, between.count).tobytes())
            room -= between.size
            rows.append((WITHIN, 0, 0, number, BETWEEN, 0, between.count))
        for (tensor, first, count), (coding, coded) in in_order(pool, _coded, _jobs(content, parts, known, len(rows))):
            rows.append((coding, len(coded), zlib.crc32(coded), number, tensor, first, count))
            file.write(coded)
    columns = dict(zip(ROW, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(ROW, ())
    text = json.dumps({"format": FORMAT, "files": listed, "chunks": columns}, separators=(",", ":")).encode()
    packed = compressed(LENGTH.pack(len(text)) + text + b"".join(aside))
    place = file.tell()
    file.write(packed + TAIL.pack(place, len(packed), hashlib.sha256(packed).digest(), MAGIC))


def _jobs(
    content: Bytes, parts: dict[int, Stream], known: dict[tuple[Any, ...], int], number: int
) -> Iterator[tuple[Any, ...]]:
    """For every chunk of a file, what it is of, and what `_coded` needs: the values, or the chunk that is the same.

    Args:
        content: The bytes of the file.
        parts: Its streams.
        known: Of all chunks before, what they hold → their numbers; grows.
        number: Of the first chunk.
    """
    for stream in parts.values():
        size = PIECE if stream.number == BETWEEN else chunks.VALUES
        for first, count in chunks.split(stream.count, stream.columns, size):
            part = stream.part(content, first, count)
            key = hashlib.sha256(part.data).digest(), stream.dtype, count
            same = known.setdefault(key, number)
            if same < number and len(part) > LENGTH.size:
                yield (stream.number, first, count), same
            else:
                yield (stream.number, first, count), part, stream.dtype, stream.columns, stream.width
            number += 1


def _coded(job: tuple[Any, ...]) -> tuple[Any, tuple[str, bytes]]:
    of, *rest = job
    return of, (COPY, LENGTH.pack(*rest)) if len(rest) == 1 else chunks.encode(*rest)


def contents(path: Path | str) -> Packed:
    """What a packed file holds; its tensors are not decoded.

    Raises:
        ArtifactError: It is not a packed file, is damaged, or is of a newer version.
    """
    with Opened(Path(path)) as opened:
        sizes: dict[tuple[int, int], float] = {}
        for chunk in opened.chunks:
            stream = opened.streams[chunk.file][chunk.tensor]
            for member, (_, size) in zip(stream.members, stream.spans, strict=False):  # joined ones: their shares
                key = chunk.file, member
                sizes[key] = sizes.get(key, 0) + chunk.length * size / stream.size
        rows = [
            (tensor.name, tensor.dtype, tensor.size, round(sizes.get((i, j), 0)))
            for i, (_, _, _, tensors) in enumerate(opened.files)
            for j, tensor in enumerate(tensors)
        ]
        files = {name: size for name, size, _, _ in opened.files}
        return Packed(Path(path), opened.size, files, tuple(sorted(rows, key=lambda row: -row[2])))


def unpack(path: Path | str, out: Path | str, *, threads: int | None = None) -> tuple[Path, ...]:
    """Write the files of a packed network into a new or empty folder; returns them.

    Raises:
        ArtifactError: It is not a packed file, is damaged, or is of a newer version; nothing is written.
        OutputError: The folder holds files, or can't be written.
        MissingDependency: numba is not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            "the output folder is not empty", code="foreign", got=str(out), expected="an empty folder, or a new name"
        )
    with Opened(Path(path)) as opened, writing(out.parent, what="the folder", remedy=SPACE):
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, sum(size for _, size, _, _ in opened.files))
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
                for number in range(len(opened.files)):
                    opened.restore(number, aside, pool)
            os.chmod(aside, 0o777 & ~umask())
            if out.exists():
                out.rmdir()
            os.replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return tuple(out / name for name, _, _, _ in opened.files)


def read(path: Path | str, name: str) -> npt.NDArray[Any]:
    """One tensor of a packed file, by its name; no other is decoded.

    Four-bit integers come as int8 or uint8, bfloat16 and floats of 8 bits as float32, truth values as uint8.

    Raises:
        ArtifactError: There is no such tensor, or the file is damaged.
    """
    with Opened(Path(path)) as opened:
        for i, (_, _, _, tensors) in enumerate(opened.files):
            for j, tensor in enumerate(tensors):
                if tensor.name == name:
                    return _array(opened.tensor(i, j), tensor)
        raise ArtifactError(
            "the packed file does not hold this tensor",
            code="missing",
            got=name,
            expected=", ".join(t.name for _, _, _, tensors in opened.files for t in tensors[:5]) or "a file's tensors",
        )


def _array(data: bytes, tensor: Region) -> npt.NDArray[Any]:
    if tensor.dtype in _NUMBERS:
        return np.frombuffer(data, _NUMBERS[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == "bf16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    pairs = np.frombuffer(data, np.uint8)
    if tensor.dtype == "f8e5m2":
        return (pairs.astype(np.uint16) << 8).view(np.float16).astype(np.float32).reshape(tensor.shape)
    if tensor.dtype == "f8e4m3":
        return _E4M3[pairs].reshape(tensor.shape)
    halves = np.stack([pairs & 15, pairs >> 4], -1).reshape(-1)[: tensor.count]
    signed = halves.astype(np.int8) - 16 * (halves > 7).astype(np.int8)
    return (halves if tensor.dtype == "u4" else signed).reshape(tensor.shape)


__all__ = ["Packed", "contents", "pack", "packed_bytes", "read", "unpack"]
