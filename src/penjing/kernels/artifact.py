"""A network as one shared library and its constants: the artifact of binary networks.

`write` leaves a folder with `network.so` (generated kernels and C, one function), `weights.bin` (binary weights take
one bit each, those of other layers 16), `manifest.json`, and `load.py`, which needs NumPy alone. One sample is computed
after the other, on one thread.

**Opening the artifact runs its code.** `load.py` compares the hashes of the library and the weights with the manifest's
before it loads them. That tells damage; who can replace the manifest can replace the code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import fx

from penjing.errors import ArtifactError
from penjing.kernels import binary, building, c_source
from penjing.kernels.binary import Convolution
from penjing.kernels.instruction_sets import InstructionSet, here
from penjing.kernels.network import Described, Operation, described

FORMAT = 1


def write(
    network: fx.GraphModule,
    input_shape: tuple[int, int, int],
    folder: Path,
    *,
    instructions: InstructionSet | None = None,
    float_bits: Literal[16, 32] = 16,
) -> Path:
    """Write the artifact of a network of one image in and one tensor out.

    Args:
        network: A captured network in floating point, such as `penjing.quantize.Binary` leaves it.
        input_shape: Channels, height, width of one sample.
        folder: Is created; files in it are replaced.
        instructions: What to generate for; this processor's if None.
        float_bits: In which the weights of layers that are not binary are stored; they are computed in 32. Rounding
            them moves values across thresholds, which changes signs behind them: judge the metric, not the outputs.

    Returns:
        The folder.

    Raises:
        ExportError: There is an operator that these kernels lack; the error names it.
        ArtifactError: The C compiler failed.
        MissingDependency: TVM or a C compiler is missing.
    """
    instructions = instructions or here()
    writer = _Writer(described(network, input_shape), instructions, float_bits)
    source = writer.source()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        small = (
            "-s",
            "-Wl,--build-id=none,-z,noseparate-code",
            "-fno-asynchronous-unwind-tables",
        )  # without names, and the same bytes again
        built = building.link(writer.functions, instructions, Path(scratch), [source], small)
        shutil.copyfile(built, folder / "network.so")
    (folder / "weights.bin").write_bytes(writer.file())
    names = ("network.so", "weights.bin")
    manifest: dict[str, Any] = {
        "format": FORMAT, "instructions": instructions.name, "machine": instructions.machine,
        "flags": sorted(instructions.flags), "input": list(input_shape), "output": writer.output(),
        "constants_bytes": writer.size, "arena_bytes": writer.arena, "sections": writer.sections,
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")) + "\n")
    (folder / "load.py").write_text(LOADER)
    return folder


class _Writer:
    """Lays out constants and values, and writes the C function that calls the kernels."""

    def __init__(self, network: Described, instructions: InstructionSet, float_bits: int) -> None:
        self.network, self.instructions, self.float_bits = network, instructions, float_bits
        self.size, self.arena = 0, 0
        self.sections: list[dict[str, Any]] = []  # what `load.py` makes constants from
        self.contents: list[bytes] = []  # of weights.bin, section by section
        self.functions: list[building.Function] = []
        self.named: dict[Any, str] = {}  # shape → number of its kernels
        self.places: dict[str, int] = {}
        self.lines: list[str] = []

    def source(self) -> str:
        """The C source of the function, which reads constants that `load.py` lays out."""
        fixed = {self.network.input: "in", self.network.output: "out"}
        last = {name: i for i, o in enumerate(self.network.operations) for name in o.inputs}
        free: list[tuple[int, int]] = []  # (bytes, place)
        for i, operation in enumerate(self.network.operations):
            self._place(operation.output, free)
            where = {
                n: fixed.get(n, f"(float *)(arena + {self.places.get(n)})")
                for n in (*operation.inputs, operation.output)
            }
            _WRITERS[operation.kind](self, operation, where)
            for name in {n for n in operation.inputs if last[n] == i and n not in fixed}:
                free.append((self._bytes(name), self.places[name]))
        values = {n: int(np.prod(self.network.shapes[n])) for n in (self.network.input, self.network.output)}
        declared = "\n".join(f"void {f.name}({', '.join(f.pointers)}, int32_t, int32_t);" for f in self.functions)
        body = "\n    ".join(self.lines)
        return (
            f"{c_source.LAYERS}\n{declared}\n"
            "void penjing_network(const float *in, float *out, const char *constants, char *arena, int32_t samples) {\n"
            f"  for (int32_t n = 0; n < samples; n++, in += {values[self.network.input]}, "
            f"out += {values[self.network.output]}) {{\n    {body}\n  }}\n}}\n"
        )

    def output(self) -> list[int]:
        """Channels, or channels, height, width of the output."""
        height, width, channels = self.network.shapes[self.network.output]
        return [channels] if height * width == 1 else [channels, height, width]

    def file(self) -> bytes:
        """The contents of weights.bin."""
        return b"".join(self.contents)

    def _bytes(self, name: str) -> int:
        return -(-int(np.prod(self.network.shapes[name])) * 4 // 64) * 64

    def _place(self, name: str, free: list[tuple[int, int]]) -> None:
        size = self._bytes(name)
        fitting = sorted(block for block in free if block[0] >= size)
        if fitting:
            free.remove(fitting[0])
            self.places[name] = fitting[0][1]
        else:
            self.places[name] = self._room(size)

    def _room(self, size: int) -> int:
        place, self.arena = self.arena, self.arena + -(-size // 64) * 64
        return place

    def _constant(self, array: np.ndarray, form: str, **more: Any) -> str:
        """Store an array in a form that `load.py` knows; returns the address in C."""
        stored = array.astype(np.float16) if form == "half" else array
        data = stored.tobytes() if form in ("raw", "half") else b""
        size = array.nbytes
        self.sections.append({"form": form, "place": self.size, "bytes": len(data), **more})
        self.contents.append(data)
        place, self.size = self.size, self.size + -(-size // 64) * 64
        return f"constants + {place}"

    def convolution(self, o: Operation, where: dict[str, str]) -> None:
        assert o.window is not None
        w = o.window
        numbers = o.arrays["weights"].transpose(1, 2, 3, 0).astype(np.float32)
        half = self.float_bits == 16 and np.abs(numbers).max() < np.finfo(np.float16).max
        weights = self._constant(numbers, "half" if half else "raw")
        scale, shift = (self._constant(o.arrays[name].astype(np.float32), "raw") for name in ("scale", "shift"))
        sizes = (w.height, w.width, w.channels, *w.outputs, w.filters, *w.kernel, *w.stride, *w.pad, *w.dilation)
        pointers = ", ".join(f"(const float *)({p})" for p in (weights, scale, shift))
        self.lines.append(
            f"convolve({where[o.inputs[0]]}, {pointers}, {where[o.output]}, {', '.join(map(str, sizes))});"
        )

    def binary(self, o: Operation, where: dict[str, str]) -> None:
        assert o.window is not None
        shape, lay = o.window, binary.layout(o.window, self.instructions)
        packing, convolving = self._kernels(shape)
        arrays = o.arrays
        table, rows, columns = binary.bases(arrays["weights"], shape, lay, "zeros")
        words = binary.packed_weights(arrays["weights"], shape, lay)
        weights = self._constant(words, "raw")
        of = len(self.sections) - 1
        told = {"height": shape.height, "width": shape.width, "channels": shape.channels, "kernel": shape.kernel}
        told |= {"stride": shape.stride, "pad": shape.pad, "dilation": shape.dilation, "outputs": shape.outputs}
        told |= {"tiles": [lay.tiles, lay.words, lay.vectors, lay.lanes], "word": lay.word, "filters": shape.filters}
        addresses = [self._constant(table, "table", of=of, shape=told)]
        addresses += [self._constant(part, name, of=of + 1) for part, name in ((rows, "rows"), (columns, "columns"))]
        addresses += [self._constant(_padded(arrays[name], lay.filters), "raw") for name in ("scale", "shift")]
        threshold = self._constant(_padded(arrays["threshold"], 8 * lay.bytes), "raw")
        down, right = (n + 2 * p for n, p in zip((shape.height, shape.width), shape.pad, strict=True))
        bits = self._room(down * right * lay.bytes)  # not shared: its border stays 0
        target, pixels = where[o.output], int(np.prod(shape.outputs))
        if lay.filters != shape.filters:
            target = f"(float *)(arena + {self._room(pixels * lay.filters * 4)})"
        packed = f"(const float *)({threshold}), (uint8_t *)(arena + {bits})"
        self.lines.append(f"{packing}({where[o.inputs[0]]}, {packed}, 0, {shape.height});")
        kinds = ("int32_t", "int32_t", "int32_t", "float", "float")
        given = [f"(const uint{lay.word}_t *)(arena + {bits})", f"(const uint{lay.word}_t *)({weights})"]
        given += [f"(const {k} *)({a})" for k, a in zip(kinds, addresses, strict=True)]
        self.lines.append(f"{convolving}({', '.join(given)}, {target}, 0, {shape.outputs[0]});")
        if lay.filters != shape.filters:
            self.lines.append(f"drop({target}, {where[o.output]}, {pixels}, {lay.filters}, {shape.filters});")

    def _kernels(self, shape: Convolution) -> Sequence[str]:
        """Names of the kernels that pack and convolve this shape."""
        number = self.named.setdefault(shape, str(len(self.named)))
        names = [f"binary_pack_{number}", f"binary_conv_{number}"]
        if names[0] not in [f.name for f in self.functions]:
            for name, function in zip(names, binary.functions(shape, self.instructions, names), strict=True):
                self.functions.append(building.Function(name, function.pointers, function.program))
        return names

    def simple(self, o: Operation, where: dict[str, str]) -> None:
        height, width, channels = self.network.shapes[o.inputs[0]]
        sizes = {"average": f"{height * width}, {channels}"}.get(o.kind, str(height * width * channels))
        given = ", ".join(where[name] for name in (*o.inputs, o.output))
        self.lines.append(f"{o.kind}({given}, {sizes});")

    def maximum(self, o: Operation, where: dict[str, str]) -> None:
        assert o.window is not None
        w = o.window
        sizes = (w.height, w.width, w.channels, *w.outputs, *w.kernel, *w.stride, *w.pad, *w.dilation)
        self.lines.append(f"maximum({where[o.inputs[0]]}, {where[o.output]}, {', '.join(map(str, sizes))});")


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros(size, np.float32)
    out[: len(values)] = values
    return out


_WRITERS: dict[str, Callable[[_Writer, Operation, dict[str, str]], None]] = {
    "convolution": _Writer.convolution,
    "binary": _Writer.binary,
    "add": _Writer.simple,
    "relu": _Writer.simple,
    "average": _Writer.simple,
    "maximum": _Writer.maximum,
}


def open_artifact(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Open an artifact as its `load.py` does; returns what maps (batch, channels, height, width) to outputs.

    Raises:
        ArtifactError: A file is damaged, of another version, or for another processor.
    """
    scope: dict[str, Any] = {"__name__": "load", "__file__": str(folder / "load.py")}
    try:
        exec(compile(LOADER, "load.py", "exec"), scope)  # not the folder's own, which could be anything
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(
            "the artifact can't be opened", code="damaged", got=str(error)[:500], expected="what `write` left",
            remedy="write it again",
        ) from None  # fmt: skip
    predict: Callable[[np.ndarray], np.ndarray] = scope["predict"]
    return predict


