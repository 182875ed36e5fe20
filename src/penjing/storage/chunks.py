"""A chunk of a packed file: some values of one number type, or bytes, in the coding that takes the fewest bytes."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from penjing.numerics import entropy, scaled_integers
from penjing.storage import grids
from penjing.storage.regions import ALL_BITS as BITS
from penjing.storage.regions import Bytes

VALUES = 1 << 20  # of a chunk, at most
_FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7), "f8e4m3": (4, 3), "f8e5m2": (5, 2), "f64": (11, 52)}
"""Number type → bits of the exponent and of the mantissa."""
_INTEGERS = ("i8", "u8", "i4", "u4")
_PALETTE = 256  # different values, at most
_MANTISSA = 24  # bits, at most, that floats are coded with
_SAMPLE = 1 << 16  # bytes in which it is looked whether words return
_HEAD = struct.Struct("<III")  # state, number of words, number of bytes of plain bits
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
"""How bytes are compressed, without a container."""


def encode(content: Bytes, dtype: str, columns: int, width: int) -> tuple[str, bytes]:
    """Return the coding's name and the coded bytes of a part of a tensor.

    Args:
        content: Its bytes, of whole values but for the last half byte.
        dtype: A key of `ALL_BITS`, or "bytes".
        columns: Values of one row, as the tensor lies.
        width: Of a convolution's kernel, otherwise 1.
    """
    candidates = [("raw", content.tobytes())]
    if dtype in _INTEGERS:
        candidates.append(("integers", _integers(content, dtype, columns, width)))
    elif dtype in BITS:
        patterns = _patterns(content, dtype)
        palette = np.unique(patterns[: _PALETTE * 16])
        if len(palette) <= _PALETTE and len(palette := np.unique(patterns)) <= min(_PALETTE, len(patterns) // 4):
            candidates.append(("palette", _palette(patterns, palette, dtype, columns, width)))
        if dtype in _FLOATS and (len(candidates) == 1 or BITS[dtype] == 8):
            candidates += _floats(patterns, dtype, columns)
        on_grids = grids.encode(content.view("<f4"), min(columns, len(patterns)), width) if dtype == "f32" else None
        if on_grids is not None:
            candidates.append(("grids", on_grids))
    else:
        candidates.append(("xz", lzma.compress(content.tobytes(), lzma.FORMAT_RAW, filters=XZ)))
    best = min(candidates, key=lambda c: len(c[1]))
    if dtype in BITS and _return(content, dtype, len(best[1])):
        words = lzma.compress(content.tobytes(), lzma.FORMAT_RAW, filters=_words(dtype))
        if len(words) < 0.99 * len(best[1]):  # they are slower to unpack
            return "words", words
    return best


def decode(coding: str, coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    """Return what `encode` coded, `size` bytes.

    Raises:
        ValueError: The bytes are damaged.
    """
    back = _CODINGS.get(coding)
    if back is None:
        raise ValueError(f"the coding {coding[:20]!r}, which this version does not know")
    content = back(coded, dtype, columns, size)
    if len(content) != size:
        raise ValueError(f"a chunk of {len(content):,} bytes in the place of {size:,}")
    return content


def _integers(content: Bytes, dtype: str, columns: int, width: int) -> bytes:
    values = _unpacked(content, dtype)
    bits = BITS[dtype]
    usual, middle = 0 if dtype[0] == "i" else 1 << (bits - 1), int(np.median(values))
    center = usual if abs(middle - usual) <= 1 << (bits - 4) else middle
    coded = scaled_integers.encode(values - center, min(columns, len(values)), width)
    return struct.pack("<h", center) + coded


def _integers_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    count = size * 8 // BITS[dtype]
    (center,) = struct.unpack_from("<h", coded)
    values = scaled_integers.decode(coded[2:], count, min(columns, count)) + np.int16(center)
    low = 0 if dtype[0] == "u" else -(1 << BITS[dtype] - 1)
    if count and not low <= values.min() <= values.max() < low + (1 << BITS[dtype]):
        raise ValueError(f"a value outside {dtype}")
    if BITS[dtype] == 4:
        halves = (values & 15).astype(np.uint8)
        return bytes(halves[::2] | halves[1::2] << 4)
    return bytes((values & 255).astype(np.uint8))


def _unpacked(content: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    """Integers of a byte or half a byte each; an unused last half is one too."""
    if BITS[dtype] == 8:
        return content.view(np.uint8 if dtype == "u8" else np.int8).astype(np.int64)
    halves = np.stack([content & 15, content >> 4], -1).reshape(-1).astype(np.int64)
    return halves if dtype == "u4" else halves - 16 * (halves > 7)


def _floats(patterns: npt.NDArray[np.int64], dtype: str, columns: int) -> list[tuple[str, bytes]]:
    """The number of lowest bits that no value uses, as in floats that were of a shorter type, then the values.

    Nothing where they use more bits than are coded, as those of 64 bits may.
    """
    exponent, mantissa = _FLOATS[dtype]
    used = int(np.bitwise_or.reduce(patterns))
    unused = min((used & -used).bit_length() - 1, mantissa) if used else mantissa
    if mantissa - unused > _MANTISSA:
        return []
    short = (patterns.view(np.uint64) >> np.uint64(unused)).view(np.int64)
    coded = entropy.encode_floats(short, min(columns, len(patterns)), exponent, mantissa - unused)
    return [("floats", bytes([unused]) + _joined(coded))]


def _floats_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    exponent, mantissa = _FLOATS[dtype]
    count, unused = size * 8 // BITS[dtype], int.from_bytes(coded[:1])
    if not mantissa - _MANTISSA <= unused <= mantissa:
        raise ValueError("other bits than there are")
    patterns = entropy.decode_floats(_split(coded, 1), count, min(columns, count), exponent, mantissa - unused)
    return _written(patterns << unused, dtype)


def _return(content: Bytes, dtype: str, best: int) -> bool:
    """Whether words seem to return so often that LZMA2 takes less than `best` bytes.

    Such are weights that were of 4 bits, or have been rounded in every row, tables of sines, and repeated rows.
    """
    if not content.size or best * 32 < content.size:
        return content.size > 0
    start = max(0, (content.size - _SAMPLE) // 2) // 8 * 8
    sample = content[start : start + _SAMPLE]
    quick = lzma.compress(sample.tobytes(), lzma.FORMAT_RAW, filters=_words(dtype, preset=0))
    return bool(len(quick) * content.size < 1.01 * best * sample.size)


def _words(dtype: str, preset: int = 6) -> list[dict[str, int]]:
    """LZMA2's settings for words of this size."""
    bits = max(0, BITS[dtype].bit_length() - 4)
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "lc": min(2, 4 - bits), "lp": bits, "pb": bits}]


