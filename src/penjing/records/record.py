"""The evidence of a run: frozen results and their JSON. This module never imports torch.

Units stand in the names: ``latency_ms`` milliseconds, ``size_bytes`` bytes, ``energy_mj`` millijoules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penjing.records.diagnosis import Diagnosis
from penjing.records.layers import GainRow, LayerRow
from penjing.records.parity import PairParity, Parity, Rejection
from penjing.records.search import SearchRow

FORMAT = 1
WEIGHTS_FILE = "weights file"  # the role of a file of weights among `Record.data`
STORED = "weights stored as integers, computed in floating point: smaller, not faster"
"""What an integer artifact of which no operator ran in integers is good for."""
MOST_THREADS = 1024  # that a runtime is told to use


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
    """Millijoules of one call.

    Attributes:
        value: Of all samples of the call together.
        method: "measured" or "model".
        source: Of a measurement the meter and what became of idle power, of a model where its constants are from.
        spread: Of a measurement, the interquartile range over the turns divided by the median.
    """

    value: float
    method: str
    source: str = ""
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of figures: of the source network, or of one artifact in its runtime."""

    metric: float | None = None
    latency_ms: Latency | None = None
    throughput_per_s: float | None = None
    size_bytes: int | None = None
    packed_bytes: int | None = None
    peak_memory_bytes: int | None = None
    load_ms: float | None = None
    parameters: int | None = None
    macs: int | None = None
    energy_mj: Energy | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceFigures:
    """What an artifact needs on the device that it is for, calculated and not measured.

    Attributes:
        storage_bytes: Of its files.
        memory_bytes: Of its activations at their peak, and of its weights where the device reads them into the memory.
        activation_bytes: Of activations at their peak, one sample, in the order that needs least.
        activation_bytes_as_given: The same in the order of the source.
        site: The operator that runs at the peak.
        alive: What is alive then: the operator or input that computed it → bytes.
        proved: Whether no order needs less.
        compiler: What estimated `estimate`, with its version; "" where there is none for the device.
        estimate: Its figures, by name with the unit.
    """

    storage_bytes: int
    memory_bytes: int
    activation_bytes: int
    activation_bytes_as_given: int
    site: str
    alive: dict[str, int]
    proved: bool
    compiler: str = ""
    estimate: dict[str, float] = field(default_factory=dict)


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
    gains: tuple[GainRow, ...] = ()  # what optimizations before export and in the runtime removed
    device: DeviceFigures | None = None  # where it is for another device than the machine of the run

    @property
    def only_stored(self) -> bool:
        """Whether it is an integer artifact of which no operator ran in integers."""
        integers = self.precision.startswith("int8")
        return integers and bool(self.float_operators) and not any(self.integer_operators.values())


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
    """The state of a training after a number of steps."""

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
class TargetRow:
    """The device that the artifact is for, where that is not the machine of the run.

    Attributes:
        name: Of its profile.
        description: One line.
        instruction_sets: Of its processor, for which formats were chosen.
        storage_bytes: What its storage holds; None: no limit known.
        memory_bytes: What its memory holds; None: no limit known.
        commands: What is done with the artifact on the way to the device.
        sha256: Of the profile's text.
    """

    name: str
    description: str
    instruction_sets: tuple[str, ...]
    storage_bytes: int | None
    memory_bytes: int | None
    commands: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class GoalLimit:
    """A bound on one figure: `op` is "<=" or ">=", `value` in the figure's own unit, `text` as the goal has it."""

    figure: str
    op: str
    value: float
    text: str


@dataclass(frozen=True, kw_only=True)
class GoalResult:
    """The goal as requested, and its outcome.

    Attributes:
        limits: Its limits.
        doubt: Why the metric may not say what the goal takes it for, in a few words; "" where nothing was seen.
    """

    text: str
    met: bool
    reason: str
    chosen: str | None  # name of a candidate
    pareto: tuple[str, ...] = ()  # names of the candidates that no other beats in every figure of the goal
    doubt: str = ""
    limits: tuple[GoalLimit, ...] = ()


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
class DeviceParity:
    """How far one output was from what it was to be; see `penjing.records.ParityRow`."""

    output: str
    snr_db: float
    largest: float
    equal: float | None = None
    limit_db: float | None = None
    limit_equal: float | None = None
    holds: bool


@dataclass(frozen=True, kw_only=True)
class DeviceRun:
    """Figures of an artifact on the device itself.

    Attributes:
        runtime: That it ran in.
        precision: Of the artifact.
        sha256: File name → hash of every file of the artifact, as the device read them.
        created: ISO 8601, UTC, by the device's clock.
        device: The machine.
        versions: Of the runtime's packages there.
        latency_ms: Of one call.
        load_ms: To import the runtime and open the artifact.
        peak_memory_bytes: Peak resident memory of the process; None where the device does not tell.
        energy_mj: Of one call; None where the device has no meter.
        against: What the answers were compared with, in words.
        parity: One row for every output.
    """

    runtime: str
    precision: str
    sha256: dict[str, str]
    created: str
    device: Machine
    versions: dict[str, str] = field(default_factory=dict)
    latency_ms: Latency
    load_ms: float
    peak_memory_bytes: int | None = None
    energy_mj: Energy | None = None
    against: str = ""
    parity: tuple[DeviceParity, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every output was as near as it has to be."""
        return bool(self.parity) and all(row.holds for row in self.parity)


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
    # SHA-256 by role: calibration, evaluation and training data, the weights of named teachers, a file of weights
    data: dict[str, str]
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
    devices: tuple[DeviceRun, ...] = ()  # what was measured elsewhere and added afterwards
    weights: str = ""  # the file that the source's weights were loaded from, as it was named; its hash is in `data`
    target: TargetRow | None = None  # None: this machine
    diagnosis: Diagnosis | None = None  # what was to be expected, and what came of it
    pairs: tuple[PairParity, ...] = ()  # artifacts with integers of different runtimes, compared with each other
    search: SearchRow | None = None  # where recipes were searched
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
