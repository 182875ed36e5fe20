"""The C source of a library of `penjing.kernels.library`, and the constants in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penjing.kernels import binary, building, c_source, ternary, threads
from penjing.kernels.binary import LINE, Convolution, Layout
from penjing.kernels.instruction_sets import InstructionSet
from penjing.kernels.network import Described, Operation
from penjing.kernels.ternary import Layout as TernaryLayout

SPLITS = (
    2**23
)  # products of signs in a layer from which on threads gain more by sharing its rows than waking them costs
_SLOWER = 16  # times as long takes a product in floating point
SHARES = 2**18  # bytes of binary weights, below which a library's code is a large part of it


class Writer:
    """Lays out constants and values, and writes the C functions that call the kernels."""

    def __init__(self, network: Described, instructions: InstructionSet, float_bits: int) -> None:
        self.network, self.instructions, self.float_bits = network, instructions, float_bits
        self.data = bytearray()  # of the file: what is used where it lies
        self.halves: list[np.ndarray] = []  # of the file, behind `data`: float16, which `penjing_prepare` widens
        self.widened = 0  # numbers of `halves`
        self.bytes: list[np.ndarray] = []  # of the file, behind `halves`: int8, which `penjing_prepare` makes float32
        self.tables = 0  # bytes of what `penjing_prepare` computes
        self.arena = 0  # bytes of values and packed inputs
        self.functions: list[building.Function] = []
        self.declared: list[str] = []  # C functions, one for every shape
        self.shapes: dict[Convolution, _Shape] = {}
        self.pooled = False  # whether threads share the rows of some layer
        weights = (o.arrays["weights"].size for o in network.operations if o.kind == "binary")
        self.shares = sum(weights) // 8 < SHARES  # whether shapes share kernels
        self.shared: dict[Layout, int] = {}  # what a shared kernel depends on → its number
        self.packs: dict[Any, tuple[str, int]] = {}  # what a packing kernel depends on → its name, place of the bits
        self.ternaries: dict[Convolution, str] = {}  # the names of their kernels
        self.frames: dict[Any, int] = {}
        self.layers: list[tuple[int, int, int]] = []  # of binary ones: places of weights, number of shape, tables
        self.geometries: list[tuple[int, ...]] = []  # of every shape of these
        self.lines: list[str] = []
        self.places: dict[str, int] = {}

    def body(self) -> str:
        """The C source behind the layers: one function for every shape of a binary layer, and those exported."""
        network = self.network
        last = {name: i for i, o in enumerate(network.operations) for name in o.inputs}
        free: list[tuple[int, int]] = []  # (bytes, place)
        fixed = self._ends(free)
        for i, operation in enumerate(network.operations):
            if operation.output not in fixed:
                self._place(operation.output, free)
            names = (*operation.inputs, operation.output)
            where = {n: fixed.get(n, f"(float *)(m + ARENA + {self.places.get(n)})") for n in names}
            _WRITERS[operation.kind](self, operation, where)
            for name in {n for n in operation.inputs if last[n] == i and n not in fixed}:
                free.append((self._bytes(name), self.places[name]))
        self._leave(fixed)
        sizes = [math.prod(network.shapes[name]) for name in (network.input, network.output)]
        kernels = [f"void {f.name}({', '.join(f.pointers)}, int32_t, int32_t);" for f in self.functions]
        if self.pooled:
            kernels += [f"void {f.name}_rows(void **, int32_t, int32_t);" for f in self.functions]
            kernels += [threads.SOURCE.replace("void penjing_run(", "static void penjing_run("), c_source.THREADS]
        converted = sum(map(len, self.bytes))
        tables = (self.widened + converted) * 4
        return "\n".join(
            [
                f"#define CONVERTED {self.widened * 4}\n#define TABLES {tables}",
                f"#define ARENA {tables + self.tables}", *kernels, *self._tabled(), *self.declared,
                f"SHOWN int64_t penjing_bytes(void) {{ return ARENA + {self.arena + LINE}; }}",
                "SHOWN SHORT void penjing_prepare(char *m) {",
                f"  widen((const uint16_t *)(penjing_data + {len(self.data)}), (float *)m, {self.widened});",
                f"  convert((const int8_t *)(penjing_data + {len(self.data) + 2 * self.widened}), "
                f"(float *)(m + CONVERTED), {converted});" if converted else "",
                *self._preparing(),
                "}",
                "SHOWN SHORT void penjing_network(const float *in, float *out, char *m, int32_t samples) {",
                f"  for (int32_t n = 0; n < samples; n++, in += {sizes[0]}, out += {sizes[1]}) {{",
                *self.lines,
                "  }\n}\n",
            ]
        )  # fmt: skip

    def _preparing(self) -> list[str]:
        """Lines that compute the tables of binary layers."""
        if not self.layers:
            return []
        return [
            f"  for (int i = 0; i < {len(self.layers)}; i++) {{",
            "    const int32_t *s = shapes[layers[i][1]];",
            "    char *t = m + TABLES + layers[i][2];",
            "    borders((const uint8_t *)penjing_data + layers[i][0], s, (int32_t *)t, (int32_t *)(t + s[17]),",
            "            (int32_t *)(t + s[18]));",
            "  }",
        ]

    def _tabled(self) -> list[str]:
        """Tables of binary layers and their shapes, and the function of those that share kernels."""
        if not self.layers:
            return []
        rows = [", ".join(f"{{{', '.join(map(str, row))}}}" for row in part) for part in (self.layers, self.geometries)]
        sizes = len(self.geometries[0])
        tables = [f"static const int32_t layers[][3] = {{{rows[0]}}}, shapes[][{sizes}] = {{{rows[1]}}};"]
        if not self.shared:
            return tables
        *others, last = self.shared.values()
        choice = "".join(f"(number) == {n} ? shared_{n} : " for n in others)
        return [*tables, f"#define KERNEL(number) ({choice}shared_{last})", c_source.SHARED]

    def file(self) -> bytes:
        """The constants as they lie in the library."""
        return bytes(self.data) + b"".join(part.tobytes() for part in (*self.halves, *self.bytes))

    def _ends(self, free: list[tuple[int, int]]) -> dict[str, str]:
        """Where input and output lie; an image of several channels is laid out anew at first, pixel by pixel."""
        fixed = {}
        for name, pointer in ((self.network.input, "in"), (self.network.output, "out")):
            height, width, channels = self.network.shapes[name]
            beside = [o for o in self.network.operations if name in (*o.inputs, o.output)]
            rounded = any(o.kind in ("add", "relu", "add_relu") for o in beside)  # these write whole blocks
            if (channels == 1 or height * width == 1) and not rounded:
                fixed[name] = pointer
            else:
                self._place(name, free)
                fixed[name] = f"(float *)(m + ARENA + {self.places[name]})"
                if pointer == "in":
                    self.lines.append(f"    to_pixels(in, {fixed[name]}, {channels}, {height * width});")
        return fixed

    def _leave(self, fixed: dict[str, str]) -> None:
        """Give what the last operation did not write to the output itself."""
        name = self.network.output
        height, width, channels = self.network.shapes[name]
        if name == self.network.input:
            self.lines.append(f"    to_pixels(in, out, 1, {height * width * channels});")
        elif fixed[name] != "out":
            self.lines.append(f"    to_pixels({fixed[name]}, out, {height * width}, {channels});")

    def _bytes(self, name: str) -> int:
        return _lines(math.prod(self.network.shapes[name]) * 4)

    def _place(self, name: str, free: list[tuple[int, int]]) -> None:
        size = self._bytes(name)
        fitting = sorted(block for block in free if block[0] >= size)
        if fitting:
            free.remove(fitting[0])
            self.places[name] = fitting[0][1]
        else:
            self.places[name] = self._room(size)

    def _room(self, size: int) -> int:
        place, self.arena = self.arena, self.arena + _lines(size)
        return place

    def _raw(self, array: np.ndarray) -> str:
        """Store an array that is used where it lies; its address in C."""
        place = len(self.data)
        data = array.tobytes()
        self.data += data + bytes(_lines(len(data)) - len(data))
        return f"(penjing_data + {place})"

    def _numbers(self, *arrays: np.ndarray) -> tuple[str, list[int]]:
        """Store numbers in 32 or 16 bits; the address in C of the first array, and all places from there, in bytes."""
        size = LINE // 4
        padded = [np.pad(a.reshape(-1).astype(np.float32), (0, -a.size % size)) for a in arrays]
        places = [4 * sum(len(p) for p in padded[:i]) for i in range(len(padded))]
        whole = np.concatenate(padded)
        magnitudes = np.abs(whole[whole != 0])
        known = np.finfo(np.float16)
        if self.float_bits == 32 or not len(magnitudes) or magnitudes.max() > known.max:
            return self._raw(whole), places
        address = f"(m + {4 * self.widened})"
        self.halves.append(_halved(whole))
        self.widened += len(whole)
        return address, places

    def _whole(self, array: np.ndarray) -> str:
        """Store whole numbers in a byte each; their address in C, as float32."""
        place = 4 * sum(map(len, self.bytes))
        self.bytes.append(np.pad(array.reshape(-1), (0, -array.size % (LINE // 4))))
        return f"m + CONVERTED + {place}"

    def convolution(self, o: Operation, where: dict[str, str]) -> None:
        """A convolution in floating point."""
        assert o.window is not None
        w = o.window
        weights, rest = o.arrays["weights"].transpose(1, 2, 3, 0), (o.arrays["scale"], o.arrays["shift"])
        if weights.dtype == np.int8:
            address, places = self._numbers(*rest)
            before = [f"(const float *)({self._whole(weights)})"]
        else:
            address, places = self._numbers(weights, *rest)
            before = []
        down, right = w.outputs
        sizes = (w.height, w.width, w.channels, right, w.filters, *w.kernel, *w.stride, *w.pad, *w.dilation)
        pointers = ", ".join([*before, *(f"(const float *)({address} + {place})" for place in places)])
        if self._splits(w, _SLOWER):
            self.lines.append(f"    {{ static const int32_t sizes[] = {{{', '.join(map(str, sizes))}}};")
            self.lines.append(
                c_source.split("convolve", f"{where[o.inputs[0]]}, {pointers}, {where[o.output]}, sizes", down)
            )
            self.lines.append("    }")
            return
        given = ", ".join(map(str, (*sizes, 0, down)))
        self.lines.append(f"    convolve({where[o.inputs[0]]}, {pointers}, {where[o.output]}, {given});")

    def binary(self, o: Operation, where: dict[str, str]) -> None:
        """A convolution of signs."""
        assert o.window is not None
        known = self._shape(o.window)
        lay, arrays = known.layout, o.arrays
        place = len(self.data)
        weights = self._raw(binary.packed_weights(arrays["weights"], o.window, lay))
        padded = [np.pad(arrays[name], (0, lay.filters - o.window.filters)) for name in ("scale", "shift")]
        address, _ = self._numbers(arrays["threshold"], *padded)
        table, self.tables = f"m + TABLES + {self.tables}", self.tables + known.tables
        self.layers.append((place, known.number, self.tables - known.tables))
        given = f"{where[o.inputs[0]]}, {where[o.output]}, m"
        if lay.ordered:
            self.lines.append(f"    binary({len(self.layers) - 1}, {given}, (const float *){address});")
        else:
            self.lines.append(f"    binary_{known.number}({given}, {weights}, {address}, {table});")

    def ternary(self, o: Operation, where: dict[str, str]) -> None:
        """A convolution of weights of two bits."""
        assert o.window is not None
        w, lay = o.window, ternary.layout(o.window, self.instructions)
        weights = self._raw(ternary.packed(o.arrays["weights"], lay))
        padded = [np.pad(o.arrays[name], (0, lay.filters - w.filters)) for name in ("scale", "shift")]
        address, places = self._numbers(*padded)
        given, target, (down, right) = where[o.inputs[0]], where[o.output], w.outputs
        if any(w.pad) or lay.channels != w.channels:
            given = f"(float *)(m + ARENA + {self._frame(w, lay)})"
            sizes = (w.height, w.width, w.channels, *w.pad, lay.channels)
            self.lines.append(f"    frame({where[o.inputs[0]]}, {given}, {', '.join(map(str, sizes))});")
        if lay.filters != w.filters:
            target = f"(float *)(m + ARENA + {self._room(down * right * lay.filters * 4)})"
        if w not in self.ternaries:
            self.ternaries[w] = f"ternary_conv_{len(self.ternaries)}"
            self.functions.append(ternary.function(w, self.instructions, self.ternaries[w]))
        floats = ", ".join(f"(const float *)({address} + {place})" for place in places)
        pointers = f"{given}, (const int32_t *){weights}, {floats}, {target}"
        if self._splits(w, _SLOWER):
            self.lines.append(c_source.split(self.ternaries[w], pointers, down))
        else:
            self.lines.append(f"    {self.ternaries[w]}({pointers}, 0, {down});")
        if lay.filters != w.filters:
            self.lines.append(f"    drop({target}, {where[o.output]}, {down * right}, {lay.filters}, {w.filters});")

    def _frame(self, shape: Convolution, lay: TernaryLayout) -> int:
        """The place of an input with its border, whose zeros stay; shapes of an input share it."""
        key = (shape.height, shape.width, shape.channels, shape.pad)
        if key not in self.frames:
            down, right = (n + 2 * p for n, p in zip((shape.height, shape.width), shape.pad, strict=True))
            self.frames[key] = self._room(down * right * lay.channels * 4)
        return self.frames[key]

    def sign(self, o: Operation, where: dict[str, str]) -> None:
        """Signs as numbers."""
        height, width, channels = self.network.shapes[o.output]
        address, _ = self._numbers(o.arrays["threshold"])
        given = f"{where[o.inputs[0]]}, (const float *){address}, {where[o.output]}"
        self.lines.append(f"    sign({given}, {height * width}, {channels});")

    def _splits(self, shape: Convolution, slower: int = 1) -> bool:
        """Whether threads share the rows of a layer; `slower` than one that counts bits."""
        work = math.prod(shape.outputs) * shape.filters * math.prod(shape.kernel) * shape.channels * slower
        splits = bool(self.instructions.triple) and work >= SPLITS
        self.pooled |= splits
        return splits

    def _shape(self, shape: Convolution) -> _Shape:
        """The C functions of a shape, written when it is first met."""
        if shape in self.shapes:
            return self.shapes[shape]
        number, lay = len(self.shapes), binary.shared_layout(shape, self.instructions) if self.shares else None
        if lay is not None:
            return self._sharing(shape, lay, number)
        lay = binary.layout(shape, self.instructions)
        names = [f"binary_pack_{number}", f"binary_conv_{number}"]
        pack, convolve = binary.functions(shape, self.instructions, names)
        packing, bits = self._packed(shape, lay, pack)
        self.functions.append(convolve)
        (down, right), (rows, columns, end) = shape.outputs, binary.table_places(shape, lay)
        tables = f"(int32_t *)t, (int32_t *)(t + {rows}), (int32_t *)(t + {columns})"
        scale = _lines(4 * shape.channels)
        shift = scale + _lines(4 * lay.filters)
        word, last, out = f"uint{lay.word}_t", "", "out"
        if lay.filters != shape.filters:
            out = f"(float *)(m + ARENA + {self._room(down * right * lay.filters * 4)})"
            last = f"\n  drop({out}, out, {down * right}, {lay.filters}, {shape.filters});"
        packed = f"in, (const float *)p, (uint8_t *)(m + ARENA + {bits})"
        given = f"(const {word} *)(m + ARENA + {bits}), (const {word} *)w, {tables}, (const float *)(p + {scale}), "
        given += f"(const float *)(p + {shift}), {out}"
        calls = f"  {packing}({packed}, 0, {shape.height});\n  {names[1]}({given}, 0, {down});"
        if self._splits(shape):
            calls = c_source.split(packing, packed, shape.height) + "\n" + c_source.split(names[1], given, down)
        self.declared.append(f"""
