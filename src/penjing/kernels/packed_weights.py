"""Products of packed weights and a float vector: y = W·x with weights of 4 or 2 bits and a scale for every group.

At batch 1 the time of such a product is that of reading the weights; 4 bits are an eighth of fp32. An integer is
``w = scale·(q − 2^(bits − 1))``, with q from 0 to 2^bits − 1.

A lane is an output, and a word of 32 bits holds the q of as many neighbouring inputs as fit. Bits are not shifted to
the right: q·2^(bits·k) is converted where it stands, exactly, and x is multiplied beforehand by 2^(−bits·k).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.errors import ArtifactError
from penjing.kernels import building, c_source, threads
from penjing.kernels.instruction_sets import InstructionSet, here

WORD = 32


@dataclass(frozen=True, kw_only=True)
class Product:
    """The shape of a product of packed weights.

    Attributes:
        outputs: Rows of the weights.
        inputs: Columns of the weights.
        bits: Of a weight, 4 or 2.
        group: Neighbouring inputs whose weights share a scale; a multiple of 32 / bits that divides `inputs`.
    """

    outputs: int
    inputs: int
    bits: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        fits = self.bits in (2, 4) and self.group >= 1 and self.group % self.per_word == 0
        if not fits or min(self.outputs, self.inputs) < 1 or self.inputs % self.group:
            raise ArtifactError(
                "no packed product has this shape",
                code="shape",
                got=str(self),
                expected="4 or 2 bits, and groups of a multiple of 32 / bits inputs that divide the inputs",
            )

    @property
    def per_word(self) -> int:
        """Weights of a word."""
        return WORD // self.bits


@dataclass(frozen=True)
class Tiles:
    """Outputs in the memory of an instruction set: tiles of vectors of lanes."""

    tiles: int
    vectors: int
    lanes: int

    @property
    def outputs(self) -> int:
        """Outputs with those that pad the last tile."""
        return self.tiles * self.vectors * self.lanes


def tiles(shape: Product, instructions: InstructionSet) -> Tiles:
    """Return how the outputs are divided."""
    lanes = instructions.register_bits // WORD if instructions.triple else 1
    vectors = min(8 if instructions.registers >= 32 else 4, -(-shape.outputs // lanes)) if instructions.triple else 1
    return Tiles(-(-shape.outputs // (lanes * vectors)), vectors, lanes)


def rounded(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Round weights to the nearest integers.

    Args:
        weights: (outputs, inputs) float32, finite.
        bits: Of an integer.
        group: Neighbouring inputs that share a scale; divides the inputs.

    Returns:
        q from 0 to 2^bits − 1, (outputs, inputs) uint8, and scales, (outputs, inputs / group) float32. The largest
        magnitude of a group is its lowest or highest integer.

    Raises:
        ArtifactError: The groups do not divide the inputs, or a weight is infinite or not a number.
    """
    if weights.ndim != 2 or group < 1 or weights.shape[1] % group or not np.isfinite(weights).all():
        raise ArtifactError(
            "these weights can't be rounded", code="weights", got=f"{weights.shape} in groups of {group}",
            expected="finite weights, (outputs, inputs), and groups that divide the inputs",
        )  # fmt: skip
    blocks = weights.reshape(len(weights), -1, group)
    half = 2 ** (bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = (extreme / -half).astype(np.float32)
    scales[scales == 0] = 1  # of zeros, or of numbers so small that a step would be 0
    q = np.clip(np.rint(blocks / scales) + half, 0, 2**bits - 1).astype(np.uint8)
    return q.reshape(weights.shape), scales[..., 0]


def function(shape: Product, instructions: InstructionSet) -> building.Function:
    """Return the kernel: rows are tiles of outputs."""
    lay = tiles(shape, instructions)
    pointers = ("const float *", "const float *", "const int32_t *", "const float *", "float *")
    if not instructions.triple:
        return building.Function("packed_product", pointers, lambda: c_source.packed_product(shape))
    from penjing.kernels import packed_programs as programs

    return building.Function("packed_product", pointers, lambda: programs.product(shape, lay))


class PackedProduct:
    """A product with its packed weights, ready to run.

    Attributes:
        shape: Its shape.
        weights: The packed weights, (tiles, words, vectors, lanes) int32.
        scales: (tiles, groups, vectors, lanes) float32.
    """

    def __init__(
        self, shape: Product, q: np.ndarray, scales: np.ndarray, *, instructions: InstructionSet | None = None
    ) -> None:
        """Generate the kernel, or take it from the cache.

        Args:
            shape: Its shape.
            q: (outputs, inputs) integers from 0 to 2^bits − 1.
            scales: (outputs, inputs / group) float32.
            instructions: What to generate for; this processor's if None.

        Raises:
            ArtifactError: The weights have another shape, or are out of range.
            MissingDependency: TVM or a C compiler is missing.
        """
        groups = shape.inputs // shape.group
        threads.check_shape("the array of integers", q.shape, (shape.outputs, shape.inputs))
        threads.check_shape("the array of scales", scales.shape, (shape.outputs, groups))
        if not np.issubdtype(q.dtype, np.integer):
            raise ArtifactError("the packed weights are not integers", code="range", got=str(q.dtype), expected="uint8")
        if not 0 <= int(q.min()) <= int(q.max()) < 2**shape.bits:
            raise ArtifactError(
                "a weight is not an integer of its bits", code="range", got=f"{q.min()} to {q.max()}",
                expected=f"0 to {2**shape.bits - 1}",
            )  # fmt: skip
        instructions = instructions or here()
        self.shape, self.lay = shape, tiles(shape, instructions)
        words = q.reshape(shape.outputs, -1, shape.per_word).astype(np.uint32)
        shifts = np.arange(shape.per_word, dtype=np.uint32) * np.uint32(shape.bits)
        self.weights = self._laid_out((words << shifts).sum(-1, dtype=np.uint32).view(np.int32))
        self.scales = self._laid_out(scales.astype(np.float32))
        self.library = building.load(
            building.library([function(shape, instructions)], f"{shape} {self.lay}", instructions)
        )
        # Of the last weight of a word, bits are shifted to the right: its highest one would be a sign.
        powers = shape.bits * np.arange(shape.per_word)
        powers[-1] = 0
        self.factors = np.tile(np.ldexp(np.float32(1), -powers), shape.inputs // shape.per_word)
        self.x = threads.aligned((shape.inputs,), np.float32)
        self.sums = threads.aligned((groups,), np.float32)
        self.y = threads.aligned((self.lay.outputs,), np.float32)
        self._given = threads.addresses(self.x, self.sums, self.weights, self.scales, self.y)

    def _laid_out(self, rows: np.ndarray) -> np.ndarray:
        """(outputs, n) as (tiles, n, vectors, lanes)."""
        every = np.zeros((self.lay.outputs, rows.shape[1]), rows.dtype)
        every[: len(rows)] = rows
        out = threads.aligned((self.lay.tiles, rows.shape[1], self.lay.vectors, self.lay.lanes), rows.dtype)
        out[:] = every.reshape(self.lay.tiles, self.lay.vectors, self.lay.lanes, -1).transpose(0, 3, 1, 2)
        return out

    def __call__(self, x: np.ndarray, threads_: int = 1) -> np.ndarray:
        """Return W·x, (outputs,) float32, of x, (inputs,) float32; the next call overwrites it."""
        threads.check_shape("the input", x.shape, self.x.shape)
        np.multiply(x, self.factors, out=self.x)
        half = 2 ** (self.shape.bits - 1)
        np.multiply(x.reshape(-1, self.shape.group).sum(1), -half, out=self.sums)
        threads.run(self.library, "packed_product", self._given, self.lay.tiles, threads_)
        return self.y[: self.shape.outputs]


__all__ = ["PackedProduct", "Product", "Tiles", "function", "rounded", "tiles"]
