"""Codebooks as palettes of a Core ML package: `constexpr_lut_to_dense` in the place of the dense weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.numerics.codebooks import LookedUp, Table

NAME = "penjing::palettes"
"""The pass, in a pipeline of coremltools."""
KEPT_APART = {"common::fuse_conv_batchnorm", "common::fuse_conv_scale"}
"""Passes that would multiply the weights of a convolution, so that they have no few values any more."""
_BITS = (1, 2, 3, 4, 6, 8)  # of an index
_SMALLER = 0.5  # of the dense weight: a palette that takes more is not worth it


@dataclass(frozen=True)
class Palette:
    """One table of a tensor as a package stores it.

    Attributes:
        values: The tensor, float32.
        indices: The index of every value, or of every vector along the last axis.
        lut: (…, entries, dimension): as many axes as the tensor, each 1 or the number of its parts, before these two.
        bits: Of an index.
    """

    values: npt.NDArray[np.float32]
    indices: npt.NDArray[np.uint8]
    lut: npt.NDArray[np.float32]
    bits: int

    @property
    def size_bytes(self) -> float:
        """In float16."""
        return self.indices.size * self.bits / 8 + self.lut.size * 2


def palette(known: LookedUp) -> Palette | None:
    """The palette of a tensor, or None where a package has no form for it: a sum of codebooks, more than 256 entries,
    vectors that do not lie along the last axis, codebooks of parts that are not equal.
    """
    (table, *others) = known.tables
    shape, dimension = known.shape, table.entries.shape[1]
    if others or not shape or shape[-1] % dimension:
        return None
    parts = _parts(table, shape[0])
    if parts is None:
        return None
    entries, indices = parts
    bits = next((b for b in _BITS if 1 << b >= entries.shape[1]), None)
    if bits is None:
        return None
    full = np.zeros((len(entries), 1 << bits, dimension), np.float32)
    full[:, : entries.shape[1]] = entries
    lut = full.reshape(len(entries), *[1] * (len(shape) - 1), 1 << bits, dimension)
    places = indices.astype(np.uint8).reshape(*shape[:-1], shape[-1] // dimension)
    palette = Palette(known.values, places, lut, bits)
    return palette if palette.size_bytes < _SMALLER * 2 * known.values.size else None


def _parts(table: Table, rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
    """Entries (parts, most of a part, dimension) and the indices within each part's own; None for unequal parts."""
    starts = table.starts
    if starts is None or not starts.any():
        return table.entries[None], table.indices
    firsts, lengths = np.unique(starts, return_counts=True)
    if len(starts) != rows or len(set(lengths.tolist())) > 1 or not np.array_equal(np.sort(starts), starts):
        return None
    ends = [*firsts[1:].tolist(), len(table.entries)]
    most = max(end - first for first, end in zip(firsts.tolist(), ends, strict=True))
    entries = np.zeros((len(firsts), most, table.entries.shape[1]), np.float32)
    for part, (first, end) in enumerate(zip(firsts.tolist(), ends, strict=True)):
        entries[part, : end - first] = table.entries[first:end]
    return entries, table.indices - starts[:, None]


def arrays(codebooks: Mapping[str, LookedUp]) -> dict[str, npt.NDArray[Any]]:
    """The palettes of a network as arrays, to be written into a file."""
    stored: dict[str, npt.NDArray[Any]] = {}
    for known in codebooks.values():
        if (one := palette(known)) is not None:
            number = len(stored) // 4
            stored |= {f"values{number}": one.values, f"indices{number}": one.indices, f"lut{number}": one.lut}
            stored[f"bits{number}"] = np.array(one.bits)
    return stored


def register(stored: Mapping[str, npt.NDArray[Any]]) -> None:
    """Make coremltools know the pass that writes these palettes.

    Args:
        stored: What `arrays` gave.
    """
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    palettes = [
        Palette(
            stored[f"values{number}"], stored[f"indices{number}"], stored[f"lut{number}"], int(stored[f"bits{number}"])
        )
        for number in range(len(stored) // 4)
    ]

    class Palettes(AbstractGraphPass):  # type: ignore[misc]
        """Replaces constants."""

        def apply(self, prog: Any) -> None:
            """Replace those whose values are a palette's, in all functions."""
            for function in prog.functions.values():
                with function:
                    for operation in list(function.operations):
                        if operation.op_type == "const" and (one := _of(operation.outputs[0].val, palettes)):
                            _replace(operation, one)

    PASS_REGISTRY.passes.pop(NAME, None)
    PASS_REGISTRY.add("penjing", Palettes, True, "palettes")


def _of(value: Any, palettes: list[Palette]) -> Palette | None:
    """The palette whose tensor this is, in float32 or rounded to float16."""
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float16, np.float32):
        return None
    return next(
        (p for p in palettes if p.values.shape == value.shape and np.array_equal(p.values.astype(value.dtype), value)),
        None,
    )


def _replace(operation: Any, one: Palette) -> None:
    from coremltools.converters.mil.mil import Builder, types

    (old,) = operation.outputs
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{one.bits}"))
    axis = {"vector_axis": np.int32(one.indices.ndim - 1)} if one.lut.shape[-1] > 1 else {}
    new = Builder.constexpr_lut_to_dense(
        indices=one.indices.astype(kind),
        lut=one.lut.astype(old.val.dtype),
        before_op=operation,
        name=f"{old.name}_palettized",
        **axis,
    )
    block = operation.enclosing_block
    block.replace_uses_of_var_after_op(anchor_op=operation, old_var=old, new_var=new)
    block.remove_ops([operation])
