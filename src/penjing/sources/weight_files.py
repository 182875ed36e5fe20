"""Reading a file of weights, whoever wrote it: safetensors, what `torch.save` writes, or the index of several files.

The file is a stranger's. What `torch.save` writes is a pickle, read by torch's restricted unpickler alone
(`weights_only=True`), which makes tensors and containers and calls nothing else. What kind a file is, its first bytes
say, not its suffix.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from penjing.errors import CheckpointError
from penjing.records import reading
from penjing.sources import keras_h5
from penjing.tasks.usercode import suggest, suggest_file

State = Mapping[str, torch.Tensor]
"""Tensors by their names."""

INDEX_BYTES = 1 << 26
MOST_FILES = 10_000  # of one index
DEPTH = 3  # of the keys below which a training checkpoint keeps its weights
_SAVED = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save's older format begins with
_KEY = re.compile(r"[A-Za-z_][\w.]*")
_FORMS = "a .safetensors file, a state dict written by torch.save, or the .index.json of several such files"


@dataclass(frozen=True)
class WeightFile:
    """What was read.

    Attributes:
        path: The file.
        sha256: Of all that was read.
        states: Every state dict in it, by the keys that lead there, joined by dots: "" where the file itself is one,
            "ema.params" for ``{"ema": {"params": {...}}}``.
    """

    path: Path
    sha256: str
    states: Mapping[str, State]


def read(spec: Path | str) -> WeightFile:
    """Read a file; ``FILE:key`` takes what lies below that key alone.

    Raises:
        CheckpointError: It is missing, damaged, of another format, would run code, or holds no tensors there.
    """
    path, key = split(spec)
    try:
        head = _head(path)
        if head.lstrip()[:1] == b"{":
            loaded, digest = _sharded(path)
        else:
            loaded, digest = _one(path, head)
        states = dict(_states(loaded))
    except CheckpointError:
        raise
    except Exception as error:  # of the system, of safetensors, and of torch, which asserts what damaged files break
        raise _unreadable(path, error) from error
    if not states:
        raise CheckpointError(
            f"{path.name} holds no weights",
            code="no-weights",
            got=_described(loaded),
            expected=f"tensors by name, at most {DEPTH} keys deep",
            remedy="torch.save(model.state_dict(), 'weights.pth') writes them",
        )
    if key:
        return WeightFile(path, digest, {key: _below(states, key, path)})
    return WeightFile(path, digest, states)


def split(spec: Path | str) -> tuple[Path, str]:
    """The file and the key of ``FILE:key``; a file whose own name has a colon is that file.

    >>> split("runs/last.ckpt:ema.params")[1], split(r"C:\\nets\\last.ckpt")[1]
    ('ema.params', '')
    """
    path = Path(spec)
    before, colon, key = str(spec).rpartition(":")
    if colon and before and len(before) > 1 and _KEY.fullmatch(key) and not path.exists():
        return Path(before), key
    return path, ""


def _below(states: Mapping[str, State], key: str, path: Path) -> State:
    if key in states:
        return states[key]
    raise CheckpointError(
        f"{path.name} holds no weights under the key {key!r}",
        code="no-key",
        got=", ".join(name or "(the file itself)" for name in list(states)[:20]),
        expected="one of these keys",
        remedy=suggest(key, [name for name in states if name]),
    )


def _head(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())
        indices = [name for name in inside if name.endswith((".safetensors", ".index.json", ".pth", ".pt", ".bin"))]
        raise CheckpointError(
            "a folder is not a file of weights",
            code="folder",
            got=str(path),
            expected=_FORMS,
            remedy=f"give one of its files: {', '.join(indices[:5])}" if indices else None,
        )
    if not path.exists():
        raise CheckpointError(
            "the file of weights is missing",
            code="missing",
            got=str(path),
            expected=f"{_FORMS}; FILE:key for one of several state dicts in it",
            remedy=suggest_file(path) or "check the path",
        )
    with reading.regular(path) as file:
        return file.read(64)


def _one(path: Path, head: bytes) -> tuple[Any, str]:
    """What one file holds, and its SHA-256."""
    if head[8:9] == b"{":
        header = reading.safetensors_header(path)
        if not header:
            return {}, _sha256(path)
        return load_file(path), _sha256(path)
    if head[:1] == b"\x80" and _SAVED not in head:
        raise _foreign(path, "a pickle that torch.save did not write")
    if head.startswith(keras_h5.MAGIC) and (refusal := keras_h5.refusal(path, as_weights=True)):
        raise refusal
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise CheckpointError(
            f"{path.name} is not a file of weights",
            code="format",
            got=f"a file that begins with {head[:8]!r}",
            expected=_FORMS,
            remedy="load it with the library that wrote it, then torch.save(model.state_dict(), 'weights.pth')",
        )
    with reading.regular(path) as file:
        if head[:2] == b"PK":
            _check_archive(file, path)
        file.seek(0)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _not_only_weights(path, error) from error
    return loaded, _sha256(path)


def _check_archive(file: IO[bytes], path: Path) -> None:
    """Refuse TorchScript and archives that unpack to more than their own size, as torch's reader itself sees them."""
    archive = torch._C.PyTorchFileReader(file)
    records = archive.get_all_records()
    if any(name == "constants.pkl" or name.startswith("code/") for name in records):
        raise CheckpointError(
            f"{path.name} is a TorchScript archive",
            code="torchscript",
            got="a program with its weights: opening it would run code",
            expected=_FORMS,
            remedy="where you trust it: torch.save(torch.jit.load(path).state_dict(), 'weights.pth')",
        )
    if "data.pkl" not in records:
        kind = "an exported program" if any(name.startswith("models/") for name in records) else "another kind of zip"
        raise CheckpointError(
            f"{path.name} is not a file of weights",
            code="format",
            got=f"{kind}: {', '.join(records[:5])}",
            expected=_FORMS,
            remedy="an exported program is a SOURCE by itself" if kind == "an exported program" else None,
        )
    size = os.fstat(file.fileno()).st_size
    unpacked = sum(archive.get_record_size(name) for name in records)
    if unpacked > size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes, and has {size:,}: torch.save does not compress")


