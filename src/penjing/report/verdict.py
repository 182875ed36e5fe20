"""The outcome of a run in one sentence, and notes on its artifact."""

from __future__ import annotations

from dataclasses import dataclass

from penjing import records
from penjing.report import comparison, numbers


@dataclass(frozen=True)
class Verdict:
    """Whether the goal was met, by which candidate, and the changes in speed, size and metric."""

    met: bool
    title: str  # such as "Goal met", "Goal not met, metric in doubt", or "Rejected" for a failed parity check
    subject: str  # the chosen candidate's name, or ""
    changes: tuple[str, ...]  # "3.1× faster", "3.6× smaller", "accuracy 93.4 % → 93.3 %"
    reason: str

    @property
    def headline(self) -> str:
        """Subject and changes as one line.

        >>> Verdict(True, "Goal met", "openvino-int8", ("3.1× faster", "3.6× smaller"), "").headline
        'openvino-int8: 3.1× faster, 3.6× smaller'
        """
        changes = ", ".join(self.changes)
        return f"{self.subject}: {changes}" if self.subject and changes else self.subject or changes or self.title


def of(record: records.Record) -> Verdict:
    """The verdict of a record."""
    goal = record.goal
    reason = goal.reason or (record.chosen.reason if record.chosen else "")
    title = ("Goal met" if goal.met else "Goal not met") + (", metric in doubt" if goal.doubt else "")
    if record.chosen is not None and record.chosen.rejection is not None:
        title = "Rejected"  # the only artifact that can be delivered
    if record.chosen is None and record.artifact is None:
        built = comparison.plural(len(record.candidates), "candidate")
        what = f"No artifact was chosen from {built}" if record.candidates else "No artifact could be built"
        return Verdict(goal.met, title, "", (what,), reason)
    return Verdict(goal.met, title, record.chosen.name if record.chosen else "artifact", changes(record), reason)


FLOOR = "fp32 in the same runtime"


def changes(record: records.Record) -> tuple[str, ...]:
    """Changes in speed, size and metric, each if it was measured on both sides.

    Speed and size are compared with torch, and with fp32 in the same runtime, to separate the effect of compression
    from that of the runtime.
    """
    source, artifact = record.source, comparison.measured(record)
    before, after = source.latency_ms, artifact.latency_ms
    speed = [comparison.faster(before, after, "torch")] if record.target is None else [""]
    size = {"the source": comparison.smaller(source.size_bytes, artifact.size_bytes)}
    plain = comparison.floor(record, record.chosen) if record.chosen else None
    if record.chosen is not None and plain is record.chosen.measured:
        speed = [f"{text} by the runtime alone" for text in speed if text]
    elif plain is not None:
        speed += [comparison.faster(plain.latency_ms, after, FLOOR)] if record.target is None else []
        size[FLOOR] = comparison.smaller(plain.size_bytes, artifact.size_bytes)
    elif speed[0] and record.chosen is not None:
        rejected = any((c.runtime, c.precision) == (record.chosen.runtime, "fp32") for c in record.rejected)
        speed.append(f"{FLOOR} was rejected" if rejected else f"no {FLOOR} to compare with")
    phrases = [*speed, *_sizes(size)]
    metric = source.metric if record.reference is None else record.reference.measured.metric
    if metric is not None and artifact.metric is not None:
        old, new = numbers.metric_pair(metric, artifact.metric, record.metric_name)
        whose = "" if record.reference is None else " of the reference"
        phrases.append(f"{record.metric_name} {old}{whose} → {new}")
    share = record.chosen.float_macs_share if record.chosen else None
    if record.chosen is not None and record.chosen.only_stored:
        phrases.append(records.STORED)
    elif share is not None and share > TOLD:
        phrases.append(f"{numbers.share(share)} of the multiply-accumulates in floating point")
    if record.target is not None:
        phrases += _on_device(record.target, record.chosen)
    return tuple(f for f in phrases if f)


def _on_device(target: records.TargetRow, chosen: records.Candidate | None) -> list[str]:
    """That no speed is known, and what the artifact needs of the device's memory."""
    phrases = [f"for {target.name}, whose speed this machine can't tell"]
    if chosen is not None and chosen.device is not None:
        limit = "" if target.memory_bytes is None else f" of {numbers.figure(target.memory_bytes, 'bytes')}"
        phrases.append(f"{numbers.figure(chosen.device.memory_bytes, 'bytes')}{limit} of its memory at the peak")
        phrases += _estimated(chosen.device)
    return phrases


