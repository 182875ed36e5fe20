"""A network as one shared library: generated kernels, plain C around them, and the weights.

The library exports C functions, and needs nothing but the C library:

- ``int64_t penjing_bytes(void)``: so many bytes of memory it works in;
- ``void penjing_prepare(char *memory)``: called once, with that memory: zeros, at an address that is a multiple of 64;
- ``void penjing_network(const float *in, float *out, char *memory, int32_t samples)``: samples of (channels, height,
  width), one after the other;
- ``void penjing_threads(int32_t count)``, of libraries with large layers: that many threads share their rows from the
  next call on, 1 before.

A binary weight takes one bit in the file and is read where it lies. Other numbers take 32 or 16 bits there, or 8 if
they are weights that are whole multiples of a step, and 32 in memory.

**Opening a library runs its code.** `penjing.runtimes.kernels` makes artifacts of libraries, and opens those alone that
it wrote itself or that the user trusts.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Literal

from penjing.kernels import building, c_source
from penjing.kernels.instruction_sets import InstructionSet, here
from penjing.kernels.library_source import Writer
from penjing.kernels.network import Described

LEVELS = ("binary", "ternary")  # kinds of operations whose weights are packed
_SMALL = (
    "-s", "-nostartfiles", "-fvisibility=hidden", "-ffunction-sections", "-fno-asynchronous-unwind-tables",
    "-fno-ident", "-Wl,--build-id=none,--as-needed,--gc-sections,-z,noseparate-code,-z,norelro",
)  # fmt: skip
"""Flags of a library without names and what starts programs, whose bytes are the same when it is built again."""
_SHORT = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")
"""Flags of the C that surrounds generated kernels: vectors as at -O3, and no further copies of loops."""


def write(
    network: Described, path: Path, instructions: InstructionSet | None = None, *, float_bits: Literal[16, 32] = 32
) -> dict[str, str]:
    """Write the library of a network of one image, or vector, in and one tensor out.

    Args:
        network: Of `penjing.kernels.network.described`.
        path: The file.
        instructions: What to generate for; this processor's if None.
        float_bits: In which the numbers of layers that are not binary are stored; they are computed in 32. Rounding
            moves values across thresholds, which changes signs behind them.

    Returns:
        Site of a layer or an addition → how it is computed: "binary" (bits are counted), "ternary" (weights of two
        bits, inputs in floating point) or "fp32".

    Raises:
        ArtifactError: The C compiler failed.
        MissingDependency: TVM or a C compiler is missing.
    """
    instructions = instructions or here()
    writer = Writer(network, instructions, float_bits)
    body = writer.body()
    with tempfile.TemporaryDirectory() as scratch:
        data, exported = Path(scratch) / "data.bin", Path(scratch) / "exported.map"
        data.write_bytes(writer.file())
        exported.write_text("{ global: penjing_*; local: *; };\n")
        first = "#define _GNU_SOURCE\n" if writer.pooled else ""  # before anything is included
        source = first + c_source.HEAD + c_source.included(data) + c_source.LAYERS + body
        # Plain C is all that there is without a triple; with one, what surrounds the generated kernels is kept short.
        flags = (*_SMALL, *(_SHORT if instructions.triple else ()), f"-Wl,--version-script={exported}")
        built = building.link(writer.functions, instructions, Path(scratch), [source], flags)
        path.write_bytes(without_sections(built.read_bytes()))
    return {o.site: o.kind if o.kind in LEVELS else "fp32" for o in network.operations if o.site}


def without_sections(library: bytes) -> bytes:
    """Return an ELF library of 64 bits without its table of sections; others as given.

    Linkers and debuggers read that table. What loads a library reads that of segments alone.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        return library
    (first,), (size, count) = struct.unpack_from("<Q", library, 32), struct.unpack_from("<HH", library, 54)
    segments = (struct.unpack_from("<IIQQQQ", library, first + size * i) for i in range(count))
    end = max(offset + length for _, _, offset, _, _, length in segments)
    header = bytearray(library[:64])
    struct.pack_into("<Q", header, 40, 0)
    struct.pack_into("<HHH", header, 58, 0, 0, 0)
    return bytes(header) + library[64:end]


__all__ = ["LEVELS", "without_sections", "write"]
