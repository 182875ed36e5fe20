"""A teacher's answers, written once and read from then on: a costly teacher is asked about each sample once.

Answers are found by the content of what was asked, so that a sample that was augmented in another way has another
answer: Shen & Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, keep crops and
answers together too; Wu et al., "TinyViT", ECCV 2022, keep answers by augmentation.
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
HASHES = 4  # of 32 bits, for every input of a sample
WORD = 4  # bytes that are hashed at once
MOST = 1 << 28  # numbers of one answer
WAIT_S = 60.0  # for another process that is writing


@dataclass(frozen=True)
class TeacherCache:
    """A teacher for `penjing.Finetune(teacher=...)` that keeps its first output for every sample in a folder.

    ``about.json`` says whose answers they are, ``keys.bin`` has 16 bytes a sample, ``answers.bin`` as many floats as
    the teacher gives, in the same order, read by memory map. Both grow while samples come that are new; a run that is
    killed leaves what was written. Processes that write into one folder take turns.

    Raises:
        RecipeError: What is given is neither a folder nor a teacher.

    Attributes:
        folder: Where the answers are, or will be; from the current folder.
        teacher: The network that is asked about samples that are new, or its .pt2 file or Hugging Face folder; None
            reads only.
    """

    folder: str | Path
    teacher: nn.Module | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Path):
            object.__setattr__(self, "teacher", str(self.teacher))
        fine = isinstance(self.folder, str | Path) and str(self.folder) not in ("", ".")
        if not fine or not isinstance(self.teacher, nn.Module | str | None) or self.teacher in ("", "self"):
            raise RecipeError(
                "TeacherCache takes a folder and a network",
                got=f"folder={self.folder!r}, teacher={self.teacher!r}"[:200],
                expected='TeacherCache("answers", network), or TeacherCache("answers") to read only',
                remedy="a .pt2 file or a Hugging Face folder may stand in the network's place",
            )
        object.__setattr__(self, "folder", str(self.folder))

    def opened(self, task: Task) -> CachedTeacher:
        """The answers, as a module that is called like the teacher.

        Raises:
            TaskError: The folder has answers of another teacher, is damaged, or is missing without a teacher.
            SourceError: The teacher's file is missing, or holds no network.
        """
        return CachedTeacher(self.folder, None if self.teacher is None else opened(self.teacher, task))


class CachedTeacher(nn.Module):
    """A teacher's answers: those in the folder are read, others are asked for and written.

    Args:
        folder: Where they are, or will be.
        teacher: The network that is asked about samples that are new; None reads only.

    Raises:
        TaskError: The folder has answers of another teacher, is damaged, or is missing without a teacher.
    """

    outputs_only: ClassVar[bool] = True

    def __init__(self, folder: str | Path, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        object.__setattr__(self, "teacher", teacher)  # no weight of this module
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
        """The teacher's first output, (samples, …) in fp32.

        Raises:
            TaskError: A sample has no answer, and there is no teacher.
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
        """Raise TaskError where a sample has no answer and there is no teacher. Nobody is asked."""
        keys = _keys(args, kwargs)
        missing = sum(key not in self.rows for key in keys)
        if missing and self.teacher is None:
            raise self._unanswered(missing, len(keys))

    def _ask(self, args: Any, kwargs: Any, new: dict[bytes, int], samples: int) -> None:
        if self.teacher is None:
            raise self._unanswered(len(new), samples)
        with in_eval_mode(self.teacher), torch.no_grad():
            said = first_output(self.teacher(*args, **kwargs)).float().cpu()
        if len(said) != samples:
            raise TaskError(
                "the teacher's answers can't be stored",
                got=f"an output of shape {tuple(said.shape)} for {samples} samples",
                expected="one row a sample",
            )
        shape = tuple(said.shape[1:])
        if self.shape is None:
            self.shape = shape
            self._begin()
        if shape != self.shape:
            raise TaskError(
                "the teacher's answers differ in shape", got=shape, expected=self.shape, remedy="pad to one length"
            )
        self._append(list(new), said[list(new.values())].numpy())
        self.evaluated += len(new)

    def _begin(self) -> None:
        shape = self.shape
        with self._held():
            about = self.folder / "about.json"
            if about.exists():  # by another process since this one looked
                self._open(about, self.name)
                return
            write_text(about, json.dumps({"version": VERSION, "teacher": self.name, "shape": shape}) + "\n")

    def _held(self) -> AbstractContextManager[None]:
        return locked(self.folder, "the folder of the teacher's answers", WAIT_S)

    def _append(self, keys: list[bytes], rows: np.ndarray[Any, Any]) -> None:
        with self._held():
            try:
                # Another object, or a write that failed, may have left more than is known here.
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
            said = reading.json_file(about, 1 << 16)
            version, self.name, shape = said["version"], str(said["teacher"]), tuple(int(n) for n in said["shape"])
            if len(bytes.fromhex(self.name)) != hashlib.sha256().digest_size:
                raise ValueError("no SHA-256 of a teacher")
            if len(shape) > 16 or not all(0 < n <= MOST for n in shape) or math.prod(shape) > MOST:
                raise ValueError(f"answers of the shape {shape}"[:200])
        except reading.UNREADABLE as error:
            raise self._wrong("the stored answers can't be read", f"{type(error).__name__}: {error}") from None
        if version != VERSION:
            raise self._wrong("the stored answers are of another version", version)
        if name and name != self.name:
            raise self._wrong("the stored answers are another teacher's", f"weights {self.name[:12]}, not {name[:12]}")
        self.shape = shape
        if count := self._count():
            keys = (self.folder / "keys.bin").read_bytes()
            self.rows = {keys[i * KEY : (i + 1) * KEY]: i for i in range(count)}
            self._map(count)

    def _count(self, cut: bool = False) -> int:
        """How many answers there are; what a killed process has left of another one can be cut off."""
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
            "samples of the training have no stored answer",
            got=f"{missing} of {samples} samples of a batch are not in {self.folder}",
            expected="the data, order of seeds and augmentation that the answers were stored with",
            remedy="give the teacher, which is then asked: TeacherCache(folder, network)",
        )

    def _wrong(self, what: str, got: object, remedy: str | None = None) -> TaskError:
        remedy = remedy or f"delete {self.folder}; the teacher is asked again"
        expected = "a folder that TeacherCache(folder, network) wrote for this teacher"
        return TaskError(what, got=f"{self.folder}: {got}", expected=expected, remedy=remedy)


