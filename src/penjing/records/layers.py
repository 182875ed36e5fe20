"""What is known of one layer or of one group of channels: rows of tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GainRow:
    """What an optimization before export, or in the runtime, gained.

    Attributes:
        name: What was done.
        operators: How many fewer there are.
        parameters: How many fewer there are.
        macs: How many multiply-accumulates fewer there are.
    """

    name: str
    operators: int
    parameters: int = 0
    macs: int = 0


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
    repaired_db: float | None  # weights rounded as `quantize.CoordinateRounding` does
    activations_db: float | None
    low: float | None  # range of its first input
    high: float | None
    clipped: float | None  # share of that input's values beyond the range
    share: float  # of the noise of all operators, after the repair
    remedy: str  # "rounding", "floating point", or nothing


@dataclass(frozen=True, kw_only=True)
class BranchesRow:
    """Where values of different kinds or magnitudes meet on the way to an output: one scale can't serve them.

    Attributes:
        name: The concatenation that joins them, or the layer whose columns are cut apart.
        kind: Its kind.
        layers: The layers that the values come from.
        decoded: What decodes each kind of values on the way.
        ratio: The largest magnitude (root mean square) over the smallest; None where nothing was measured.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    decoded: tuple[str, ...]
    ratio: float | None
