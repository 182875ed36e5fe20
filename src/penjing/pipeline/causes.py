"""Warnings for an integer artifact with high quantization noise: which operators cause it, and what helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penjing import measure
from penjing.analyze import noise
from penjing.analyze.samples import part
from penjing.measure.decibels import decibels
from penjing.pipeline.evidence import one_call
from penjing.records import Parity
from penjing.steps.draft import Draft
from penjing.tasks.task import Task

SAMPLES = 4
NAMED = 3


def doubts(name: str, precision: str, parities: tuple[Parity, ...], draft: Draft, task: Task) -> tuple[str, ...]:
    """Warnings about an offered artifact; usually none.

    Args:
        name: Of the candidate.
        precision: Its precision.
        parities: Its comparisons.
        draft: What it was built from, its plan empty for a floating-point artifact.
        task: Gives the samples.
    """
    if not draft.plan:
        return ()
    told = []
    limits = measure.limits.of(precision)
    for parity in parities:
        low = [row for row in parity.rows if row.equal is None and not row.fault]
        worst = min(low, key=lambda row: row.snr_db, default=None)
        if worst is None:
            continue
        if parity.against == "planned" and worst.snr_db < limits.told_db:
            told.append(
                f"{name} keeps {worst.snr_db:.1f} dB of what was planned in {worst.place} (usual is above "
                f"{limits.told_db:.0f} dB): the runtime rounds elsewhere than the plan"
            )
        if parity.against == "source" and worst.snr_db < measure.limits.SOURCE_TOLD_DB:
            reason = _why(draft, task, bool(worst.columns))
            told.append(
                f"{name} keeps {worst.snr_db:.1f} dB of the source network's values in {worst.place} (below "
                f"{measure.limits.SOURCE_TOLD_DB:.0f} dB little is left of them){reason}"
            )
    return tuple(told)


def hidden_samples(name: str, original: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Warnings where a few samples of large values hide that the others are lost: an outlier that calibration saw.

    Args:
        name: Of the file.
        original: The source network's outputs, samples on axis 0.
        answers: The artifact's.
    """
    for port, (right, mine) in enumerate(zip(original, answers, strict=True)):
        if right.dtype.kind != "f" or right.ndim < 1 or len(right) < 4 or not np.isfinite(right).all():
            continue
        flat = right.reshape(len(right), -1).astype(np.float64)
        signal = np.square(flat).sum(axis=1)
        noise = np.square(mine.reshape(len(right), -1) - flat).sum(axis=1)
        each = [decibels(float(s), float(n)) for s, n in zip(signal, noise, strict=True)]
        middle, whole = float(np.median(each)), decibels(float(signal.sum()), float(noise.sum()))
        if middle < measure.limits.SOURCE_TOLD_DB <= whole:
            return (
                f"{name} keeps {middle:.1f} dB of half of the samples in output {port}, although {whole:.1f} dB of all "
                f"together: the values of sample {int(np.argmax(signal))} are far larger. If such samples are errors, "
                "leave them out of the calibration data",
            )
    return ()


def _why(draft: Draft, task: Task, columns: bool) -> str:
    """The operators whose integers bring most of the noise, and the remedy; "" where it can't be told.

    Args:
        draft: With the plan.
        task: Gives the samples.
        columns: Whether some columns of an output alone lost much: noise that is little beside the whole output may
            be more than they are.
    """
    try:
        call = part(one_call(task, SAMPLES), 0, SAMPLES, task.dynamic)
        noise_of = {name: n.total for name, n in noise.isolated(draft.network, draft.plan, [call]).items()}
    except Exception:  # a warning without its reason is better than none
        return ""
    whole = sum(noise_of.values())
    small = ""
    if noise.decibels(whole) > measure.limits.SOURCE_TOLD_DB + 10:
        if not columns:
            return ": little of it is of the integers; the steps before them changed the network"
        small = ": they are small beside the other columns, which the same grids hold"
    largest = sorted(noise_of, key=lambda name: -noise_of[name])[:NAMED]
    shares = ", ".join(f"{name} ({noise_of[name] / whole:.0%})" for name in largest)
    return (
        f"{small}: of the integers' noise most comes from {shares}. "
        f"quantize.Static(exclude=[{', '.join(map(repr, largest))}]) leaves them in floating point, "
        "quantize.Rollback(snr_db=20) as many as it takes"
    )