def _palette(
    patterns: npt.NDArray[np.int64], palette: npt.NDArray[np.int64], dtype: str, columns: int, width: int
) -> bytes:
    """The different values, then the place of each value among them, around the most frequent one."""
    places = np.searchsorted(palette, patterns)
    center = int(np.bincount(places).argmax())
    return (
        struct.pack("<HH", len(palette), center)
        + palette.astype(_entry(dtype)).tobytes()
        + scaled_integers.encode(places - center, min(columns, len(places)), width)
    )


def _palette_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    count = size * 8 // BITS[dtype]
    length, center = struct.unpack_from("<HH", coded)
    palette = np.frombuffer(coded, _entry(dtype), length, 4)
    places = scaled_integers.decode(coded[4 + palette.nbytes :], count, min(columns, count)).astype(np.int64) + center
    if count and not 0 <= places.min() <= places.max() < length:
        raise ValueError("a place outside the palette")
    return _written(palette.astype(np.int64)[places], dtype)


def _entry(dtype: str) -> str:
    return "<u8" if BITS[dtype] == 64 else "<u4"


def _patterns(content: Bytes, dtype: str) -> npt.NDArray[np.int64]:
    return content.view(f"<u{BITS[dtype] // 8}").astype(np.int64)


def _written(patterns: npt.NDArray[np.int64], dtype: str) -> bytes:
    if len(patterns) and BITS[dtype] < 64 and not 0 <= patterns.min() <= patterns.max() < 1 << BITS[dtype]:
        raise ValueError(f"a value outside {dtype}")
    return patterns.astype(f"<u{BITS[dtype] // 8}").tobytes()


def _joined(coded: entropy.Coded) -> bytes:
    state, words, plain = coded
    return _HEAD.pack(state, len(words), len(plain)) + words.astype("<u2").tobytes() + plain.tobytes()


def _split(coded: bytes, start: int = 0) -> entropy.Coded:
    state, words, plain = _HEAD.unpack_from(coded, start)
    start += _HEAD.size
    if len(coded) != start + 2 * words + plain:
        raise ValueError("a chunk that ends too early or too late")
    listed = np.frombuffer(coded, "<u2", words, start).astype(np.uint16)
    return state, listed, np.frombuffer(coded, np.uint8, plain, start + 2 * words)


def _xz_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    return _unpressed(coded, XZ, size)


def _words_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    return _unpressed(coded, _words(dtype), size)


def _unpressed(coded: bytes, filters: list[dict[str, int]], size: int) -> bytes:
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(coded, size)
    except lzma.LZMAError as error:
        raise ValueError(f"damaged bytes: {error}") from None


def _grids_back(coded: bytes, dtype: str, columns: int, size: int) -> bytes:
    if dtype != "f32":
        raise ValueError(f"a grid of {dtype}")
    return bytes(grids.decode(coded, size // 4, min(columns, size // 4)).astype("<f4").tobytes())


_CODINGS: dict[str, Callable[[bytes, str, int, int], bytes]] = {
    "raw": lambda coded, dtype, columns, size: coded,
    "integers": _integers_back,
    "floats": _floats_back,
    "palette": _palette_back,
    "grids": _grids_back,
    "xz": _xz_back,
    "words": _words_back,
}


def split(count: int, columns: int, values: int | None = None) -> Iterator[tuple[int, int]]:
    """First and number of the values of every chunk of a tensor: whole rows where these are short.

    Args:
        count: Values of the tensor.
        columns: Values of one row.
        values: Of a chunk, at most; None takes `VALUES`.
    """
    values = values or VALUES
    rows = values // columns // 2 * 2  # an even number of values, of which two may share a byte
    step = rows * columns or values
    for first in range(0, count, step):
        yield first, min(step, count - first)


__all__ = ["VALUES", "XZ", "decode", "encode", "split"]
