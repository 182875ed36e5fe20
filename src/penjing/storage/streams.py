"""What is coded together: a tensor, the small tensors of one kind in a file, or the bytes between tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from penjing.storage.regions import ALL_BITS, Bytes, Region

BETWEEN = -1
"""Number of the stream of the bytes between tensors; that of a tensor is its own, those of small ones lie below."""
SMALL = 1024  # values; a tensor of fewer is coded together with others of its kind
_ROW = 1024
_SHORT_ROW = 64


@dataclass(frozen=True)
class Stream:
    """Parts of a file, one behind the other.

    Attributes:
        number: As chunks name it.
        dtype: A number type, or "bytes".
        columns: Values of one row.
        width: Of a convolution's kernel, otherwise 1.
        spans: Place and number of the bytes of every part.
        members: The tensors, by their numbers.
    """

    number: int
    dtype: str
    columns: int
    width: int
    spans: tuple[tuple[int, int], ...]
    members: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """Of one value."""
        return ALL_BITS.get(self.dtype, 8)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size for _, size in self.spans)

    @property
    def count(self) -> int:
        """Number of values; an unused last half of a byte is one too where several tensors of 4 bits are joined."""
        return self.size * 8 // self.bits

    def bytes_of(self, first: int, count: int) -> tuple[int, int]:
        """First and number of the bytes of some values."""
        return first * self.bits // 8, min(-(-count * self.bits // 8), self.size)

    def part(self, content: Bytes, first: int, count: int) -> Bytes:
        """The bytes of some values."""
        places = list(self.places(first, count))
        if len(places) == 1:
            return np.ascontiguousarray(content[places[0][0] : places[0][0] + places[0][2]])
        return np.concatenate([content[place : place + length] for place, _, length in places])

    def places(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where the bytes of some values lie: place in the file, first of these bytes, number."""
        first, count = self.bytes_of(first, count)
        before = 0
        for place, length in self.spans:
            start, end = max(first, before), min(first + count, before + length)
            if start < end:
                yield place + start - before, start - first, end - start
            before += length


def streams(tensors: Sequence[Region], size: int) -> dict[int, Stream]:
    """Every stream of a file with these tensors, by its number.

    Tensors of fewer than `SMALL` values are joined where their number type, row and kernel are the same. Those of one
    row, such as biases, are joined whatever the length of it.
    """
    alike: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        if tensor.count < SMALL:
            columns = columns_of(tensor)
            one_row = columns == tensor.count
            alike[tensor.dtype, _SHORT_ROW if one_row else columns, 1 if one_row else width_of(tensor)].append(number)
    listed: dict[int, Stream] = {}
    joined: set[int] = set()
    for key, members in alike.items():
        if len(members) > 1:
            joined.update(members)
            spans = tuple((tensors[i].offset, tensors[i].size) for i in members)
            number = BETWEEN - 1 - len(listed)
            listed[number] = Stream(number, *key, spans, tuple(members))
    for number, tensor in enumerate(tensors):
        if number not in joined:
            lies = columns_of(tensor), width_of(tensor)
            listed[number] = Stream(number, tensor.dtype, *lies, ((tensor.offset, tensor.size),), (number,))
    listed[BETWEEN] = Stream(BETWEEN, "bytes", 1, 1, tuple(_gaps(tensors, size)))
    return listed


def columns_of(tensor: Region) -> int:
    """Values of one row: of one output channel as they lie, or `_ROW` where there are few and long ones."""
    count = max(1, tensor.count)
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return count // rows if rows and (rows >= 4 or count < 4 * _ROW) else min(count, _ROW)


def width_of(tensor: Region) -> int:
    """Values of one row of a convolution's kernel; 1 for other tensors."""
    return min(max(1, tensor.shape[-1]), 255) if len(tensor.shape) > 3 else 1


def _gaps(tensors: Sequence[Region], size: int) -> list[tuple[int, int]]:
    """Place and number of the bytes between tensors."""
    ends = [0, *(t.offset + t.size for t in tensors)]
    starts = [*(t.offset for t in tensors), size]
    return [(a, b - a) for a, b in zip(ends, starts, strict=True) if b > a]


__all__ = ["BETWEEN", "Stream", "columns_of", "streams", "width_of"]
