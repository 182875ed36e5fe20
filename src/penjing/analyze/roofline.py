"""The least time that an operator takes: its arithmetic or its bytes, whichever is longer, and its start.

Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
Communications of the ACM 52 (2009).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from penjing.analyze.traffic import Traffic
from penjing.records import Balance
from penjing.steps.plan import Capabilities

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
TABLES = ("embedding",)  # of a table, the rows that are looked up are read


@dataclass(frozen=True)
class Time:
    """Seconds of one operator: of its arithmetic, of its bytes, and of being started."""

    arithmetic: float
    bytes: float
    start: float

    @property
    def seconds(self) -> float:
        """Of the operator: arithmetic and bytes overlap."""
        return max(self.arithmetic, self.bytes) + self.start

    @property
    def memory_bound(self) -> bool:
        """Whether its bytes take longer than its arithmetic."""
        return self.bytes > self.arithmetic

    @property
    def small(self) -> bool:
        """Whether being started takes longer than all else."""
        return 0 < max(self.arithmetic, self.bytes) < self.start


NOTHING = Time(0.0, 0.0, 0.0)


def time(entry: Traffic, precision: str, balance: Balance) -> Time:
    """The least time of an operator that computes in one precision, for one sample."""
    row, share = entry.row, BYTES[precision] / BYTES["fp32"]
    weights = min(row.weight_bytes, entry.written_bytes) if row.kind in TABLES else row.weight_bytes
    return Time(
        arithmetic=row.macs / (balance.macs_per_s * balance.rates[precision]),
        bytes=share
        * (
            weights / balance.weights_per_s[precision] + (entry.read_bytes + entry.written_bytes) / balance.values_per_s
        ),
        start=balance.operator_s,
    )


def times(
    entries: Iterable[Traffic], balance: Balance, integers: Collection[str], capabilities: Capabilities, floats: str
) -> dict[str, Time]:
    """Site → its least time in a runtime; what the runtime fuses into the operator before takes none.

    Args:
        entries: Of a network whose batch norms are folded.
        balance: Of the machine.
        integers: Sites that compute in integers.
        capabilities: Of the runtime.
        floats: Precision of all the others.
    """
    return {
        e.row.name: NOTHING
        if fused(e, capabilities)
        else time(e, "int8" if e.row.name in integers else floats, balance)
        for e in entries
    }


def fused(entry: Traffic, capabilities: Capabilities) -> bool:
    """Whether a runtime computes an operator within the one before it, as far as it is known."""
    multiplies = entry.behind in capabilities.integer | {"conv", "conv_transpose", "linear", "add"}
    return not entry.row.parameters and entry.row.kind in capabilities.fuses and multiplies
