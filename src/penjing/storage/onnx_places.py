"""Where the tensors of an ONNX file lie, in it and in the files beside it that hold its external data.

The file is walked as a protocol buffer (https://protobuf.dev/programming-guides/encoding): only what holds tensors is
entered, nothing is copied, and the onnx package is not needed. Numbers of the fields: onnx.proto3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DEPTH = 32  # of graphs within graphs
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message → number of a field → the message that it holds, where that may hold tensors."""


@dataclass
class Stored:
    """A tensor: its values lie at `place` of this file, or as `outside` says.

    Attributes:
        name: As the graph calls it; empty for constants of a node.
        data_type: ONNX's number of it.
        shape: Its sizes.
        place: First byte of the values.
        size: Their bytes; 0 where they are written in another way than as they lie in memory.
        outside: Keys and values of external data: location, offset, length.
    """

    name: str = ""
    data_type: int = 0
    shape: tuple[int, ...] = ()
    place: int = 0
    size: int = 0
    outside: dict[str, str] = field(default_factory=dict)


def tensors(content: Any) -> list[Stored]:
    """All tensors of a file: initializers, and constants of nodes, of subgraphs and of functions too.

    Args:
        content: The bytes of the file.

    Raises:
        ValueError: It is not a protocol buffer.
    """
    view = memoryview(content)
    return list(_walked(view, 0, len(view), "model", 0))


def outside(path: Path) -> list[Stored]:
    """The tensors that the ONNX files beside a file store in it; `place` and `size` are within it."""
    listed = []
    for file in sorted(path.parent.glob("*.onnx")):
        status = file.stat()
        for tensor in _external(file, status.st_size, status.st_mtime_ns):
            if Path(tensor.outside["location"]) == Path(path.name):
                tensor.place = int(tensor.outside.get("offset", 0))
                tensor.size = int(tensor.outside.get("length", path.stat().st_size - tensor.place))
                listed.append(tensor)
    return listed


@functools.lru_cache(4)
def _external(file: Path, size: int, changed: int) -> list[Stored]:
    if not size:
        return []
    try:
        return [t for t in tensors(np.memmap(file, np.uint8, "r")) if "location" in t.outside]
    except (OSError, ValueError):  # one that can't be read tells nothing of the others
        return []


def _walked(view: memoryview, at: int, end: int, message: str, depth: int) -> Iterator[Stored]:
    if depth > _DEPTH:
        raise ValueError("graphs within graphs without end")
    if message == "tensor":
        yield _tensor(view, at, end)
        return
    inside = _INSIDE[message]
    for number, kind, value, start in _fields(view, at, end):
        if kind == _LENGTH and number in inside:
            yield from _walked(view, start, value, inside[number], depth + (inside[number] == "graph"))


def _tensor(view: memoryview, at: int, end: int) -> Stored:
    stored = Stored()
    sizes: list[int] = []
    for number, kind, value, start in _fields(view, at, end):
        if number == 1 and kind == _VARINT:
            sizes.append(value)
        elif number == 1 and kind == _LENGTH:
            while start < value:
                size, start = _varint(view, start, value)
                sizes.append(size)
        elif number == 2 and kind == _VARINT:
            stored.data_type = value
        elif kind != _LENGTH:
            continue
        elif number == 8:
            stored.name = bytes(view[start:value]).decode()
        elif number in (4, 9, 10):  # float_data and double_data lie as raw_data would
            stored.place, stored.size = start, value - start
        elif number == 13:
            pair = {n: bytes(view[a:b]).decode() for n, k, b, a in _fields(view, start, value) if k == _LENGTH}
            stored.outside[pair.get(1, "")] = pair.get(2, "")
    stored.shape = tuple(sizes)
    return stored


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, value and place of every field; the value of one with a length is where it ends."""
    while at < end:
        key, at = _varint(view, at, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(view, at, end)
            yield number, kind, value, at
            continue
        if kind == _LENGTH:
            length, at = _varint(view, at, end)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(kind, end)
        if length > end - at:
            raise ValueError("a field that ends too late")
        yield number, kind, at + length, at
        at += length


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")


__all__ = ["Stored", "outside", "tensors"]
