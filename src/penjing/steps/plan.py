"""The quantization plan: which edge of the network carries which integers. Data only, no tensors of a network.

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
LARGEST = 127  # of a grid that is not uniform: its integers are stored in 8 bits


def magnitudes(grid: str, bits: int) -> tuple[int, ...]:
    """The integers ≥ 0 that a grid holds with so many bits, without a sign bit; in units of the smallest.

    >>> magnitudes("powers_of_two", 3)
    (0, 1, 2, 4, 8, 16, 32, 64)
    >>> magnitudes("additive_powers_of_two", 4)
    (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)
    """
    if grid == "powers_of_two":
        return (0, *(2**i for i in range(2**bits - 1)))
    # Li et al. 2020, equation 4 with k = 2: every term picks 0 or one of three powers of its own; a single bit that
    # remains is a term of 0 and one power.
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
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True  # zero point is 0
    narrow: bool = True  # a symmetric signed range leaves out the lowest integer: -127..127
    axis: int | None = None  # the channel axis; None is one scale for the whole tensor
    range: str = "minmax"  # which estimator chose the range; "dynamic": taken anew from every input when it runs
    group: int | None = None  # so many neighbouring values of a channel share a scale; None: the whole channel
    scale: str = "free"  # or "power_of_two": scales that a shift multiplies by
    grid: str = "uniform"  # one of GRIDS: which of the integers are held

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self.grid != "uniform":
            largest = magnitudes(self.grid, self.bits - self.signed)[-1]
            return (-largest if self.signed else 0), largest
        if not self.signed:
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high if self.symmetric and self.narrow else -high - 1), high


@dataclass(frozen=True)
class Entry:
    """A spec with its chosen numbers: one scale and zero point, or one each per channel of `spec.axis`.

    None where they are chosen when the network runs.
    """

    spec: QuantSpec
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether the range is taken anew from every input."""
        return self.spec.range == "dynamic"


@dataclass(frozen=True)
class Plan:
    """Edge → `Entry`, and for every site that stays in floating point the reason why."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)  # site → reason
    remedy: str = ""  # what was done against the noise, in words
    precision: str = ""  # of the artifact that the choice of `floats` was made for, such as "int8-bf16"; "" is any

    def __bool__(self) -> bool:
        return bool(self.entries)

    def without(self, sites: Mapping[str, str]) -> Plan:
        """The same plan with these sites (site → reason) back in floating point."""
        remaining = {edge: e for edge, e in self.entries.items() if edge.rpartition(":")[0] not in sites}
        return replace(self, entries=remaining, floats={**self.floats, **sites})

    def to_json(self) -> str:
        """Stable JSON; floats are written so that they read back to the same bits."""
        rows = {
            edge: {"spec": vars(e.spec), "scale": e.scale, "zero_point": e.zero_point}
            for edge, e in sorted(self.entries.items())
        }
        data = {"entries": rows, "floats": dict(sorted(self.floats.items())), "remedy": self.remedy}
        data |= {"precision": self.precision} if self.precision else {}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            data = reading.json_text(text)
            rows = {edge: _entry(row) for edge, row in data["entries"].items()}
            words = [*data["floats"].values(), data.get("remedy", ""), data.get("precision", "")]
            if not all(isinstance(word, str) for word in words):
                raise ValueError("a reason, remedy or precision that is not a text")
            return cls(rows, data["floats"], data.get("remedy", ""), data.get("precision", ""))
        except reading.UNREADABLE as error:
            raise CheckpointError(
                "the plan is damaged",
                got=f"{type(error).__name__}: {error}"[:400],
                expected="the JSON that Penjing wrote",
                remedy="run `penjing compress` again",
            ) from None


def _entry(row: Any) -> Entry:
    """An entry from plain data. Raises ValueError, TypeError or KeyError where it is something else."""
    spec = QuantSpec(**row["spec"])
    for name, value in vars(spec).items():
        default = getattr(QuantSpec, name)
        optional = name in ("axis", "group")
        if type(value) is not (int if optional else type(default)) and not (optional and value is None):
            raise ValueError(f"{name} = {value!r}"[:100])
    sizes = (("bits", spec.bits, 16), ("axis", spec.axis, 32), ("group", spec.group, 2**32))
    for name, size, most in sizes:
        if size is not None and not (0 if name == "axis" else 1) <= size <= most:
            raise ValueError(f"{name} = {size}")
    if spec.grid not in GRIDS or (spec.grid != "uniform" and spec.bits > 8):
        raise ValueError(f"grid = {spec.grid!r} of {spec.bits} bits"[:100])
    scales, zeros = row["scale"], row["zero_point"]
    if not all(type(x) in (int, float) for x in scales) or not all(type(x) is int for x in zeros):
        raise ValueError("a scale or zero point that is not a number")
    if any(not 0 <= x < 1e38 for x in scales) or any(not -(2**31) <= x < 2**31 for x in zeros):
        raise ValueError("a scale or zero point that no integer type has")
    return Entry(spec, tuple(scales), tuple(zeros))


@dataclass(frozen=True)
class Refusal:
    """What a kernel was asked for, and what it takes in its place."""

    got: str
    takes: str


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Which specs an integer kernel takes; each field lists the values of `QuantSpec` that it may have.

    >>> Formats(per=("tensor",)).refusal(QuantSpec(axis=0))
    Refusal(got='a scale for every channel', takes='one for every tensor')
    """

    bits: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)  # fewer than 8 are stored in 8
    symmetric: tuple[bool, ...] = (True, False)
    per: tuple[str, ...] = ("tensor", "channel", "group")
    grids: tuple[str, ...] = GRIDS

    def refusal(self, spec: QuantSpec) -> Refusal | None:
        """What about the spec it does not take; None when it takes it."""
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
    """What a runtime gains from on one kind of processor, as data that a plan is made from and checked against.

    Attributes:
        runtime: Name of the runtime.
        precisions: Whole-network precisions that it executes here, for example ("fp32", "bf16", "int8").
        weight: Format of quantized weights.
        activation: Format of quantized activations.
        integer: Kinds of operator (see `penjing.network.graph.kind`) with an integer kernel.
        fuses: Kinds that the runtime fuses into the operator before them, so that the quantizer may stand after.
        passthrough: Kinds that only move or select values: what goes in keeps its scale on the way out.
        quantized_output: Kinds whose integer kernel writes integers only, so that every reader gets a quantizer.
        weights: Every format of weights that its integer kernels take.
        activations: Every format of activations that they take.
        dynamic: Format of a linear layer's input whose range is taken at run time; None where there is no such kernel.
        symmetric_products: Whether a product of two activations, a transposed convolution and an average over a border
            of zeros are in integers, and right, only where no activation has a zero point.
        stored: Kinds that compute in floating point with weights kept in integers: their files are smaller.
        recurrent: Kinds of recurrent layer with integer kernels whose ranges are taken at run time.
        channel_multiple: Channels that its kernels compute at once: others are padded to a multiple of them.
        notes: Sentences for the user, each about this processor.
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
    stored: frozenset[str] = frozenset({"embedding"})
    recurrent: frozenset[str] = frozenset()
    channel_multiple: int = 8
    notes: tuple[str, ...] = ()


def channel_multiple(instruction_sets: tuple[str, ...]) -> int:
    """float32 values in a vector register.

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
"""What plans are made for when no runtime is named."""
