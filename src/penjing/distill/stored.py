"""A cache of a teacher's outputs on disk: an expensive teacher is run once per sample.

Outputs are looked up by the content of the inputs, so every augmentation of a sample has its own entry: Shen & Xing,
"A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, also store crops with outputs; Wu et al.,
"TinyViT", ECCV 2022, store outputs by augmentation.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing.distill.teaching import opened
from penjing.errors import OutputError, RecipeError, TaskError
from penjing.modes import in_eval_mode
from penjing.network.weights import fingerprint_by_name
from penjing.records import reading
from penjing.records.files import write_text
from penjing.records.lock import locked
from penjing.tasks.call import leaves
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task

VERSION = 3
KEY = 16  # bytes of a sample's digest
HASHES = 4  # 32-bit hashes per input of a sample
WORD = 4  # bytes hashed at once
MOST = 1 << 28  # numbers per output
WAIT_S = 60.0  # seconds to wait for another process that is writing


@dataclass(frozen=True)
class TeacherCache:
    """A teacher for `penjing.Finetune(teacher=...)` that caches its first output for every sample in a folder.

    ``about.json`` identifies the teacher, ``keys.bin`` has 16 bytes per sample, ``answers.bin`` the teacher's outputs
    as floats in the same order, read through a memory map. Both grow with every new sample; a killed run leaves what it
    has written. Processes that write to the same folder take turns.

    Raises:
        RecipeError: An argument is neither a folder nor a teacher.

    Attributes:
        folder: Location of the cache, relative to the current folder.
        teacher: The network to run on new samples, or its .pt2 file or Hugging Face folder; None makes the cache
            read-only.
    """

    folder: str | Path
    teacher: nn.Module | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Path):
            object.__setattr__(self, "teacher", str(self.teacher))
        is_folder = isinstance(self.folder, str | Path) and str(self.folder) not in ("", ".")
        if not is_folder or not isinstance(self.teacher, nn.Module | str | None) or self.teacher in ("", "self"):
            raise RecipeError(
                "TeacherCache takes a folder and a network",
                code="settings",
                field="teacher" if is_folder else "folder",
                got=f"folder={self.folder!r}, teacher={self.teacher!r}"[:200],
                expected='TeacherCache("answers", network), or TeacherCache("answers") to read only',
                remedy="the network may also be given as a .pt2 file or a Hugging Face folder",
            )
        object.__setattr__(self, "folder", str(self.folder))

    def opened(self, task: Task) -> CachedTeacher:
        """Open the cache as a module that is called like the teacher.

        Raises:
            TaskError: The folder belongs to another teacher, is damaged, or is missing and there is no teacher.
            SourceError: The teacher's file is missing, or does not contain a network.
        """
        return CachedTeacher(self.folder, None if self.teacher is None else opened(self.teacher, task))


class CachedTeacher(nn.Module):
    """A cached teacher: outputs in the folder are read, others are computed and written.

    Args:
        folder: Location of the cache.
        teacher: The network to run on new samples; None makes the cache read-only.

    Raises:
        TaskError: The folder belongs to another teacher, is damaged, or is missing and there is no teacher.
    """

    outputs_only: ClassVar[bool] = True

    def __init__(self, folder: str | Path, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        object.__setattr__(self, "teacher", teacher)  # not registered as a submodule
        self.teacher: nn.Module | None
        self.rows: dict[bytes, int] = {}
        self.shape: tuple[int, ...] | None = None
        self.answers: np.ndarray[Any, Any] | None = None
        self.evaluated = 0  # samples on which the teacher was run in this process
        self.name = name = fingerprint_by_name([teacher]) if teacher is not None else ""
        about = self.folder / "about.json"
        if about.exists():
            self._open(about, name)
        elif not name:
            raise self._wrong(
                "no-cache",
                "the folder has no cached teacher outputs",
                "no about.json",
                "give the teacher: TeacherCache(folder, network)",
            )
        self.register_buffer("of", torch.frombuffer(bytearray(bytes.fromhex(self.name)), dtype=torch.uint8))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the teacher's first output, (samples, …) in fp32.

        Raises:
            TaskError: A sample is not cached, and there is no teacher.
            OutputError: The disk is full.
        """
        keys = _keys(args, kwargs)
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.rows}
        if new:
            self._ask(args, kwargs, new, len(keys))
        assert self.answers is not None and self.shape is not None
        rows = self.answers[[self.rows[key] for key in keys]]
        device = next(x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        return torch.from_numpy(np.array(rows)).reshape(len(keys), *self.shape).to(device)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Check, without running the teacher, that every sample can be answered.

        Raises:
            TaskError: A sample is not cached, and there is no teacher.
        """
        keys = _keys(args, kwargs)
        missing = sum(key not in self.rows for key in keys)
        if missing and self.teacher is None:
            raise self._unanswered(missing, len(keys))

    def _ask(self, args: Any, kwargs: Any, new: dict[bytes, int], samples: int) -> None:
        if self.teacher is None:
            raise self._unanswered(len(new), samples)
        with in_eval_mode(self.teacher), torch.no_grad():
            output = first_output(self.teacher(*args, **kwargs)).float().cpu()
        if len(output) != samples:
            raise TaskError(
                "the teacher's outputs can't be cached",
                code="no-rows",
                got=f"an output of shape {tuple(output.shape)} for {samples} samples",
                expected="one row per sample",
            )
        shape = tuple(output.shape[1:])
        if self.shape is None:
            self.shape = shape
            self._begin()
        if shape != self.shape:
            raise TaskError(
                "the teacher's outputs differ in shape",
                code="shape",
                got=shape,
                expected=self.shape,
                remedy="pad to one length",
            )
        self._append(list(new), output[list(new.values())].numpy())
        self.evaluated += len(new)

    def _begin(self) -> None:
        shape = self.shape
        with self._held():
            about = self.folder / "about.json"
            if about.exists():  # by another process in the meantime
                self._open(about, self.name)
                return
            write_text(about, json.dumps({"version": VERSION, "teacher": self.name, "shape": shape}) + "\n")

    def _held(self) -> AbstractContextManager[None]:
        return locked(self.folder, "the folder of cached teacher outputs", WAIT_S)

    def _append(self, keys: list[bytes], rows: np.ndarray[Any, Any]) -> None:
        with self._held():
            try:
                # Another object, or a failed write, may have left more than this one knows of.
                count = self._count(cut=True)
                for name, data in (("answers.bin", rows.astype("<f4").tobytes()), ("keys.bin", b"".join(keys))):
                    with (self.folder / name).open("ab") as file:
                        file.write(data)
            except OSError as error:
                raise _full(self.folder, error) from error
        self.rows |= {key: count + i for i, key in enumerate(keys)}
        self._map(count + len(keys))

    def _open(self, about: Path, name: str) -> None:
        try:
            about_teacher = reading.json_file(about, 1 << 16)
            version, self.name, shape = (
                about_teacher["version"],
                str(about_teacher["teacher"]),
                tuple(int(n) for n in about_teacher["shape"]),
            )
            if len(bytes.fromhex(self.name)) != hashlib.sha256().digest_size:
                raise ValueError("not the SHA-256 of a teacher")
            if len(shape) > 16 or not all(0 < n <= MOST for n in shape) or math.prod(shape) > MOST:
                raise ValueError(f"outputs of the shape {shape}"[:200])
        except reading.UNREADABLE as error:
            raise self._wrong(
                "unreadable", "the cached teacher outputs can't be read", f"{type(error).__name__}: {error}"
            ) from None
        if version != VERSION:
            raise self._wrong("version", "the cached teacher outputs are of another version", version)
        if name and name != self.name:
            raise self._wrong(
                "another-teacher",
                "the cached outputs are another teacher's",
                f"weights {self.name[:12]}, not {name[:12]}",
            )
        self.shape = shape
        if count := self._count():
            keys = (self.folder / "keys.bin").read_bytes()
            self.rows = {keys[i * KEY : (i + 1) * KEY]: i for i in range(count)}
            self._map(count)

    def _count(self, cut: bool = False) -> int:
        """The number of cached outputs; an incomplete one that a killed process left can be truncated."""
        assert self.shape is not None
        width = 4 * int(np.prod(self.shape, dtype=np.int64))
        sizes = [p.stat().st_size if p.exists() else 0 for p in (self.folder / "answers.bin", self.folder / "keys.bin")]
        count = min(sizes[0] // width, sizes[1] // KEY)
        for file, size in (("answers.bin", count * width), ("keys.bin", count * KEY)):
            if cut and (path := self.folder / file).exists() and path.stat().st_size > size:
                with path.open("r+b") as longer:
                    longer.truncate(size)
        return count

    def _map(self, count: int) -> None:
        assert self.shape is not None
        width = int(np.prod(self.shape, dtype=np.int64))
        self.answers = np.memmap(self.folder / "answers.bin", "<f4", "r", shape=(count, width))

    def _unanswered(self, missing: int, samples: int) -> TaskError:
        return TaskError(
            "training samples are missing from the teacher cache",
            code="missing",
            got=f"{missing} of {samples} samples of a batch are not in {self.folder}",
            expected="the data, seeds and augmentation with which the cache was written",
            remedy="give the teacher, to run it on new samples: TeacherCache(folder, network)",
        )

    def _wrong(self, code: str, what: str, got: object, remedy: str | None = None) -> TaskError:
        remedy = remedy or f"delete {self.folder}; the teacher is run again"
        expected = "a folder that TeacherCache(folder, network) wrote for this teacher"
        return TaskError(what, code=code, got=f"{self.folder}: {got}", expected=expected, remedy=remedy)


def _keys(args: Any, kwargs: Any) -> list[bytes]:
    """A digest per sample: its part of every input by name, bytes, type and shape, and the non-tensor inputs."""
    named = sorted(((where, x) for _, where, x in leaves((args, kwargs))), key=lambda pair: pair[0])
    tensors = [x for _, x in named if isinstance(x, torch.Tensor)]
    samples = next((len(x) for x in tensors if x.dim()), None)
    if samples is None:
        raise TaskError(
            "these inputs can't be cached", code="no-rows", got="no tensor with a batch axis", expected="(samples, …)"
        )
    kinds = repr(
        [
            (where, str(x.dtype), tuple(x.shape[1:])) if isinstance(x, torch.Tensor) else (where, x)
            for where, x in named
            if isinstance(x, torch.Tensor | bool | int | float | str)
        ]
    )
    sums = []
    for x in tensors:
        rows = samples if x.dim() and len(x) == samples else 1  # inputs shared by all samples are part of each key
        sums.append(_sums(x.detach().reshape(rows, x.numel() // max(1, rows))).expand(samples, -1))
    # Only these values leave the samples' device: 16 bytes per sample instead of the samples.
    own = torch.cat(sums, 1).cpu().numpy()
    return [hashlib.blake2b(kinds.encode() + row.tobytes(), digest_size=KEY).digest() for row in own]


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Compute four 32-bit hashes per row, (rows, 4) int32, identical on every device.

    The multilinear family of Lemire & Kaser, "Strongly Universal String Hashing is Fast", The Computer Journal 2014:
    32-bit words times 64-bit numbers, summed modulo 2^64, of which the upper half is kept. Two different rows of the
    same length collide in all four with a probability of 2^-128.
    """
    size = rows.shape[1] * rows.element_size()
    count = max(1, -(-size // WORD))
    padded = torch.zeros(len(rows), count * WORD, dtype=torch.uint8, device=rows.device)
    padded[:, :size] = rows.contiguous().view(torch.uint8)
    words, numbers = padded.view(torch.int32), _numbers(count, rows.device)
    sums = torch.zeros(len(rows), HASHES, dtype=torch.int64, device=rows.device)
    # Chunks that fit a CPU's caches; on a GPU as few as its memory allows.
    columns = max(1, (2**18 if rows.device.type == "cpu" else 2**24) // max(1, len(rows)))
    for begin in range(0, count, columns):
        part = words[:, begin : begin + columns].long()
        for i in range(HASHES):
            sums[:, i] += (part * numbers[i, begin : begin + columns]).sum(1)
    return (sums >> 32).int()


@functools.lru_cache(maxsize=8)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    """(hashes, count) pseudorandom int64, identical everywhere: Steele et al., SplitMix, OOPSLA 2014."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count * HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(np.ascontiguousarray(z.view(np.int64).reshape(count, HASHES).T)).to(device)


def _full(folder: Path, error: OSError) -> OutputError:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return OutputError(
        "the teacher cache can't be written",
        code="unwritable",
        got=f"{error.strerror or error} ({folder})",
        expected="a folder with write permission and free space",
        remedy="free some space; what was already written is reused" if full else "name another folder",
    )