def _keys(args: Any, kwargs: Any) -> list[bytes]:
    """A digest of every sample: its part of every input, by name, bytes, types and shapes; and the numbers of all."""
    named = sorted(((where, x) for _, where, x in leaves((args, kwargs))), key=lambda pair: pair[0])
    tensors = [x for _, x in named if isinstance(x, torch.Tensor)]
    samples = next((len(x) for x in tensors if x.dim()), None)
    if samples is None:
        raise TaskError("a call can't be found again", got="no tensor with an axis", expected="(samples, …)")
    kinds = repr(
        [
            (where, str(x.dtype), tuple(x.shape[1:])) if isinstance(x, torch.Tensor) else (where, x)
            for where, x in named
            if isinstance(x, torch.Tensor | bool | int | float | str)
        ]
    )
    sums = []
    for x in tensors:
        rows = samples if x.dim() and len(x) == samples else 1  # what all samples share is part of each one's key
        sums.append(_sums(x.detach().reshape(rows, x.numel() // max(1, rows))).expand(samples, -1))
    # The only values that leave the device of the samples: a GPU hands over 16 bytes a sample, not the samples.
    own = torch.cat(sums, 1).cpu().numpy()
    return [hashlib.blake2b(kinds.encode() + row.tobytes(), digest_size=KEY).digest() for row in own]


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Four hashes of 32 bits for every row, (rows, 4) int32, the same on every device.

    The multilinear family of Lemire & Kaser, "Strongly Universal String Hashing is Fast", The Computer Journal 2014:
    words of 32 bits times numbers of 64, summed modulo 2^64, of which the upper half is kept. Two different rows of
    one length share all four with a probability of 2^-128.
    """
    size = rows.shape[1] * rows.element_size()
    count = max(1, -(-size // WORD))
    padded = torch.zeros(len(rows), count * WORD, dtype=torch.uint8, device=rows.device)
    padded[:, :size] = rows.contiguous().view(torch.uint8)
    words, numbers = padded.view(torch.int32), _numbers(count, rows.device)
    sums = torch.zeros(len(rows), HASHES, dtype=torch.int64, device=rows.device)
    # As many as the caches of a processor hold; a GPU is asked as rarely as its memory allows.
    columns = max(1, (2**18 if rows.device.type == "cpu" else 2**24) // max(1, len(rows)))
    for begin in range(0, count, columns):
        part = words[:, begin : begin + columns].long()
        for i in range(HASHES):
            sums[:, i] += (part * numbers[i, begin : begin + columns]).sum(1)
    return (sums >> 32).int()


@functools.lru_cache(maxsize=8)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    """(hashes, count) int64 without a pattern, the same everywhere: Steele et al., SplitMix, OOPSLA 2014."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count * HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(np.ascontiguousarray(z.view(np.int64).reshape(count, HASHES).T)).to(device)


def _full(folder: Path, error: OSError) -> OutputError:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return OutputError(
        "a teacher's answers can't be written",
        got=f"{error.strerror or error} ({folder})",
        expected="a folder with write permission and free space",
        remedy="free some space; what was written before is used again" if full else "name another folder",
    )
