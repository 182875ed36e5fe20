"""The quantization plan: which edge of the network has which quantization parameters. Data only, no network tensors.

An edge is named by its consumer: ``"layer1.0.conv1:in0"`` is the first input of that layer,
``"layer1.0.conv1:weight"`` its weight, ``"layer1.0/add#0:in1"`` the second input of the first addition that the
module ``layer1.0`` computes. The names come from the source's own modules, never from graph nodes, so a plan
survives edits and exports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from penjing.errors import CheckpointError
from penjing.records import reading

GRIDS = ("uniform", "powers_of_two", "additive_powers_of_two")
LARGEST = 127  # of a non-uniform grid: its integers are stored in 8 bits
LISTED = "listed"  # the grid of a codebook: `QuantSpec.values`


def magnitudes(grid: str, bits: int) -> tuple[int, ...]:
    """Return the non-negative integers of a grid with this many bits, excluding a sign bit, in units of the smallest.

    >>> magnitudes("powers_of_two", 3)
    (0, 1, 2, 4, 8, 16, 32, 64)
    >>> magnitudes("additive_powers_of_two", 4)
    (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)
    """
    if grid == "powers_of_two":
        return (0, *(2**i for i in range(2**bits - 1)))
    # Li et al. 2020, equation 4 with k = 2: every term is 0 or one of three powers of its own; a single remaining bit
    # is a term of 0 and one power.
    terms, spare = divmod(bits, 2)
    if spare:
        places: list[list[int]] = _TERMS_WITH_A_SPARE_BIT.get(bits, [])
    else:
        places = [[term + terms * i for i in range(3)] for term in range(terms)]
    top = max((p for term in places for p in term), default=0)
    sums = {0}
    for term in places:
        sums = {a + b for a in sums for b in (0, *(2 ** (top - p) for p in term))}
    return tuple(sorted(sums))


_TERMS_WITH_A_SPARE_BIT = {1: [[0]], 3: [[0, 1, 3], [2]], 5: [[0, 2, 5], [1, 3, 6], [4]]}


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one edge is quantized: q = clamp(round(x / scale) + zero_point, low, high).

    >>> QuantSpec(bits=8, signed=True, symmetric=True, axis=0).limits
    (-127, 127)
    >>> QuantSpec(bits=8, signed=False, symmetric=False).limits
    (0, 255)
    >>> QuantSpec(bits=8, signed=True, symmetric=True, narrow=False).limits
    (-128, 127)
    >>> QuantSpec(bits=4, grid="powers_of_two").limits
    (-64, 64)
    >>> QuantSpec(grid="listed", values=(-90, -31, 0, 28, 77)).limits
    (-127, 127)
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True  # zero point is 0
    narrow: bool = True  # a symmetric signed range leaves out the lowest integer: -127..127
    axis: int | None = None  # the channel axis; None is one scale for the whole tensor
    range: str = "minmax"  # the range estimator; "dynamic": computed from every input at run time
    group: int | None = None  # group size: so many neighbouring values share a scale; None: per channel
    scale: str = "free"  # or "power_of_two": scales that can be applied by shifting; "half": that float16 has
    grid: str = "uniform"  # one of GRIDS, or LISTED: which of the integers are representable
    values: tuple[int, ...] = ()  # of the grid LISTED: these, ascending

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        if self.grid not in ("uniform", LISTED):
            largest = magnitudes(self.grid, self.bits - self.signed)[-1]
            return (-largest if self.signed else 0), largest
        if not self.signed:
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high if self.symmetric and self.narrow else -high - 1), high


@dataclass(frozen=True)
class Entry:
    """A spec with its quantization parameters: one scale and zero point, or one each per channel of `spec.axis`.

    They are None if they are computed at run time.
    """

    spec: QuantSpec
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether the range is computed from every input at run time."""
        return self.spec.range == "dynamic"


