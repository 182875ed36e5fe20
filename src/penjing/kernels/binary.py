"""Binary layers: products of signs are counted as the bits in which two words agree.

Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV 2016. For two
vectors of C signs, packed as bits, Σ a·b = C − 2·popcount(a xor b).

A bit is 1 for +1. Channels lie in bytes so that packing needs no horizontal operations: of B bytes of a pixel, bit i of
byte b is channel i·B + b, and bits behind the last channel are 0 in inputs and weights, so that they count nothing.

**Padding.** A padded pixel has no sign. With `padding="zeros"`, what a convolution of zeros gives is computed exactly:
padded words are 0, which counts as −1 everywhere, and the number of 1s of the weights that lie on padding is taken back
through a table with a row for every distinct border. With `padding="minus"` padding is −1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from penjing.errors import ArtifactError
from penjing.kernels import building, c_source, threads
from penjing.kernels.instruction_sets import InstructionSet, here

MOST_PIXELS, MOST_VECTORS = 4, 4  # of a tile of accumulators
LINE = 64  # bytes at whose multiples arrays begin
SHARED_WORD = 16  # bits of a word of a kernel that shapes share


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """The shape of a binary convolution in two dimensions, NHWC; and of a matrix product, which is one of 1×1.

    Attributes:
        batch: Samples.
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        channels: Of the input.
        filters: Channels of the output.
        kernel: Height and width of the window.
        stride: Down and right.
        pad: Padding at the top and bottom, and left and right.
        dilation: Distance of taps, down and right.
    """

    height: int
    width: int
    channels: int
    filters: int
    batch: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        sizes = (self.batch, self.height, self.width, self.channels, self.filters, *self.kernel, *self.stride)
        padded = (self.height + 2 * self.pad[0]) * (self.width + 2 * self.pad[1])
        most = self.batch * padded * max(self.channels, self.filters)  # indices are 32 bits wide
        positive = min(*sizes, *self.dilation) >= 1 and min(self.pad) >= 0
        if not positive or min(self.outputs) < 1 or most >= 2**31:
            raise ArtifactError(
                "a binary convolution has no such shape",
                code="shape",
                got=str(self),
                expected="positive sizes, a window that fits into the padded input, and fewer than 2³¹ values",
            )

    @property
    def outputs(self) -> tuple[int, int]:
        """Height and width of the output."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        padded = (self.height + 2 * self.pad[0], self.width + 2 * self.pad[1])
        down, right = ((n - s) // t + 1 for n, s, t in zip(padded, spans, self.stride, strict=True))
        return down, right


@dataclass(frozen=True)
class Layout:
    """How a convolution lies in the memory of an instruction set.

    Attributes:
        word: Bits of a word.
        words: Words of a pixel.
        pixels: Pixels of a tile.
        vectors: Vectors of filters of a tile.
        lanes: Filters of a vector.
        tiles: Tiles of filters.
        ordered: Whether the channels of a word are neighbours.
    """

    word: int
    words: int
    pixels: int
    vectors: int
    lanes: int
    tiles: int
    ordered: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of a pixel."""
        return self.word // 8 * self.words

    @property
    def filters(self) -> int:
        """Filters with those that pad the last tile."""
        return self.tiles * self.vectors * self.lanes


def layout(shape: Convolution, instructions: InstructionSet) -> Layout:
    """Return the layout of a convolution."""
    word = instructions.word(shape.channels)
    words = -(-shape.channels // word)
    if word == 8 and words > 8:  # a multiple of 8 bytes, which is divided into runs that a byte can count
        words = -(-words // 8) * 8
    lanes = min(instructions.register_bits // word, 1 << (shape.filters - 1).bit_length())
    if not instructions.triple:
        lanes = 1
    groups = -(-shape.filters // lanes)
    most = MOST_VECTORS if instructions.registers >= 32 else 2
    vectors = next(n for n in range(min(most, groups), 0, -1) if groups % n == 0) if instructions.triple else 1
    pixels = min(MOST_PIXELS if instructions.registers >= 32 else 2, shape.outputs[1])
    return Layout(word, words, pixels, vectors, lanes, groups // vectors)


def shared_layout(shape: Convolution, instructions: InstructionSet) -> Layout | None:
    """Return the layout of a kernel that reads sizes from memory (`shared_programs`); None if the shape has none."""
    even = shape.channels % SHARED_WORD == 0 and shape.filters % SHARED_WORD == 0 and shape.dilation[1] == 1
    bits = math.prod(shape.kernel) * shape.channels
    if not (even and bits < 2**SHARED_WORD and {SHARED_WORD} < set(instructions.words) and instructions.triple):
        return None
    groups, most = shape.filters // SHARED_WORD, instructions.register_bits // SHARED_WORD
    lanes = most if groups % (most // SHARED_WORD) == 0 else SHARED_WORD
    pixels = min(MOST_PIXELS, shape.outputs[1])
    return Layout(SHARED_WORD, shape.channels // SHARED_WORD, pixels, 1, lanes, shape.filters // lanes, ordered=True)


def packed(signs: np.ndarray, width: int, ordered: bool = False) -> np.ndarray:
    """Pack signs into bytes.

    Args:
        signs: (…, channels) bool.
        width: Bytes of the result, at least channels / 8.
        ordered: Whether channels keep their order.

    Returns:
        (…, width) uint8; bit i of byte b is channel i·width + b, or 8·b + i if they are ordered.
    """
    padded = np.zeros((*signs.shape[:-1], 8 * width), np.uint8)
    padded[..., : signs.shape[-1]] = signs
    if ordered:
        return np.packbits(padded, axis=-1, bitorder="little")
    bits = padded.reshape(*signs.shape[:-1], 8, width)
    return np.asarray((bits << np.arange(8, dtype=np.uint8)[:, None]).sum(-2, dtype=np.uint8))


def packed_weights(signs: np.ndarray, shape: Convolution, lay: Layout) -> np.ndarray:
    """Lay out the signs of weights, (filters, kernel height, kernel width, channels) bool.

    Returns:
        (tiles, kernel height, kernel width, words, vectors, lanes) unsigned integers of a word.
    """
    words = packed(signs, lay.bytes, lay.ordered).view(f"<u{lay.word // 8}")
    every = np.zeros((lay.filters, *words.shape[1:]), words.dtype)
    every[: len(words)] = words
    tiles = every.reshape(lay.tiles, lay.vectors, lay.lanes, *words.shape[1:]).transpose(0, 3, 4, 5, 1, 2)
    out = threads.aligned(tiles.shape, words.dtype)
    out[:] = tiles
    return out


def bases(
    signs: np.ndarray, shape: Convolution, lay: Layout, padding: Literal["zeros", "minus"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is added to −2·popcount, by which taps of a window lie on padding.

    Returns:
        A table (borders, filters) int32, and for every row and every column of the output (int32) numbers whose sum is
        a row of the table.
    """
    taps = signs.sum(-1, dtype=np.int64)  # 1s of every tap, (filters, kernel height, kernel width)
    (rows, of_row), (columns, of_column) = _borders(shape, padding)
    table = threads.aligned((len(rows) * len(columns), lay.filters), np.int32)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            real = row[:, None] & column[None, :]
            table[r * len(columns) + c, : len(taps)] = shape.channels * real.sum() + 2 * (taps * ~real).sum((1, 2))
    return table, (of_row.reshape(-1) * len(columns)).astype(np.int32), of_column.reshape(-1).astype(np.int32)


def distinct_borders(shape: Convolution) -> int:
    """Return how many rows the table of `bases` has for a padding of zeros."""
    (rows, _), (columns, _) = _borders(shape, "zeros")
    return len(rows) * len(columns)


def table_places(shape: Convolution, lay: Layout) -> tuple[int, int, int]:
    """The places of a layer's tables behind the first one, and their end, in bytes."""
    numbers = (lay.filters * distinct_borders(shape), *shape.outputs)
    rows, columns, end = np.cumsum([-(-4 * n // LINE) * LINE for n in numbers]).tolist()
    return rows, columns, end


def _borders(shape: Convolution, padding: Literal["zeros", "minus"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For both axes, which taps can lie inside, (distinct, kernel) bool, and which of these a row or column has."""
    axes = []
    for axis, size in enumerate((shape.height, shape.width)):
        at = np.arange(shape.outputs[axis])[:, None] * shape.stride[axis] - shape.pad[axis]
        at = at + np.arange(shape.kernel[axis]) * shape.dilation[axis]
        inside = ((at >= 0) & (at < size)) | (padding == "minus")
        distinct, which = np.unique(inside, axis=0, return_inverse=True)
        axes.append((distinct, which))
    return axes


def functions(
    shape: Convolution, instructions: InstructionSet, names: Sequence[str] = ("binary_pack", "binary_conv")
) -> tuple[building.Function, building.Function]:
    """Return the two kernels: packing an input, and convolving what is packed."""
    lay = layout(shape, instructions)
    word = f"uint{lay.word}_t"
    pack_pointers = ("const float *", "const float *", "uint8_t *")
    pointers = (
        f"const {word} *", f"const {word} *", *("const int32_t *",) * 3, *("const float *",) * 2, "float *",
    )  # fmt: skip
    if not instructions.triple:
        return (
            building.Function(names[0], pack_pointers, lambda: c_source.pack(shape, lay, names[0])),
            building.Function(names[1], pointers, lambda: c_source.convolution(shape, lay, names[1])),
        )
    from penjing.kernels import binary_programs as programs

    return (
        building.Function(names[0], pack_pointers, lambda: programs.pack(shape, lay)),
        building.Function(names[1], pointers, lambda: programs.convolution(shape, lay)),
    )


def shared_function(lay: Layout, name: str) -> building.Function:
    """Return the convolution that shapes share; its pointers are those of `shared_programs.convolution`."""
    from penjing.kernels import shared_programs as programs

    integers, floats = ("const int32_t *",) * 3, ("const float *",) * 2
    pointers = (*("const uint16_t *",) * 2, *integers, *floats, "float *", "const int64_t *")
    return building.Function(name, pointers, lambda: programs.convolution(lay))


class BinaryConvolution:
    """A binary convolution with its weights, ready to run: ``y = scale·Σ sign(x − threshold)·sign(w) + shift``.

    Attributes:
        shape: Its shape.
        layout: How it lies in memory.
        weights: The packed weights: one bit for each, and what pads the last word and tile.
    """

    def __init__(
        self, shape: Convolution, signs: np.ndarray, scale: np.ndarray | None = None, shift: np.ndarray | None = None,
        threshold: np.ndarray | None = None, *, padding: Literal["zeros", "minus"] = "zeros",
        instructions: InstructionSet | None = None,
    ) -> None:  # fmt: skip
        """Generate the kernels, or take them from the cache.

        Args:
            shape: Its shape.
            signs: (filters, kernel height, kernel width, channels) bool, or numbers of which those ≥ 0 are +1.
            scale: (filters,) float32; ones if None.
            shift: (filters,) float32; zeros if None.
            threshold: (channels,) float32; an input is +1 where x ≥ threshold; zeros if None.
            padding: What padded pixels are: "zeros" is exact, "minus" is −1.
            instructions: What to generate for; this processor's if None.

        Raises:
            ArtifactError: The weights, or the numbers of a channel, have another shape.
            MissingDependency: TVM or a C compiler is missing.
        """
        threads.check_shape("the weights", signs.shape, (shape.filters, *shape.kernel, shape.channels))
        positive = signs if signs.dtype == bool else signs >= 0
        instructions = instructions or here()
        self.shape, self.layout = shape, layout(shape, instructions)
        self.weights = packed_weights(positive, shape, self.layout)
        self.table, self.rows, self.columns = bases(positive, shape, self.layout, padding)
        self.scale = _filled(self.layout.filters, scale, 1.0, "scale", shape.filters)
        self.shift = _filled(self.layout.filters, shift, 0.0, "shift", shape.filters)
        self.threshold = _filled(8 * self.layout.bytes, threshold, 0.0, "threshold", shape.channels)
        self.library = building.load(building.library(functions(shape, instructions), str(shape), instructions))
        down, right = shape.outputs
        height, width = (n + 2 * p for n, p in zip((shape.height, shape.width), shape.pad, strict=True))
        self.inputs = threads.aligned((shape.batch, shape.height, shape.width, shape.channels), np.float32)
        self.bits = threads.aligned((shape.batch, height, width, self.layout.bytes), np.uint8)
        self.outputs = threads.aligned((shape.batch, down, right, self.layout.filters), np.float32)
        self._packing = threads.addresses(self.inputs, self.threshold, self.bits)
        self._convolving = threads.addresses(
            self.bits, self.weights, self.table, self.rows, self.columns, self.scale, self.shift, self.outputs
        )

    def pack(self, x: np.ndarray, threads_: int = 1) -> None:
        """Pack an input, (batch, height, width, channels) float32, into `bits`.

        Raises:
            ArtifactError: It has another shape.
        """
        threads.check_shape("the input", x.shape, self.inputs.shape)
        self.inputs[:] = x
        rows = self.shape.batch * self.shape.height
        threads.run(self.library, "binary_pack", self._packing, rows, threads_)

    def convolve(self, threads_: int = 1) -> np.ndarray:
        """Convolve `bits`; returns (batch, height, width, filters) float32, which the next call overwrites."""
        rows = self.shape.batch * self.shape.outputs[0]
        threads.run(self.library, "binary_conv", self._convolving, rows, threads_)
        return self.outputs[..., : self.shape.filters]

    def __call__(self, x: np.ndarray, threads_: int = 1) -> np.ndarray:
        """Return the outputs of an input, both NHWC float32; the next call overwrites them."""
        self.pack(x, threads_)
        return self.convolve(threads_)


class BinaryProduct:
    """A binary matrix product with its weights: ``y = scale·(sign(x)·sign(w)ᵀ) + shift``, a convolution of 1×1."""

    ROW = 8  # rows of x that are the pixels of one row of an image

    def __init__(
        self, rows: int, signs: np.ndarray, scale: np.ndarray | None = None, shift: np.ndarray | None = None,
        threshold: np.ndarray | None = None, *, instructions: InstructionSet | None = None,
    ) -> None:  # fmt: skip
        """Generate the kernel for x of (rows, channels) and weights of (filters, channels), see `BinaryConvolution`."""
        filters, channels = signs.shape if signs.ndim == 2 else (0, 0)
        width = min(self.ROW, rows)
        shape = Convolution(height=-(-rows // width), width=width, channels=channels, filters=filters, kernel=(1, 1))
        self.rows = rows
        self.convolution = BinaryConvolution(
            shape, signs[:, None, None], scale, shift, threshold, instructions=instructions
        )

    def __call__(self, x: np.ndarray, threads_: int = 1) -> np.ndarray:
        """Return (rows, filters) float32 of x, (rows, channels) float32; the next call overwrites it."""
        inner, shape = self.convolution, self.convolution.shape
        threads.check_shape("the input", x.shape, (self.rows, shape.channels))
        inner.inputs.reshape(-1, shape.channels)[: self.rows] = x
        threads.run(inner.library, "binary_pack", inner._packing, shape.height, threads_)
        inner.convolve(threads_)
        return inner.outputs.reshape(-1, inner.layout.filters)[: self.rows, : shape.filters]


def _filled(size: int, values: np.ndarray | None, default: float, name: str, count: int) -> np.ndarray:
    """`count` values, and the default behind them."""
    out = threads.aligned((size,), np.float32)
    out[:] = default
    if values is not None:
        threads.check_shape(name, np.shape(values), (count,))
        out[:count] = values
    return out


def chunks(shape: Convolution, lay: Layout) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """How the loops over window and words are divided so that the inner ones can't overflow a word's count.

    Returns:
        Extents of the outer loops (down, right, words) and of the inner ones.
    """
    limit = (2**lay.word - 1) // lay.word
    (down, right), words = shape.kernel, lay.words
    if down * right * words <= limit:
        return (1, 1, 1), (down, right, words)
    if right * words <= limit:
        return (down, 1, 1), (1, right, words)
    run = next(n for n in range(min(limit, words), 0, -1) if words % n == 0)
    return (down, right, words // run), (1, 1, run)


__all__ = [
    "BinaryConvolution", "BinaryProduct", "Convolution", "Layout", "bases", "distinct_borders", "functions", "layout",
    "packed", "packed_weights", "shared_function", "shared_layout", "table_places",
]  # fmt: skip