LOADER = '''"""Opens the network beside it with NumPy alone: ``from load import predict``.

Loading network.so runs its code. Its hash, and that of the weights, are compared with the manifest's first.
"""
import ctypes
import hashlib
import json
import platform
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())


def check():
    """Raise RuntimeError unless the files are intact and this processor can run them."""
    if MANIFEST["format"] != 1:
        raise RuntimeError(f"format {MANIFEST['format']} of the artifact is not 1: take the load.py of its version")
    for name, expected in MANIFEST["sha256"].items():
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != expected:
            raise RuntimeError(f"{name} is damaged: its bytes are not those of the manifest")
    if MANIFEST["machine"] not in ("", platform.machine()):
        raise RuntimeError(f"the library is for {MANIFEST['machine']}, this is {platform.machine()}")
    if MANIFEST["flags"]:
        lines = [line for line in open("/proc/cpuinfo") if line.startswith("flags")]
        missing = set(MANIFEST["flags"]) - set(lines[0].split(":")[1].split() if lines else [])
        if missing:
            raise RuntimeError(f"this processor lacks {', '.join(sorted(missing))}: build the artifact for another")


def aligned(size):
    """So many bytes of zeros whose address is a multiple of 64."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size]


def table(words, told, part):
    """What a binary layer adds to its counts, by which taps of a window lie on padding; see penjing.kernels.binary."""
    inside = []
    for axis, size in enumerate((told["height"], told["width"])):
        at = np.arange(told["outputs"][axis])[:, None] * told["stride"][axis] - told["pad"][axis]
        at = at + np.arange(told["kernel"][axis]) * told["dilation"][axis]
        inside.append((at >= 0) & (at < size))
    rows, of_row = np.unique(inside[0], axis=0, return_inverse=True)
    columns, of_column = np.unique(inside[1], axis=0, return_inverse=True)
    if part != "table":
        return (of_row.reshape(-1) * len(columns) if part == "rows" else of_column.reshape(-1)).astype(np.int32)
    tiles, count, vectors, lanes = told["tiles"]
    bits = np.unpackbits(words).reshape(tiles, *told["kernel"], count, vectors * lanes, told["word"])
    taps = bits.sum((3, 5), dtype=np.int64).transpose(0, 3, 1, 2).reshape(-1, *told["kernel"])
    out = np.zeros((len(rows) * len(columns), len(taps)), np.int32)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            real = row[:, None] & column[None, :]
            out[r * len(columns) + c] = told["channels"] * real.sum() + 2 * (taps * ~real).sum((1, 2))
    out[:, told["filters"]:] = 0
    return out


def constants():
    """The constants of the library, as it expects them in memory."""
    data = np.fromfile(HERE / "weights.bin", np.uint8)
    out, start, parts = aligned(MANIFEST["constants_bytes"]), 0, []
    for section in MANIFEST["sections"]:
        part = data[start:start + section["bytes"]]
        parts.append(part)
        start += section["bytes"]
        if section["form"] == "half":
            part = part.view(np.float16).astype(np.float32)
        elif section["form"] == "table":
            part = table(parts[section["of"]], section["shape"], "table")
        elif section["form"] in ("rows", "columns"):
            part = table(None, MANIFEST["sections"][section["of"]]["shape"], section["form"])
        whole = np.ascontiguousarray(part).view(np.uint8).reshape(-1)
        out[section["place"]:section["place"] + whole.size] = whole
    return out


check()
CONSTANTS, ARENA = constants(), aligned(MANIFEST["arena_bytes"])
FUNCTION = ctypes.CDLL(str(HERE / "network.so")).penjing_network
FUNCTION.restype = None
FUNCTION.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int32]


def predict(x):
    """(batch, channels, height, width) float32 to (batch, …) float32; not for several threads at once."""
    x = np.asarray(x, np.float32)
    if x.ndim != 4 or list(x.shape[1:]) != MANIFEST["input"]:
        raise ValueError(f"predict takes (batch, {', '.join(map(str, MANIFEST['input']))}); got {x.shape}")
    pixels = aligned(x.size * 4).view(np.float32)
    pixels.reshape(len(x), x.shape[2], x.shape[3], x.shape[1])[:] = x.transpose(0, 2, 3, 1)
    shape = MANIFEST["output"]
    out = np.empty((len(x), *(shape if len(shape) == 1 else (*shape[1:], shape[0]))), np.float32)
    FUNCTION(pixels.ctypes.data, out.ctypes.data, CONSTANTS.ctypes.data, ARENA.ctypes.data, len(x))
    return out if len(shape) == 1 else np.ascontiguousarray(out.transpose(0, 3, 1, 2))


if __name__ == "__main__":
    print(predict(np.zeros((1, *MANIFEST["input"]), np.float32)).shape)
'''

__all__ = ["open_artifact", "write"]