ONCE void binary_{number}(const float *in, float *out, char *m, const char *w, const char *p, const char *t) {{
{calls}{last}
}}""")
        self.geometries.append((*_geometry(shape, lay), rows, columns, 0, 0, 0))
        self.shapes[shape] = _Shape(number, lay, end)
        return self.shapes[shape]

    def _sharing(self, shape: Convolution, lay: Layout, number: int) -> _Shape:
        """A shape whose kernel others share."""
        key = replace(lay, words=0, tiles=0)
        if key not in self.shared:
            self.shared[key] = len(self.shared)
            self.functions.append(binary.shared_function(lay, f"shared_{self.shared[key]}"))
        rows, columns, end = binary.table_places(shape, lay)
        _, bits = self._packed(shape, lay, None)
        self.geometries.append((*_geometry(shape, lay), rows, columns, bits, lay.pixels, self.shared[key]))
        self.shapes[shape] = _Shape(number, lay, end)
        return self.shapes[shape]

    def _packed(self, shape: Convolution, lay: Layout, pack: building.Function | None) -> tuple[str, int]:
        """The name of the kernel that packs a shape's input, and the place of the bits; shapes of an input share it."""
        key = (shape.height, shape.width, shape.channels, shape.pad, lay.word, lay.words, lay.ordered)
        if key not in self.packs:
            down, right = (n + 2 * p for n, p in zip((shape.height, shape.width), shape.pad, strict=True))
            self.packs[key] = pack.name if pack else "", self._room(down * right * lay.bytes)  # the border stays 0
            self.functions += [pack] if pack else []
        return self.packs[key]

    def simple(self, o: Operation, where: dict[str, str]) -> None:
        """Additions, ReLUs and averages."""
        height, width, channels = self.network.shapes[o.inputs[0]]
        blocks = str(self._bytes(o.inputs[0]) // 4)
        sizes = {"average": f"{height * width}, {channels}"}.get(o.kind, blocks)
        given = ", ".join(where[name] for name in (*o.inputs, o.output))
        self.lines.append(f"    {o.kind}({given}, {sizes});")

    def planes(self, o: Operation, where: dict[str, str]) -> None:
        """An image as a vector, channel by channel."""
        height, width, channels = self.network.shapes[o.inputs[0]]
        self.lines.append(f"    to_pixels({where[o.inputs[0]]}, {where[o.output]}, {height * width}, {channels});")

    def maximum(self, o: Operation, where: dict[str, str]) -> None:
        """The maximum of a window."""
        assert o.window is not None
        w = o.window
        sizes = (w.height, w.width, w.channels, *w.outputs, *w.kernel, *w.stride, *w.pad, *w.dilation)
        self.lines.append(f"    maximum({where[o.inputs[0]]}, {where[o.output]}, {', '.join(map(str, sizes))});")


@dataclass(frozen=True)
class _Shape:
    """A shape of binary layers: the number in the names of its functions, its layout, bytes of a layer's tables."""

    number: int
    layout: Layout
    tables: int


def _geometry(shape: Convolution, lay: Layout) -> tuple[int, ...]:
    """What the C function `borders` reads."""
    across = (*shape.outputs, *shape.kernel, *shape.stride, *shape.pad, *shape.dilation)
    memory = (lay.word // 8, lay.words, lay.vectors * lay.lanes, lay.tiles)
    return (shape.height, shape.width, *across, shape.channels, *memory)


def _halved(numbers: np.ndarray) -> np.ndarray:
    """Numbers in 16 bits. None becomes 0: an input of exactly 0 stays on its side of a threshold."""
    halves = numbers.astype(np.float16)
    least = np.copysign(np.finfo(np.float16).smallest_subnormal, numbers).astype(np.float16)
    return np.where((halves == 0) & (numbers != 0), least, halves)


def _lines(size: int) -> int:
    """Bytes of so many, with those to the next line."""
    return -(-size // LINE) * LINE


_WRITERS: dict[str, Callable[[Writer, Operation, dict[str, str]], None]] = {
    "convolution": Writer.convolution,
    "binary": Writer.binary,
    "add": Writer.simple,
    "add_relu": Writer.simple,
    "relu": Writer.simple,
    "average": Writer.simple,
    "maximum": Writer.maximum,
    "planes": Writer.planes,
    "ternary": Writer.ternary,
    "sign": Writer.sign,
}


__all__ = ["SHARES", "SPLITS", "Writer"]
