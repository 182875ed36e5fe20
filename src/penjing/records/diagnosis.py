"""What a network will gain at most and why not more, before a run; and afterwards what it gained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What a machine computes and moves: measured on one thread, times the threads of the run.

    Attributes:
        macs_per_s: Multiply-accumulates in float32, as a convolution reaches them.
        rates: Precision → how many times as many it multiplies at that width, known from its instruction sets.
        values_per_s: Bytes read from a buffer of 1 MB, as values between layers are.
        weights_per_s: Precision → bytes read from a buffer as large as the network's weights.
        operator_s: Seconds that an operator takes beside its arithmetic and its bytes; assumed.
        threads: Of the run.
    """

    macs_per_s: float
    rates: dict[str, float]
    values_per_s: float
    weights_per_s: dict[str, float]
    operator_s: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason why a network gains no more.

    Attributes:
        kind: "memory-bound", "depthwise", "small-operators", "off-grid", "float-island", "idle-zeros",
            "fake-quantization" or "blocked".
        runtime: In which it is so; "" for all of them.
        sites: The operators, those with the largest share first; at most `SHOWN`.
        operators: How many there are.
        macs_share: Of the network's multiply-accumulates.
        bytes_share: Of the bytes of its parameters.
        time_share: Of the time that the network is expected to take; None where that is not known.
        bound: How many times faster the whole network would be at most if the cause were gone; None: not about time.
        words: A sentence.
    """

    kind: str
    runtime: str = ""
    sites: tuple[str, ...] = ()
    operators: int = 0
    macs_share: float = 0.0
    bytes_share: float = 0.0
    time_share: float | None = None
    bound: float | None = None
    words: str


SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What one precision gains at most over fp32 in the same runtime, and what it gained.

    Attributes:
        runtime: Its name.
        precision: Of the artifact.
        faster: At most, with kernels as fast as arithmetic and memory allow; None where it is not known.
        smaller: Bytes of the parameters in fp32 divided by those in this precision.
        faster_measured: After the run; None where it was not timed, or the recipe changed the network.
        smaller_measured: After the run, of the files.
        doubt: Why the measured speed-up can't be trusted; "" where it can.
    """

    runtime: str
    precision: str
    faster: float | None
    smaller: float
    faster_measured: float | None = None
    smaller_measured: float | None = None
    doubt: str = ""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a run takes: expected before it, and what it took.

    Attributes:
        candidates: Artifacts to be built.
        expected_s: Seconds of everything that is known beforehand.
        unknown: What is not in them, in words.
        expected_memory_bytes: Peak of the run's own process.
        took_s: Seconds of its stages together, those before an interruption among them.
        peak_memory_bytes: The largest of its stages.
    """

    candidates: int
    expected_s: float
    unknown: tuple[str, ...] = ()
    expected_memory_bytes: int = 0
    took_s: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Findings, expectations and effort of one network on one machine."""

    findings: tuple[Finding, ...]
    expectations: tuple[Expectation, ...]
    balance: Balance | None = None  # None: the artifact is for another device
    effort: Effort | None = None  # None: nothing is run
