"""The evidence of a run: frozen results and their JSON. This module never imports torch.

Units stand in the names: ``latency_ms`` milliseconds, ``size_bytes`` bytes, ``energy_mj`` millijoules.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from penjing.errors import RecordError
from penjing.records import reading

FORMAT = 1
MOST_THREADS = 1024  # that a runtime is told to use
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call; `spread` is the interquartile range divided by the median.

    `rounds` are the medians of the turns that it took with the others: what a speed-up is computed from. Where they
    can't be trusted, `steady` is False and `doubt` says why.
    """

    median: float
    p95: float
    spread: float
    batch: int
    threads: int
    calls: int
    rounds: tuple[float, ...] = ()
    steady: bool = True
    doubt: str = ""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Millijoules of one call; `method` is "measured" or "model"."""

    value: float
    method: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of figures: of the source network, or of one artifact in its runtime."""

    metric: float | None = None
    latency_ms: Latency | None = None
    throughput_per_s: float | None = None
    size_bytes: int | None = None
    packed_bytes: int | None = None
    peak_memory_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    energy_mj: Energy | None = None


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """The same difference for one output, or for those of its columns whose values are of one size.

    Attributes:
        output: Its name.
        columns: Which of its columns, for example "0-3 of the last axis"; "" for the whole output.
        snr_db: Signal power over noise power in decibels.
        largest: The largest difference.
        equal: Of outputs that are no floating-point numbers, the share of values that are equal; None of others.
        batch: Samples in the call that came out worst.
        fault: What no decibels say: NaN, or an infinity on one side alone; "" where there is none.
        limit_db: What `snr_db` has to reach; None where it is told and not judged.
        limit_equal: What `equal` has to reach.
        why: Why the limit is lower than that of the precision; "" where it is not.
    """

    output: str
    columns: str = ""
    snr_db: float
    largest: float
    equal: float | None = None
    batch: int = 0
    fault: str = ""
    limit_db: float | None = None
    limit_equal: float | None = None
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether every figure reaches its limit."""
        return not self.shortfall

    @property
    def shortfall(self) -> float:
        """How far below its limit: in decibels or hundredths of equal values, 1000 for a fault; 0 where all hold."""
        if self.fault:
            return 1000.0
        missing = max(0.0, self.limit_db - self.snr_db) if self.limit_db is not None else 0.0
        if self.equal is not None and self.limit_equal is not None:
            missing = max(missing, 100 * (self.limit_equal - self.equal))
        return missing

    @property
    def place(self) -> str:
        """The output and its columns in words."""
        return f"{self.output}, columns {self.columns}" if self.columns else self.output


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Difference between an artifact in its runtime and a torch network, over all outputs.

    `against` is "planned" (the torch network with the same quantizers: what the export should reproduce)
    or "source" (the network the user gave). `snr_db` is signal power over noise power in decibels.
    `agreement` is the share of samples with the same largest output, None where no output has classes.
    `rows` are the same figures per output and per group of columns, with the limits that they have to reach.
    """

    against: str
    largest: float
    mean: float
    snr_db: float
    agreement: float | None
    samples: int
    rows: tuple[ParityRow, ...] = ()

    @property
    def least_db(self) -> float:
        """Signal-to-noise of the worst output or group of columns; `snr_db` where there is but one."""
        if len({row.place for row in self.rows}) < 2:
            return self.snr_db
        return min((row.snr_db for row in self.rows if not row.fault), default=self.snr_db)

    @property
    def worst(self) -> ParityRow | None:
        """The row furthest below its limit; where all hold, the one that comes nearest to it."""

        def order(row: ParityRow) -> tuple[float, bool, float]:
            return -row.shortfall, row.limit_db is None, row.snr_db - (row.limit_db or 0.0)

        return min(self.rows, key=order, default=None)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why a candidate is not offered: it does not compute what it was to compute.

    Attributes:
        reason: In words, with figure and limit.
        against: "planned", or "" where no comparison tells it.
        output: The output (and columns) that is furthest below its limit.
        snr_db: Its signal-to-noise ratio; None where that is not the figure.
        limit_db: What it had to reach.
        operator: Site of the first operator whose values differ; None where none was found.
    """

    reason: str
    against: str = ""
    output: str = ""
    snr_db: float | None = None
    limit_db: float | None = None
    operator: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer (or functional operator): its cost, and how the runtime really executed it."""

    name: str
    kind: str
    parameters: int = 0
    macs: int = 0
    activation_bytes: int = 0
    weight_bytes: int = 0
    planned: str = "fp32"  # what the plan asked for
    executed: str | None = None  # what the runtime's own optimized graph shows; None where it can't be seen
    reason: str | None = None  # why an operator with products or parameters stayed in floating point
    stored: str | None = None  # "int8" where its weights are stored in integers, also where it computes in floats