def _estimated(device: records.DeviceFigures) -> list[str]:
    """The estimate of the device's own compiler."""
    if "cycles" not in device.estimate:
        return []
    clock, cycles = device.estimate.get("clock_mhz", 0.0), device.estimate["cycles"]
    sram = numbers.figure(int(device.estimate["sram_bytes"]), "bytes")
    time = f"{cycles / clock / 1000:.3g} ms at {clock:.0f} MHz"
    return [f"{device.compiler} estimates {cycles:,.0f} cycles ({time}) and {sram} of SRAM"]


def _sizes(changes: dict[str, str]) -> list[str]:
    """Changes in size; equal ones are merged: "3.6× smaller than the source and than fp32 …".

    Args:
        changes: What the size is relative to → the change in words.
    """
    phrases = [comparison.than_whom(words, "as large", whom) for whom, words in changes.items()]
    if len(changes) == 2 and len(set(changes.values())) == 1 and "same" not in changes.values() and all(phrases):
        return [f"{phrases[0]} and than {list(changes)[1]}"]
    return phrases


TOLD = 0.1
"""Share of multiply-accumulates in floating point above which the sentence mentions it."""

GAIN = 1.05
"""A speed-up below this, or whose lower quartile over the rounds is not above 1, counts as none."""
PACKS = 0.75
"""Floats without zeros pack to more than this (docs/packed.md): a packed share above it is not due to the zeros."""


def narrow_weights(bits: int, stored: int, candidate: records.Candidate) -> str:
    """A note that a runtime stores narrow weights in wider integers, with the sizes on disk and packed.

    >>> measured = records.Measured(size_bytes=1_090_000, packed_bytes=640_000)
    >>> chosen = records.Candidate(name="x", runtime="openvino", precision="int8", folder="x", measured=measured)
    >>> narrow_weights(4, 8, chosen)
    'openvino stores weights of 4 bits in 8: 1.09 MB on disk, 640 kB packed (penjing pack), and no faster than 8 bits'
    """
    size, packed = candidate.measured.size_bytes, candidate.measured.packed_bytes
    sizes = [f"{numbers.figure(size, 'bytes')} on disk"] if size else []
    sizes += [f"{numbers.figure(packed, 'bytes')} packed (penjing pack)"] if packed else []
    facts = ", ".join([*sizes, "and no faster than 8 bits"])
    return f"{candidate.runtime} stores weights of {bits} bits in {stored}: {facts}"


def idle_zeros(zeros: records.Zeros, candidate: records.Candidate) -> str:
    """A note that zero weights do not speed up the runtime, with the measured speed-up; "" if they do.

    >>> measured = records.Measured(size_bytes=1_090_000, packed_bytes=640_000)
    >>> chosen = records.Candidate(name="x", runtime="openvino", precision="fp32", folder="x", measured=measured)
    >>> print(idle_zeros(records.Zeros(count=50, weights=100, speedup=1.02, low=0.99, high=1.04), chosen))
    50.0 % of the weights in pruned layers are zero (50 of 100), and openvino computes zeros like other numbers:
    1.02× the speed of the same file with other numbers in their place, measured in turns (0.99× to 1.04×). What
    gains: packed storage (1.09 MB on disk, 640 kB packed), and prune.Channels, which removes whole channels.
    """
    if zeros.speedup >= GAIN and zeros.low > 1:
        return ""
    claim = "computes zeros like other numbers" if zeros.speedup < GAIN else "gains nothing from them beyond the noise"
    size, packed = candidate.measured.size_bytes, candidate.measured.packed_bytes
    gains = ["prune.Channels, which removes whole channels"]
    if size and packed and packed < PACKS * size:
        sizes = f"{numbers.figure(size, 'bytes')} on disk, {numbers.figure(packed, 'bytes')} packed"
        gains.insert(0, f"packed storage ({sizes})")
    return (
        f"{numbers.share(zeros.count / zeros.weights)} of the weights in pruned layers are zero "
        f"({zeros.count:,} of {zeros.weights:,}), and {candidate.runtime} {claim}: {zeros.speedup:.2f}× the speed of "
        f"the same file with other numbers in their place, measured in turns ({zeros.low:.2f}× to {zeros.high:.2f}×). "
        f"What gains: {', and '.join(gains)}."
    )