@dataclass(frozen=True)
class Plan:
    """Edge → `Entry`, and the reason for every site that stays in floating point."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)  # site → reason
    remedy: str = ""  # the remedy applied against noise, in words
    precision: str = ""  # of the artifact for which `floats` was chosen, such as "int8-bf16"; "" is any

    def __bool__(self) -> bool:
        return bool(self.entries)

    def without(self, sites: Mapping[str, str]) -> Plan:
        """Return the plan with these sites (site → reason) back in floating point."""
        remaining = {edge: e for edge, e in self.entries.items() if edge.rpartition(":")[0] not in sites}
        return replace(self, entries=remaining, floats={**self.floats, **sites})

    def to_json(self) -> str:
        """Return stable JSON, in which floats round-trip to the same bits."""
        rows = {
            edge: {"spec": _written(e.spec), "scale": e.scale, "zero_point": e.zero_point}
            for edge, e in sorted(self.entries.items())
        }
        data = {"entries": rows, "floats": dict(sorted(self.floats.items())), "remedy": self.remedy}
        data |= {"precision": self.precision} if self.precision else {}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse the output of `to_json`.

        Raises:
            CheckpointError: The text is not a plan.
        """
        try:
            data = reading.json_text(text)
            rows = {edge: _entry(row) for edge, row in data["entries"].items()}
            words = [*data["floats"].values(), data.get("remedy", ""), data.get("precision", "")]
            if not all(isinstance(word, str) for word in words):
                raise ValueError("a reason, remedy or precision that is not text")
            return cls(rows, data["floats"], data.get("remedy", ""), data.get("precision", ""))
        except reading.UNREADABLE as error:
            raise CheckpointError(
                "the plan is damaged",
                code="damaged",
                got=f"{type(error).__name__}: {error}"[:400],
                expected="the JSON that Penjing wrote",
                remedy="run `penjing compress` again",
            ) from None


def _written(spec: QuantSpec) -> dict[str, Any]:
    """A spec as plain data; `values` only where there are some."""
    return {name: value for name, value in vars(spec).items() if name != "values" or value}


def _entry(row: Any) -> Entry:
    """An entry from plain data. Raises ValueError, TypeError or KeyError if it is malformed."""
    spec = QuantSpec(**row["spec"] | {"values": tuple(row["spec"].get("values", ()))})
    for name, value in vars(spec).items():
        default = getattr(QuantSpec, name)
        optional = name in ("axis", "group")
        if type(value) is not (int if optional else type(default)) and not (optional and value is None):
            raise ValueError(f"{name} = {value!r}"[:100])
    sizes = (("bits", spec.bits, 16), ("axis", spec.axis, 32), ("group", spec.group, 2**32))
    for name, size, most in sizes:
        if size is not None and not (0 if name == "axis" else 1) <= size <= most:
            raise ValueError(f"{name} = {size}")
    if spec.grid == LISTED:
        _check_values(spec)
    elif spec.grid not in GRIDS or (spec.grid != "uniform" and spec.bits > 8) or spec.values:
        raise ValueError(f"grid = {spec.grid!r} of {spec.bits} bits"[:100])
    scales, zeros = row["scale"], row["zero_point"]
    if not all(type(x) in (int, float) for x in scales) or not all(type(x) is int for x in zeros):
        raise ValueError("a scale or zero point that is not a number")
    if any(not 0 <= x < 1e38 for x in scales) or any(not -(2**31) <= x < 2**31 for x in zeros):
        raise ValueError("a scale or zero point that no integer type has")
    return Entry(spec, tuple(scales), tuple(zeros))


def _check_values(spec: QuantSpec) -> None:
    """Raise ValueError unless the values of a codebook are integers of its grid, ascending."""
    low, high = spec.limits
    whole = all(type(value) is int and low <= value <= high for value in spec.values)
    if spec.bits > 8 or not spec.values or not whole or list(spec.values) != sorted(set(spec.values)):
        raise ValueError(f"values = {spec.values!r}"[:100])


