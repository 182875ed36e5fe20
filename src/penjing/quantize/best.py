"""The best repair: methods are tried in order of cost, and those that help on held-out calibration data are kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from penjing.analyze import noise
from penjing.analyze.samples import split
from penjing.network.graph import kind, site
from penjing.quantize.bias_correction import BiasCorrection
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.equalization import CrossLayerEqualization
from penjing.quantize.qat import QAT
from penjing.quantize.smoothquant import SmoothQuant
from penjing.quantize.static import Static
from penjing.steps.cache import Cache
from penjing.steps.draft import Draft
from penjing.steps.settings import check, number, optional
from penjing.steps.step import Context, Step
from penjing.surgery import insert
from penjing.tasks.task import Call
from penjing.train.finetune import Finetune

GAIN_DB = 0.3  # a smaller gain is within the variation between samples


@dataclass(frozen=True, kw_only=True)
class Best:
    """Quantize, and try the repairs in order of cost; each is kept if it reduces the noise at the outputs.

    In this order: `BiasCorrection`, `CoordinateRounding`, additions in floating point (unless the runtime is measurably
    slower), `SmoothQuant`, `CrossLayerEqualization`, and `QAT` without labels in the remaining time. A third of the
    calibration data is held out for the comparison; the winner is rebuilt from all of it.

    Attributes:
        weight_bits: As in `Static`.
        activation_bits: As in `Static`.
        exclude: As in `Static`.
        samples: As in `Static`.
        snr_db: Stop as soon as the outputs reach this signal-to-noise ratio on held-out data; None tries everything.
        minutes: Upper bound on the total time. `QAT` is tried if at least two minutes are left.
    """

    stage: ClassVar[str] = "quantize and repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    weight_bits: int = 8
    activation_bits: int = 8
    exclude: tuple[str, ...] = ()
    samples: int = 300
    snr_db: float | None = None
    minutes: float = 5.0

    def __post_init__(self) -> None:
        check(self, snr_db=optional(number()), minutes=number(above=0, infinite=True))
        self._static(())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return the draft with the least noise at its outputs."""
        search = _Search(self, draft, context)
        search.run()
        return search.winner()

    def _static(self, more: tuple[str, ...]) -> Static:
        return Static(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            exclude=(*self.exclude, *more),
            samples=self.samples,
        )


@dataclass(frozen=True)
class _Trial:
    """One combination: steps before quantization, operators left in floating point, and steps after it."""

    before: tuple[Step, ...] = ()
    floats: tuple[str, ...] = ()
    after: tuple[Step, ...] = ()


class _Search:
    def __init__(self, settings: Best, draft: Draft, context: Context) -> None:
        self.settings, self.draft, self.context = settings, draft, context
        self.fitting, self.held_out = split(replace(context, cache=Cache()))
        self.start = time.monotonic()
        self.best, self.snr = _Trial(), -float("inf")

    def run(self) -> None:
        self.attempt("Static", _Trial(), always=True)
        for repair in (BiasCorrection(), CoordinateRounding()):
            self.attempt(type(repair).__name__, replace(self.best, after=(repair,)))
        adds = tuple(site(n) for n in self.draft.network.graph.nodes if kind(self.draft.network, n) == "add")
        plan = self._build(replace(self.best, floats=()), self.fitting).plan
        adds = tuple(name for name in adds if any(edge.startswith(f"{name}:") for edge in plan.entries))
        if adds:
            self.attempt("additions in floating point", replace(self.best, floats=adds))
        for step in (SmoothQuant(), CrossLayerEqualization()):
            self.attempt(type(step).__name__, replace(self.best, before=(*self.best.before, step)))
        left = self.settings.minutes - (time.monotonic() - self.start) / 60
        if left >= 2:
            training = Finetune(epochs=50, minutes=left / 2, learning_rate=1e-4, optimizer="adamw", weight_decay=1e-4)
            qat = QAT(data="calibration", finetune=training)
            self.attempt("QAT", replace(self.best, after=(*self.best.after, qat)))

    def attempt(self, name: str, trial: _Trial, *, always: bool = False) -> None:
        """Build and measure a trial; it becomes the best if it improves."""
        reached = self.settings.snr_db is not None and self.snr >= self.settings.snr_db
        spent = (time.monotonic() - self.start) / 60
        if not always and (reached or spent > self.settings.minutes):
            return
        started = time.monotonic()
        quantized = self._build(trial, self.fitting)
        snr = self._judged(quantized, self.held_out)
        slower = False
        if self.context.latency is not None and trial.floats != self.best.floats:
            before, after = self.context.latency([self._build(self.best, self.fitting), quantized], "int8")
            slower = after > 1.02 * before
        improves = always or (snr > self.snr + GAIN_DB and not slower)
        self.context.events(
            "remedy", name=name, snr_db=snr, before_db=self.snr, kept=improves, slower=slower,
            seconds=round(time.monotonic() - started, 2),
        )  # fmt: skip
        if improves:
            self.best, self.snr = trial, snr

    def winner(self) -> Draft:
        quantized = self._build(self.best, self.context)
        names = [type(s).__name__ for s in (*self.best.before, self.settings._static(()), *self.best.after)]
        remedy = " → ".join(names) + (", additions in floating point" if self.best.floats else "")
        return replace(
            quantized, plan=replace(quantized.plan, remedy=f"{remedy}: {self.snr:.1f} dB on held-out samples")
        )

    def _build(self, trial: _Trial, context: Context) -> Draft:
        steps: list[Any] = [*trial.before, self.settings._static(trial.floats), *trial.after]
        draft = self.draft
        for step in steps:
            draft = step(draft, context)
        return draft

    def _judged(self, quantized: Draft, held_out: list[Call]) -> float:
        return noise.signal_to_noise(self.draft.network, insert(quantized.network, quantized.plan), held_out)