def _not_only_weights(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """What torch's restricted unpickler has refused: a name it does not know, or damage."""
    text = str(error)
    names = re.findall(r"GLOBAL (\S+)", text)
    if not names and "restricted" not in text and "Can only" not in text and "reduce" not in text:
        return _unreadable(path, error)
    return _foreign(path, f"a pickle that asks for {names[0]}" if names else "a pickle that calls what makes no tensor")


def _foreign(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is refused: it holds more than weights, and opening the rest could run code",
        code="foreign-code",
        got=got,
        expected=_FORMS,
        remedy="where you trust it, write its weights alone. Of a whole module: torch.save(torch.load(path, "
        "weights_only=False).state_dict(), 'weights.pth'); of a training checkpoint, ...['state_dict'] in place of "
        "... .state_dict()",
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    first = next(iter(str(error).strip().splitlines()), "")
    return CheckpointError(
        f"the file of weights {path.name} can't be read",
        code="damaged",
        got=f"{path}: {type(error).__name__}: {first[:300]}",
        expected=_FORMS,
        remedy="download or save it again",
    )


def _sharded(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of an index: ``{"weight_map": {name: file beside it}}``."""
    index = reading.json_file(path, INDEX_BYTES)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(
            f"{path.name} is not an index of weights",
            code="format",
            got=_described(index),
            expected='a "weight_map" from names of tensors to files, as in model.safetensors.index.json',
        )
    files = list(dict.fromkeys(places.values()))
    if outside := [name for name in files if re.search(r"[/\\:\x00]", name) or name in ("", ".", "..")]:
        raise CheckpointError(
            f"{path.name} names a file outside its folder",
            code="outside",
            got=outside[0][:200],
            expected="files beside the index",
        )
    if len(files) > MOST_FILES:
        raise ValueError(f"{len(files):,} files, and at most {MOST_FILES:,} are read")
    tensors: dict[str, torch.Tensor] = {}
    hashes = [_sha256(path)]
    for name in files:
        beside = path.parent / name
        shard, digest = _one(beside, _head(beside))
        hashes.append(digest)
        asked = [tensor for tensor, file in places.items() if file == name]
        shard = shard if isinstance(shard, Mapping) else {}
        if lost := [tensor for tensor in asked if not isinstance(shard.get(tensor), torch.Tensor)]:
            raise CheckpointError(
                f"{name} lacks tensors that {path.name} says it holds",
                code="incomplete",
                got=f"no {', '.join(lost[:5])}" + (f" and {len(lost) - 5} more" if len(lost) > 5 else ""),
                expected="every tensor of the index",
                remedy="download all files of the network again",
            )
        tensors |= {tensor: shard[tensor] for tensor in asked}
    return tensors, hashlib.sha256("".join(hashes).encode()).hexdigest()


def _states(loaded: Any) -> Iterator[tuple[str, State]]:
    """Every mapping of names to tensors, by the keys that lead to it; what is reached twice counts once."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    while level:
        deeper: list[tuple[tuple[str, ...], Any]] = []
        for keys, value in level:
            if not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            names = {name: inner for name, inner in value.items() if isinstance(name, str)}
            tensors = {name: inner for name, inner in names.items() if isinstance(inner, torch.Tensor)}
            if tensors:
                yield ".".join(keys), tensors
            if len(keys) < DEPTH:
                deeper += [((*keys, name), inner) for name, inner in names.items()]
        level = deeper


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        names = [str(name)[:50] for name in list(value)[:10]]
        return f"a mapping with {', '.join(names)}" if names else "an empty mapping"
    return f"a {type(value).__name__}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading.regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
