"""Parity: how much the outputs of an artifact differ from those of a torch network, in one pass over the batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from penjing.errors import ArtifactError, TaskError
from penjing.measure.columns import Array, check_shapes, fault, is_float
from penjing.measure.decibels import IDENTICAL_DB, decibels
from penjing.records import Parity


def parity(
    reference: Iterable[Sequence[Array]],
    candidate: Iterable[Sequence[Array]],
    against: str,
) -> Parity:
    """Compare outputs batch by batch, with at most one batch of each side in memory.

    Differences and signal-to-noise are taken over all floating-point outputs (over all outputs where none is
    floating-point): 10·log10(Σ reference² / Σ difference²), with `IDENTICAL_DB` where the outputs are equal to
    the bit. Agreement is the share of samples with the same argmax over the last axis of the first
    floating-point output; None unless that output is (samples, classes) with two classes or more. If NaN or infinities
    are on one side only, the ratio is -`IDENTICAL_DB`, whatever the other values are; an infinity on both sides (a
    masked score) is not a difference.

    Args:
        reference: Outputs of the torch network: for every batch one array per output, samples on axis 0.
        candidate: Outputs of the artifact for the same batches, with the same shapes.
        against: The reference, "planned" or "source"; copied into the result.

    Raises:
        ArtifactError: The numbers of batches or outputs, or the shapes, differ.
        TaskError: There is no sample to compare.
    """
    sums = _Sums()
    left, right = iter(reference), iter(candidate)
    for batch in count():
        expected, actual = next(left, None), next(right, None)  # zip would keep the previous batch in memory
        if expected is None and actual is None:
            break
        if expected is None or actual is None:
            raise ArtifactError(
                "the artifact returned a different number of batches from the network",
                code="batches",
                got=f"{batch} batches from the {'network' if expected is None else 'artifact'}, more from the other",
                expected="the same batches on both sides",
            )
        sums.add(expected, actual, batch)
        del expected, actual
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
        self.classes = True  # whether every batch has outputs (samples, classes)
        self.faulty = False

    def add(self, reference: Sequence[Array], candidate: Sequence[Array], batch: int) -> None:
        check_shapes(reference, candidate, f" in batch {batch}")
        pairs = [(np.asarray(r), np.asarray(c)) for r, c in zip(reference, candidate, strict=True)]
        floats = [port for port, (r, _) in enumerate(pairs) if is_float(r)]
        for port in floats or range(len(pairs)):
            self._differences(*pairs[port])
        first = pairs[floats[0]] if floats else None
        if first is not None and first[0].ndim == 2 and first[0].shape[1] > 1:
            self.agreed += int(np.sum(np.argmax(first[0], axis=-1) == np.argmax(first[1], axis=-1)))
        else:
            self.classes = False
        lead = first if first is not None else next(iter(pairs), None)
        if lead is not None:
            self.samples += lead[0].shape[0] if lead[0].ndim else 1

    def _differences(self, reference: Array, candidate: Array) -> None:
        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        finite = np.isfinite(r) & np.isfinite(c)
        if not finite.all():
            self.faulty = self.faulty or bool(fault(reference, candidate))
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
                "the parity check has no samples",
                code="no-sample",
                got="0 samples",
                expected="at least one batch of outputs",
                remedy="give the task calibration data or another iterable of inputs",
            )
        return Parity(
            against=against,
            largest=self.largest,
            mean=self.absolute / max(self.values, 1),
            snr_db=-IDENTICAL_DB if self.faulty else decibels(self.signal, self.noise),
            agreement=self.agreed / self.samples if self.classes else None,
            samples=self.samples,
        )
