"""Bytes as copies from other bytes, and what stands between these copies.

Windows of the old bytes are looked up by their hash (as rsync and VCDIFF, RFC 3284, do), and a copy is as long as the
bytes agree; after a few bytes that differ, it is first tried to go on where the last copy ended.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penjing.numerics.compiled import loops

Bytes = npt.NDArray[np.uint8]


class Copier:
    """Finds copies from `old` (a one-dimensional array of bytes).

    Raises:
        MissingDependency: numba is not installed.
    """

    def __init__(self, old: Bytes) -> None:
        self.old = old
        self.bits = min(24, max(8, int(len(old)).bit_length()))
        self.table = loops("copies_loops").index(old, self.bits)

    def rows(self, new: Bytes) -> npt.NDArray[np.int64]:
        """(literal bytes, place in `old`, bytes to copy) one after another, (k, 3); the bytes that remain are literal.

        >>> import numpy as np
        >>> old, new = (np.frombuffer(text, np.uint8) for text in (b"one and two and three", b"1, and two and three!"))
        >>> Copier(old).rows(new).tolist()
        [[2, 3, 18]]
        """
        rows = np.empty((len(new) // 6 + 1, 3), np.int64)
        return rows[: loops("copies_loops").copies(self.old, new, self.table, self.bits, rows)]


def written(rows: npt.NDArray[np.int64]) -> bytes:
    """Rows as bytes: a place is told from the end of the copy before, and numbers in groups of seven bits."""
    out = bytearray()
    end = 0
    for literal, place, length in rows.tolist():
        away = place - end - literal
        for number in (literal, 2 * away if away >= 0 else -2 * away - 1, length):
            while number > 127:
                out.append(number & 127 | 128)
                number >>= 7
            out.append(number)
        end = place + length
    return bytes(out)


def restored(ops: bytes, literals: bytes, old: Bytes, size: int) -> bytes:
    """The bytes that `written` rows and their literal bytes stand for.

    Raises:
        ValueError: They are not `size` bytes, or lead out of `old`.
    """
    out = bytearray()
    numbers = iter(_numbers(ops))
    used = end = 0
    for literal, away, length in zip(numbers, numbers, numbers, strict=True):
        place = end + literal + (away // 2 if away % 2 == 0 else -(away + 1) // 2)
        if used + literal > len(literals) or not 0 <= place <= place + length <= len(old):
            raise ValueError("a copy from outside")
        if len(out) + literal + length > size:
            raise ValueError("more bytes than there should be")
        out += literals[used : used + literal]
        out += old[place : place + length].tobytes()
        used, end = used + literal, place + length
    out += literals[used:]
    if len(out) != size:
        raise ValueError(f"{len(out):,} bytes in the place of {size:,}")
    return bytes(out)


def _numbers(ops: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in ops:
        number |= (byte & 127) << shift
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 63 bits")
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    if shift:
        raise ValueError("a number that ends too early")
    return numbers
