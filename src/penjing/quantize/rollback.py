"""Rollback: the fewest operators return to floating point until the network answers well enough.

The rounds go by measurement: operators are ranked by the noise that each brings to the outputs alone, as many of the
worst are left in floating point as it takes, and every trial is repaired and measured as a whole, on calibration data
that the repair has not seen. Accuracy-aware rollback is described in the documentation of NNCF ("Quantization with
accuracy control").
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

RANKED = 16  # samples that the ranking looks at
REPAIRS: dict[str, Step | None] = {"adaround": CoordinateRounding(), "bias_correction": BiasCorrection(), "none": None}


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Leave the noisiest operators in floating point until a limit holds. Comes right after `Static`.

    Attributes:
        snr_db: Smallest signal-to-noise ratio of the outputs against the floating-point network.
        agreement: Smallest share of equal first answers; for outputs whose last axis are classes.
        drop: Largest change for the worse of `Task.select`, in the metric's own unit.
        repair: "adaround", "bias_correction" or "none": what every trial, and the result, is repaired with.
        most: At most so many operators return.
    """

    stage: ClassVar[str] = "repair"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    snr_db: float | None = None
    agreement: float | None = None
    drop: float | None = None
    repair: Literal["adaround", "bias_correction", "none"] = "adaround"
    most: int = 16

    def __post_init__(self) -> None:
        if self.snr_db is None and self.agreement is None and self.drop is None:
            raise RecipeError(
                "Rollback has no limit to hold", got="no setting", expected="snr_db=, agreement= or drop=",
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
        """Return a repaired draft whose plan says what returned and why; the best one where no trial holds."""
        if not draft.plan:
            return draft
        if self.drop is not None and context.task.select is None:
            raise TaskError(
                "Rollback(drop=...) needs a metric to look at",
                got="Task.select is None",
                expected="select(predict) -> float, on data that the verdict is not read from",
                remedy="give Task(select=...), or Rollback(agreement=...) for calibration data without labels",
            )
        fitting, held = split(context)
        trials: dict[int, tuple[bool, float]] = {}
        first = self._repaired(draft, fitting)
        trials[0] = self._judged(draft, first, held, context, 0)
        chosen = 0
        reasons: dict[str, str] = {}
        if not trials[0][0]:
            ranked = ranking(draft, first, held, context)
            whole = sum(ranked.values())
            reasons = {
                name: f"rolled back: alone {noise.decibels(power):.1f} dB, {power / whole:.0%} of the noise"
                for name, power in ranked.items()
            }
            chosen = self._search(draft, reasons, fitting, held, context, trials)
        for name in list(reasons)[:chosen]:
            context.events("rolled_back", site=name, reason=reasons[name])
        return self._repaired(_returned(draft, reasons, chosen, context), context)

    def _search(
        self, draft: Draft, reasons: dict[str, str], fitting: Context, held: list[Call], context: Context,
        trials: dict[int, tuple[bool, float]],
    ) -> int:  # fmt: skip
        """How many of the ranked operators return: doubling until the limit holds, then halving the interval."""

        def holds(count: int) -> bool:
            if count not in trials:
                trial = _returned(draft, reasons, count, context)
                trials[count] = self._judged(draft, self._repaired(trial, fitting), held, context, count)
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

    def _judged(self, draft: Draft, trial: Draft, held: list[Call], context: Context, count: int) -> tuple[bool, float]:
        """Whether the limits hold, and the signal-to-noise ratio."""
        network = insert(trial.network, trial.plan)
        snr = noise.signal_to_noise(draft.network, network, held)
        fine = self.snr_db is None or snr >= self.snr_db
        found: dict[str, float] = {"snr_db": snr}
        if self.agreement is not None:
            found["agreement"] = noise.agreement(draft.network, network, held)
            fine = fine and found["agreement"] >= self.agreement
        if self.drop is not None and context.task.select is not None:
            source, mine = (context.task.select(numpy_predictor(n)) for n in (draft.network, network))
            found["drop"] = source - mine if context.task.higher_is_better else mine - source
            fine = fine and found["drop"] <= self.drop
        context.events("rollback", returned=count, met=fine, **found)
        return fine, snr


def _returned(draft: Draft, reasons: dict[str, str], count: int, context: Context) -> Draft:
    """The draft with the first `count` operators in floating point, and with what only carries values to them."""
    capabilities = context.capabilities or GENERIC
    found = sites(draft.network)
    names = dict(list(reasons.items())[:count])
    for name, reason in list(names.items()):
        for producer in tensor_inputs(found[name]):
            while carries(draft.network, producer, capabilities) and len(producer.users) == 1:
                names[site(producer)] = reason
                producer = tensor_inputs(producer)[0]
    return replace(draft, plan=draft.plan.without(names))


def ranking(draft: Draft, repaired: Draft, held: list[Call], context: Context) -> dict[str, float]:
    """Site → noise power over signal power that it brings to the outputs alone, the noisiest first.

    Args:
        draft: Floating-point weights and the plan.
        repaired: The same with the weights that a repair has rounded.
        held: Samples to look at.
        context: For progress.
    """
    few = [part(call, 0, 4) for call in held[: RANKED // 4]]

    def progress(done: int, total: int) -> None:
        context.events("progress", label="rank operators", done=done, total=total)

    found = noise.isolated(draft.network, draft.plan, few, progress, repaired.network)
    nodes, capabilities = sites(draft.network), context.capabilities or GENERIC
    computing = {name: n.total for name, n in found.items() if not carries(draft.network, nodes[name], capabilities)}
    return dict(sorted(computing.items(), key=lambda item: -item[1]))
