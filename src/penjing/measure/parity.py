"""Parity: how far the outputs of an artifact are from those of a torch network, in one pass over the batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from penjing.errors import ArtifactError, TaskError
from penjing.records import Parity

IDENTICAL_DB = 200.0
"""Stands for an infinite signal-to-noise ratio, which JSON can't hold; no ratio is reported beyond ±200 dB."""

Array = npt.NDArray[Any]


def parity(
    reference: Iterable[Sequence[Array]],
    candidate: Iterable[Sequence[Array]],
    against: str,
) -> Parity:
    """Compare outputs batch by batch; no more than one batch of each side is held.

    Differences and signal-to-noise are taken over all floating-point outputs (over all outputs where none is
    floating-point): 10·log10(Σ reference² / Σ difference²), with `IDENTICAL_DB` where the outputs are equal to
    the bit. Agreement is the share of samples whose largest value stands at the same place of the last axis of
    the first floating-point output; None unless that output is (samples, classes) with two classes or more.

    Args:
        reference: Outputs of the torch network: for every batch one array per output, samples first.
        candidate: Outputs of the artifact, same batches, same order, same shapes.
        against: What the reference is, "planned" or "source"; it goes into the result.

    Raises:
        ArtifactError: The candidate has NaN or infinity where the reference has not, or another number of
            batches or outputs, or another shape.
        TaskError: There is no sample to compare.
    """
    sums = _Sums()
    left, right = iter(reference), iter(candidate)
    for batch in count():
        expected, found = next(left, None), next(right, None)  # zip would keep the batch before alive
        if expected is None and found is None:
            break
        if expected is None or found is None:
            raise ArtifactError(
                "the artifact answered another number of batches than the network",
                got=f"{batch} batches from the {'network' if expected is None else 'artifact'}, more from the other",
                expected="the same batches on both sides",
            )
        sums.add(expected, found, batch)
        del expected, found
    return sums.result(against)


class _Sums:
    """Running sums over the batches, in float64."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.absolute = 0.0
        self.signal = 0.0
        self.noise = 0.0
        self.values = 0
        self.samples = 0
        self.agreed = 0
        self.classes = True  # until an output without classes is seen

    def add(self, reference: Sequence[Array], candidate: Sequence[Array], batch: int) -> None:
        if len(reference) != len(candidate):
            raise ArtifactError(
                "the artifact has another number of outputs than the network",
                got=f"{len(candidate)} outputs",
                expected=f"{len(reference)}",
            )
        pairs = [(np.asarray(r), np.asarray(c)) for r, c in zip(reference, candidate, strict=True)]
        for port, (r, c) in enumerate(pairs):
            if r.shape != c.shape:
                raise ArtifactError(
                    f"output {port} of the artifact has another shape than the network's",
                    got=f"{c.shape} in batch {batch}",
                    expected=f"{r.shape}",
                )
        floats = [port for port, (r, _) in enumerate(pairs) if _floating(r)]
        for port in floats or range(len(pairs)):
            self._differences(*pairs[port], port, batch)
        first = pairs[floats[0]] if floats else None
        if first is not None and first[0].ndim == 2 and first[0].shape[1] > 1:
            self.agreed += int(np.sum(np.argmax(first[0], axis=-1) == np.argmax(first[1], axis=-1)))
        else:
            self.classes = False
        lead = first if first is not None else next(iter(pairs), None)
        if lead is not None:
            self.samples += lead[0].shape[0] if lead[0].ndim else 1

    def _differences(self, reference: Array, candidate: Array, port: int, batch: int) -> None:
        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        finite = np.isfinite(r) & np.isfinite(c)
        if not finite.all():
            # An infinity that both sides give is an answer (a masked score), not a difference.
            _refuse_nonfinite(r[~finite], c[~finite], port, batch)
            r, c = r[finite], c[finite]
        difference = np.abs(r - c)
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.absolute += float(difference.sum())
        self.signal += float(np.square(r).sum())
        self.noise += float(np.square(difference).sum())
        self.values += difference.size

    def result(self, against: str) -> Parity:
        if self.samples == 0:
            raise TaskError(
                "there is no sample to compare the artifact on",
                got="0 samples",
                expected="at least one batch of outputs",
                remedy="give the task calibration data or another iterable of inputs",
            )
        return Parity(
            against=against,
            largest=self.largest,
            mean=self.absolute / max(self.values, 1),
            snr_db=_decibels(self.signal, self.noise),
            agreement=self.agreed / self.samples if self.classes else None,
            samples=self.samples,
        )


def _floating(array: Array) -> bool:
    # bfloat16 and the 8-bit floats of ml_dtypes have kind "V" in NumPy.
    return array.dtype.kind in "fV"


def _refuse_nonfinite(reference: Array, candidate: Array, port: int, batch: int) -> None:
    """Raise unless both sides hold the same infinities (or NaN) at these places."""
    if np.array_equal(reference, candidate, equal_nan=True):
        return
    if np.isfinite(candidate).all():
        raise ArtifactError(
            f"output {port} of the network has values that are not finite, where the artifact's are",
            got=f"{candidate.size} such values in batch {batch}",
            expected="finite outputs of the network",
            remedy="look at what the network answers to this batch",
        )
    raise ArtifactError(
        f"output {port} of the artifact has values that are not finite",
        got=f"{np.isnan(candidate).sum()} NaN and {np.isinf(candidate).sum()} infinite in batch {batch}",
        expected="finite outputs, as the network gives",
        remedy="ask for a higher precision (fp32 instead of bf16), or calibrate on data of the real range",
    )


def _decibels(signal: float, noise: float) -> float:
    """Signal power over noise power in decibels, held within ±IDENTICAL_DB."""
    if noise == 0.0:
        return IDENTICAL_DB
    if signal == 0.0:
        return -IDENTICAL_DB
    decibels = 10.0 * (math.log10(signal) - math.log10(noise))
    return max(-IDENTICAL_DB, min(IDENTICAL_DB, decibels))