@dataclass(frozen=True)
class Refusal:
    """What was requested of a kernel, and what it supports instead."""

    got: str
    takes: str


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Which specs an integer kernel supports; each field lists the supported values of a `QuantSpec` field.

    >>> Formats(per=("tensor",)).refusal(QuantSpec(axis=0))
    Refusal(got='a scale for every channel', takes='one for every tensor')
    """

    bits: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)  # fewer than 8 are stored in 8
    symmetric: tuple[bool, ...] = (True, False)
    per: tuple[str, ...] = ("tensor", "channel", "group")
    grids: tuple[str, ...] = GRIDS

    def refusal(self, spec: QuantSpec) -> Refusal | None:
        """Return the part of the spec that is not supported, or None."""
        per = "tensor" if spec.axis is None else "channel" if spec.group is None else "group"
        if spec.bits not in self.bits:
            return Refusal(f"{spec.bits} bits", ", ".join(map(str, self.bits)))
        if spec.symmetric not in self.symmetric:
            kinds = {True: "symmetric", False: "asymmetric"}
            return Refusal(f"{kinds[spec.symmetric]} integers", kinds[not spec.symmetric])
        if per not in self.per:
            return Refusal(f"a scale for every {per}", f"one for every {' or '.join(self.per)}")
        if spec.grid not in self.grids:
            return Refusal(f"the grid {spec.grid}", ", ".join(self.grids))
        return None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a runtime accelerates on a kind of processor, as data from which plans are made and checked.

    Attributes:
        runtime: Name of the runtime.
        precisions: Whole-network precisions that it supports here, for example ("fp32", "bf16", "int8").
        weight: Preferred format of quantized weights.
        activation: Preferred format of quantized activations.
        integer: Kinds of operator (see `penjing.network.graph.kind`) with an integer kernel.
        fuses: Kinds that the runtime fuses into the preceding operator, so that the quantizer is placed after them.
        passthrough: Kinds that only move or select values: their output keeps the scale of their input.
        quantized_output: Kinds whose integer kernel writes only integers, so that every reader gets a quantizer.
        weights: All weight formats that its integer kernels support.
        activations: All activation formats that they support.
        dynamic: Format of a linear layer's input with a range computed at run time; None without such a kernel.
        symmetric_products: Whether a product of two activations, a transposed convolution, and average pooling that
            counts zero padding run in integers, and correctly, only without a zero point.
        centred_db: What the grid of a padded convolution's input may lose, in dB, for a zero point of 0, with which
            its kernels are faster; 0 where they are not.
        stored: Kinds that compute in floating point with weights stored as integers, for smaller files.
        recurrent: Kinds of recurrent layer with integer kernels whose ranges are computed at run time.
        rounding: Relative error of the fixed-point numbers by which its integer kernels rescale results; 0 where
            these are floating-point numbers.
        channel_multiple: Vector width of its kernels in channels: other widths are padded to a multiple of it.
        notes: Sentences for the user about this processor.
        device: Name of the device that it was narrowed to; "" where that is this machine.
        withheld: Kinds with an integer kernel in the runtime that the device does not compute in integers.
    """

    runtime: str
    precisions: tuple[str, ...]
    weight: QuantSpec
    activation: QuantSpec
    integer: frozenset[str]
    fuses: frozenset[str]
    passthrough: frozenset[str]
    quantized_output: frozenset[str] = frozenset()
    weights: Formats = Formats()
    activations: Formats = Formats()
    dynamic: QuantSpec | None = QuantSpec(signed=False, symmetric=False, range="dynamic")
    symmetric_products: bool = False
    centred_db: float = 0.0
    stored: frozenset[str] = frozenset({"embedding"})
    recurrent: frozenset[str] = frozenset()
    rounding: float = 0.0
    channel_multiple: int = 8
    notes: tuple[str, ...] = ()
    device: str = ""
    withheld: frozenset[str] = frozenset()

    def without_kernel(self, what: str) -> str:
        """Why operators of a kind stay in floating point: who has no integer kernel for it.

        >>> GENERIC.without_kernel("gelu")
        'any runtime has no integer kernel for gelu'
        """
        return f"{self.device if what in self.withheld else self.runtime} has no integer kernel for {what}"


def channel_multiple(instruction_sets: tuple[str, ...]) -> int:
    """Return the number of float32 values in a vector register.

    >>> channel_multiple(("avx2", "avx512f"))
    16
    """
    if any(name.startswith("avx512") for name in instruction_sets):
        return 16
    return 8 if any(name.startswith("avx") for name in instruction_sets) else 4


BIAS_LIMIT = 2**30  # integers of a bias stay below this: int32 with a bit to spare for the accumulator

GENERIC = Capabilities(
    runtime="any runtime",
    precisions=("fp32", "int8"),
    weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
    activation=QuantSpec(bits=8, signed=False, symmetric=False),
    integer=frozenset({"conv", "linear", "add", "cat", "avg_pool"}),
    fuses=frozenset({"relu", "clip"}),
    passthrough=frozenset({"max_pool", "pad", "reshape", "transpose"}),
    recurrent=frozenset({"lstm"}),
)
"""The capabilities that plans assume if no runtime is named."""