@dataclass(frozen=True, kw_only=True)
class CutRow:
    """What a group of coupled channels has of one axis of one stored tensor.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: Its axis.
        role: What the axis is to its layer.
        length: Positions along the axis.
        positions: Those of the group.
        units: The unit of each.
    """

    tensor: str
    axis: int
    role: str
    length: int
    positions: tuple[int, ...]
    units: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """Channels that can only be removed together, one unit at a time.

    Attributes:
        name: The layer that makes them first.
        units: How many there are.
        macs: Multiply-accumulates of the layers that make or read them.
        parameters: Numbers that go when all of them go.
        cuts: Every axis of a stored tensor that is cut.
        because: The operators that join them.
        statistics: Norms and averages over them: removing some is an approximation.
    """

    name: str
    units: int
    macs: int
    parameters: int
    cuts: tuple[CutRow, ...]
    because: tuple[str, ...]
    statistics: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """What the network's outputs lose when one group of channels alone is pruned.

    Attributes:
        name: The group.
        units: How many it has.
        macs: Multiply-accumulates of the layers that make or read them.
        removed: How many of them are removed, rising.
        snr_db: For each, signal-to-noise ratio of the outputs in dB; None where nothing is lost.
    """

    name: str
    units: int
    macs: int
    removed: tuple[int, ...]
    snr_db: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class NoiseRow:
    """What one operator's integers do to the network's outputs when it alone is quantized.

    Signal-to-noise ratios in dB of the outputs; None where nothing is quantized, or nothing is lost.
    """

    name: str
    kind: str
    weights_db: float | None  # weights rounded to the nearest
    repaired_db: float | None  # weights rounded as `quantize.AdaRound` does
    activations_db: float | None
    low: float | None  # range of its first input
    high: float | None
    clipped: float | None  # share of that input's values beyond the range
    share: float  # of the noise of all operators, after the repair
    remedy: str  # "rounding", "floating point", or nothing


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One artifact that was built and measured."""

    name: str  # for example "openvino-int8"
    runtime: str
    precision: str
    folder: str  # relative to the run folder, with forward slashes
    measured: Measured
    parity: tuple[Parity, ...] = ()
    drop: float | None = None
    relative_drop: float | None = None
    met: bool = False
    reason: str = ""
    integer_operators: dict[str, int] = field(default_factory=dict)  # counted in the runtime's optimized graph
    float_operators: dict[str, int] = field(default_factory=dict)
    float_macs_share: float | None = None  # of an integer artifact: multiply-accumulates that stay in floating point
    float_bytes_share: float | None = None  # and the bytes of its parameters that stay floats
    layers: tuple[LayerRow, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)  # file name → hash of every file of the artifact
    rejection: Rejection | None = None  # of a candidate that is not eligible
    doubts: tuple[str, ...] = ()  # what is to be known about it beside its figures


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """Weights that the recipe set to zero, and what the artifact gains by them in its runtime.

    Attributes:
        count: Weights that are zero in the tensors that were pruned.
        weights: All weights of these tensors.
        speedup: Latency of the same artifact with other numbers in place of the zeros, divided by that with zeros,
            timed in turns: the median over the rounds.
        low: The lower quartile over the rounds.
        high: The upper quartile.
    """

    count: int
    weights: int
    speedup: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Wall time and peak memory of one step of the pipeline."""

    name: str
    wall_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What a training was like after so many steps."""

    step: int
    loss: float  # mean over the last steps: a tenth of the training, at most 50
    rate: float  # learning rate
    terms: dict[str, float] = field(default_factory=dict)  # what the loss was made of, means over the same steps


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of the run, up to a hundred points."""

    name: str  # of the step that trained
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the figures were measured."""

    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    system: str
    python: str


@dataclass(frozen=True, kw_only=True)
class GoalResult:
    """The goal as it was asked for, and what came of it.

    Attributes:
        doubt: Why the metric may not say what the goal takes it for, in a few words; "" where nothing was seen.
    """

    text: str
    met: bool
    reason: str
    chosen: str | None  # name of a candidate
    pareto: tuple[str, ...] = ()  # names of the candidates that no other beats in every figure of the goal
    doubt: str = ""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The network that every drop is against, where it is not the source.

    Attributes:
        name: How it is called in tables.
        weights: SHA-256 over its tensors.
        measured: Its figures; it is not timed.
        selected: Its metric by `Task.select`, where that gave the candidates' metrics.
    """

    name: str
    weights: str
    measured: Measured
    selected: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """All the evidence of one run; `record.json` in a run folder."""

    penjing: str
    versions: dict[str, str]
    machine: Machine
    seed: int
    created: str  # ISO 8601, UTC
    name: str  # of the source
    task: str
    data: dict[str, str]  # sha256 by role: calibration, evaluation and training data, the weights of named teachers
    recipe: list[dict[str, Any]]
    metric_name: str
    higher_is_better: bool
    source: Measured
    artifact: Measured | None
    candidates: tuple[Candidate, ...]
    goal: GoalResult
    layers: tuple[LayerRow, ...]  # of the source network
    steps: tuple[StepCost, ...]
    warnings: tuple[str, ...] = ()
    zeros: Zeros | None = None  # where the recipe made any
    trainings: tuple[Training, ...] = ()
    selected: float | None = None  # of the source by `Task.select`, where that gave the candidates' metrics
    # Of the source itself in fp32 in each runtime, where the fp32 candidate is another network (pruned, a student).
    floors: dict[str, Measured] = field(default_factory=dict)
    reference: Reference | None = None  # None: the source
    rejected: tuple[Candidate, ...] = ()  # built and not eligible, each with its `rejection`
    files: dict[str, str] = field(default_factory=dict)  # name in the run folder → SHA-256, of all but this record
    format: int = FORMAT

    @property
    def source_metric(self) -> float | None:
        """The source's metric that the candidates' are to be seen beside."""
        return self.source.metric if self.selected is None else self.selected

    @property
    def baseline(self) -> float | None:
        """The metric that every candidate's drop is against."""
        if self.reference is None:
            return self.source_metric
        chosen = self.reference.selected
        return self.reference.measured.metric if chosen is None else chosen

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that became the artifact; a rejected one only where no other was left."""
        return next((c for c in (*self.candidates, *self.rejected) if c.name == self.goal.chosen), None)


def to_json(value: Any) -> str:
    """JSON text of a record or a part of one; keys in the order of the fields, NaN refused."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_dict(kind: type[T], data: Any) -> T:
    """Build a frozen record of `kind` from plain JSON data; a field that does not fit is named.

    Fields that a newer Penjing added are ignored; missing fields take their default.

    Raises:
        RecordError: A required field is missing or has another type.
    """
    return typing.cast(T, _build(kind, data, kind.__name__))


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _build(next(a for a in args if a is not type(None)), data, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise RecordError(f"{where} can't be read", got=type(data).__name__, expected="a JSON object")
        hints = typing.get_type_hints(kind)
        values = {}
        for f in dataclasses.fields(kind):
            if f.name in data:
                values[f.name] = _build(hints[f.name], data[f.name], f"{where}.{f.name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise RecordError(f"{where} has no field {f.name!r}", got=sorted(data), expected=f.name)
        return typing.cast(Any, kind)(**values)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise RecordError(f"{where} can't be read", got=type(data).__name__, expected="a JSON list")
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is list:
        if not isinstance(data, list):
            raise RecordError(f"{where} can't be read", got=type(data).__name__, expected="a JSON list")
        return [_build(args[0], item, where) for item in data]
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(f"{where} can't be read", got=type(data).__name__, expected="a JSON object")
        return {k: _build(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise RecordError(f"{where} can't be read", got=repr(data)[:200], expected=kind.__name__)
    return data


_SIZE = (0, 2**53)
_BOUNDS: dict[str, tuple[float, float]] = {
    "threads": (1, MOST_THREADS), "cores": (1, 2**16), "batch": (1, 2**20), "calls": (0, 2**40), "samples": (0, 2**40),
    "size_bytes": _SIZE, "packed_bytes": _SIZE, "parameters": _SIZE, "peak_memory_bytes": _SIZE,
    "activation_bytes": _SIZE, "weight_bytes": _SIZE, "macs": (0, 2**62),
    "median": (0, 1e12), "p95": (0, 1e12), "spread": (0, 1e12),
}  # fmt: skip
"""Fields whose values are used in calculations, and between what they lie."""


def _check_values(data: Any, where: str = "Record") -> None:
    """Raise RecordError where a number of plain data is beyond all that was ever measured."""
    inner: Iterable[tuple[Any, Any]] = data.items() if isinstance(data, dict) else ()
    if isinstance(data, list):
        inner = enumerate(data)
    for name, value in inner:
        low, high = _BOUNDS.get(name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise RecordError(f"{where}.{name} can't be right", got=value, expected=f"{low:g} to {high:g}")
        _check_values(value, f"{where}.{name}")


def read(path: Path | str) -> Record:
    """Read `record.json`, given the file or its run folder. Reading never runs code that the file names.

    Raises:
        RecordError: The file is missing, is not JSON, or lacks a field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "record.json"
    try:
        data = reading.json_file(path)
    except FileNotFoundError:
        raise RecordError(
            "there is no record here",
            got=str(path),
            expected="a run folder that `penjing compress` finished",
            remedy="name the folder given to --out; an interrupted run goes on with --resume",
        ) from None
    except (OSError, ValueError) as error:
        raise RecordError(
            "the record can't be read",
            got=f"{path}: {error}",
            expected="the JSON that `penjing compress` wrote",
            remedy="run `penjing compress` again",
        ) from None
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise RecordError(
            "the record was written by a newer Penjing",
            got=f"format {data['format']}",
            expected=f"format {FORMAT} or older",
            remedy="pip install --upgrade penjing",
        )
    record = from_dict(Record, data)
    _check_values(data)
    return record
