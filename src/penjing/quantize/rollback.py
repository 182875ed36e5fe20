"""Rollback: as few operators as possible return to floating point until the network meets a limit.

Operators are ranked by the noise that each causes at the outputs if it alone is quantized. As many of the worst as
necessary are left in floating point, and every trial is repaired and measured as a whole, on calibration data that the
repair has not seen. Accuracy-aware rollback is described in the documentation of NNCF ("Quantization with accuracy
control").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from penjing.analyze import noise
from penjing.analyze.samples import part, split
from penjing.errors import RecipeError, TaskError
from penjing.network.graph import site, sites, tensor_inputs
from penjing.quantize.bias_correction import BiasCorrection
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.placement import carries
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.settings import between, check, number, one_of, optional, whole
from penjing.steps.step import Context, Step
from penjing.surgery import insert
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Call

RANKED = 16  # samples used for the ranking
REPAIRS: dict[str, Step | None] = {
    "coordinate_rounding": CoordinateRounding(),
    "bias_correction": BiasCorrection(),
    "none": None,
}


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Return the noisiest operators to floating point until a limit holds. Comes directly after `Static`.

    Attributes:
        snr_db: Smallest signal-to-noise ratio of the outputs against the floating-point network.
        agreement: Smallest share of equal top-1 predictions; for outputs whose last axis is classes.
        drop: Largest drop of `Task.select`, in the metric's own unit.
        repair: "coordinate_rounding", "bias_correction" or "none": the repair applied to every trial and to the result.
        most: Largest number of operators that return to floating point.
    """

    stage: ClassVar[str] = "repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    snr_db: float | None = None
    agreement: float | None = None
    drop: float | None = None
    repair: Literal["coordinate_rounding", "bias_correction", "none"] = "coordinate_rounding"
    most: int = 16

    def __post_init__(self) -> None:
        if self.snr_db is None and self.agreement is None and self.drop is None:
            raise RecipeError(
                "Rollback needs a limit", code="limits", got="no setting", expected="snr_db=, agreement= or drop=",
                remedy="for example Rollback(agreement=0.95)",
            )  # fmt: skip
        check(
            self,
            snr_db=optional(number()),
            agreement=optional(between(0, 1)),
            drop=optional(number()),
            repair=one_of(*REPAIRS),
            most=whole(0),
        )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a repaired draft whose plan records what returned and why; the best trial if none meets the limit."""
        if not draft.plan:
            return draft
        if self.drop is not None and context.task.select is None:
            raise TaskError(
                "Rollback(drop=...) needs a metric",
                code="no-metric",
                got="Task.select is None",
                expected="select(predict) -> float, on data that the verdict does not use",
                remedy="give Task(select=...), or Rollback(agreement=...) for calibration data without labels",
            )
        fitting, held_out = split(context)
        trials: dict[int, tuple[bool, float]] = {}
        first = self._repaired(draft, fitting)
        trials[0] = self._judged(draft, first, held_out, context, 0)
        chosen = 0
        reasons: dict[str, str] = {}
        if not trials[0][0]:
            ranked = ranking(draft, first, held_out, context)
            whole = sum(ranked.values())
            reasons = {
                name: f"rolled back: alone {noise.decibels(power):.1f} dB, {power / whole:.0%} of the noise"
                for name, power in ranked.items()
            }
            chosen = self._search(draft, reasons, fitting, held_out, context, trials)
        for name in list(reasons)[:chosen]:
            context.events("rolled_back", site=name, reason=reasons[name])
        return self._repaired(_returned(draft, reasons, chosen, context), context)

    def _search(
        self, draft: Draft, reasons: dict[str, str], fitting: Context, held_out: list[Call], context: Context,
        trials: dict[int, tuple[bool, float]],
    ) -> int:  # fmt: skip
        """How many of the ranked operators return: doubling until the limit holds, then bisection."""

        def holds(count: int) -> bool:
            if count not in trials:
                trial = _returned(draft, reasons, count, context)
                trials[count] = self._judged(draft, self._repaired(trial, fitting), held_out, context, count)
            return trials[count][0]

        limit = min(self.most, len(reasons))
        low, high = 0, min(1, limit)
        while not holds(high):
            if high == limit:  # out of reach: the count with the least noise
                return max(trials, key=lambda count: (trials[count][1], -count))
            low, high = high, min(2 * high, limit)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def _repaired(self, draft: Draft, context: Context) -> Draft:
        repair = REPAIRS[self.repair]
        return draft if repair is None else repair(draft, context)

    def _judged(
        self, draft: Draft, trial: Draft, held_out: list[Call], context: Context, count: int
    ) -> tuple[bool, float]:
        """Whether the limits hold, and the signal-to-noise ratio."""
        network = insert(trial.network, trial.plan)
        snr = noise.signal_to_noise(draft.network, network, held_out)
        holds = self.snr_db is None or snr >= self.snr_db
        figures: dict[str, float] = {"snr_db": snr}
        if self.agreement is not None:
            figures["agreement"] = noise.agreement(draft.network, network, held_out)
            holds = holds and figures["agreement"] >= self.agreement
        if self.drop is not None and context.task.select is not None:
            source, mine = (context.task.select(numpy_predictor(n)) for n in (draft.network, network))
            figures["drop"] = source - mine if context.task.higher_is_better else mine - source
            holds = holds and figures["drop"] <= self.drop
        context.events("rollback", returned=count, met=holds, **figures)
        return holds, snr


def _returned(draft: Draft, reasons: dict[str, str], count: int, context: Context) -> Draft:
    """The draft with the first `count` operators, and operators that only move values to them, in floating point."""
    capabilities = context.capabilities or GENERIC
    operators = sites(draft.network)
    names = dict(list(reasons.items())[:count])
    for name, reason in list(names.items()):
        for producer in tensor_inputs(operators[name]):
            while carries(draft.network, producer, capabilities) and len(producer.users) == 1:
                names[site(producer)] = reason
                producer = tensor_inputs(producer)[0]
    return replace(draft, plan=draft.plan.without(names))


def ranking(draft: Draft, repaired: Draft, held_out: list[Call], context: Context) -> dict[str, float]:
    """Rank sites by the noise power over signal power that each causes at the outputs alone, noisiest first.

    Args:
        draft: Floating-point weights and the plan.
        repaired: The same with weights rounded by a repair.
        held_out: Samples to evaluate.
        context: For progress.
    """
    few = [part(call, 0, 4, context.task.dynamic) for call in held_out[: RANKED // 4]]

    def progress(done: int, total: int) -> None:
        context.events("progress", label="rank operators", done=done, total=total)

    powers = noise.isolated(draft.network, draft.plan, few, progress, repaired.network)
    nodes, capabilities = sites(draft.network), context.capabilities or GENERIC
    computing = {name: n.total for name, n in powers.items() if not carries(draft.network, nodes[name], capabilities)}
    return dict(sorted(computing.items(), key=lambda item: -item[1]))
