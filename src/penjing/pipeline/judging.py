"""The judge stage: figures against the goal, and the final choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from penjing.goals import goal as goals
from penjing.goals.goal import Goal
from penjing.pipeline import between, drafts, questions, zeros
from penjing.pipeline.building import INTEGER
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.questions import Doubt
from penjing.pipeline.run import Variant
from penjing.pipeline.timing import Timed
from penjing.quantize import Static
from penjing.records import Candidate, GoalResult, Measured, PairParity, Zeros
from penjing.records.manifest import read_manifest
from penjing.report import verdict as verdicts
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.tasks.task import Task
from penjing.tasks.witness import Witness


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The result of the judge stage.

    Attributes:
        timed: The figures that were judged.
        candidates: With their drops, and whether they meet the goal.
        verdict: Over all of them.
        artifact: The chosen one's figures.
        zeros: What its zeros gain; None where there are none.
        pairs: Artifacts with integers of different runtimes, compared with each other.
    """

    timed: Timed
    candidates: tuple[Candidate, ...]
    verdict: GoalResult
    artifact: Measured | None
    zeros: Zeros | None
    pairs: tuple[PairParity, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that becomes the artifact."""
        return next((c for c in self.candidates if c.name == self.verdict.chosen), None)


def judge(prepared: Prepared, timed: Timed) -> Judged:
    """Choose the best candidate; where `Task.select` chose it, `Task.evaluate` has the last word."""
    run, goal, looked_at = prepared.run, prepared.order.goal, prepared.looked_at
    shown = {c.name: run.folder.read_state(f"shown-{c.name}") for c in timed.candidates}
    differs = questions.other_data(run, shown, looked_at)
    candidates = tuple(judged(c, goal, prepared.beside[looked_at], run.task) for c in timed.candidates)
    artifact, verdict, last = final(prepared, goals.choose(goal, candidates), candidates)
    verdict = doubted(verdict, (*prepared.doubts, differs, last))
    judged_all = Judged(timed=timed, candidates=candidates, verdict=verdict, artifact=artifact, zeros=None)
    gained = _zeros(prepared, judged_all.chosen)
    _tell_of_plan(prepared, judged_all.chosen)
    return replace(judged_all, zeros=gained, pairs=between.pairs(run, candidates))


def judged(candidate: Candidate, goal: Goal, reference: float | None, task: Task) -> Candidate:
    """The candidate with its drop, and whether it meets the goal."""
    drop, relative = _drops(candidate.measured.metric, reference, task.higher_is_better)
    candidate = replace(candidate, drop=drop, relative_drop=relative)
    met, reason = goals.check(goal, candidate)
    return replace(candidate, met=met, reason=reason)


def _drops(value: float | None, reference: float | None, higher_is_better: bool) -> tuple[float | None, float | None]:
    """Change for the worse: in the metric's own unit, and relative to the source."""
    if value is None or reference is None:
        return None, None
    drop = reference - value if higher_is_better else value - reference
    return drop, drop / abs(reference) if reference else None


def final(
    prepared: Prepared, verdict: GoalResult, candidates: Sequence[Candidate]
) -> tuple[Measured | None, GoalResult, Doubt | None]:
    """The chosen candidate's figures; where `select` made the choice, `evaluate` is read now, once, for the verdict.

    What it read for the verdict may be other data than for the source: a doubt.
    """
    run, goal = prepared.run, prepared.order.goal
    chosen = next((c for c in candidates if c.name == verdict.chosen), None)
    if chosen is None:
        return None, verdict, None
    if prepared.looked_at == "evaluate" or run.task.evaluate is None:
        return chosen.measured, verdict, None
    value = run.folder.read_state("verdict")
    if value is None:
        with run.costing(f"verdict on {chosen.name}"):
            folder = run.folder.path / chosen.folder
            session = isolated.open_artifact(folder, run.threads)
            witness = Witness(predictor(session, read_manifest(folder)))
            value = metric_of(run.task.evaluate, witness, chosen.name)
            run.folder.write_state("shown-verdict", witness.shown)
        run.folder.write_state("verdict", value)
    doubt = questions.other_data(run, {chosen.name: run.folder.read_state("shown-verdict")}, "evaluate")
    measured = replace(chosen.measured, metric=value)
    drop, relative = _drops(value, prepared.beside["evaluate"], run.task.higher_is_better)
    met, reason = goals.check(goal, replace(chosen, measured=measured, drop=drop, relative_drop=relative))
    if not met:
        how = "meets the goal on Task.select alone" if verdict.met else "comes nearest, and no candidate meets the goal"
        reason = f"{chosen.name} {how}: {reason}"
    return measured, replace(verdict, met=met, reason=reason), doubt


def doubted(verdict: GoalResult, doubts: Iterable[Doubt | None]) -> GoalResult:
    """The verdict with what makes its metric doubtful, each once, also behind its reason."""
    short = "; ".join(dict.fromkeys(doubt.short for doubt in doubts if doubt is not None))
    if not short:
        return verdict
    return replace(verdict, doubt=short, reason=f"{verdict.reason}. The metric is in doubt ({short}): see the warnings")


def _zeros(prepared: Prepared, chosen: Candidate | None) -> Zeros | None:
    """What the chosen candidate's zeros gain, where it has any; a warning where that is nothing."""
    if chosen is None:
        return None
    run = prepared.run
    draft = drafts.draft(run, prepared.recipe, Variant(chosen.runtime, chosen.precision))
    gain = zeros.gained(run, draft, chosen, prepared.manifest, prepared.structure)
    if gain is not None and (text := verdicts.idle_zeros(gain, chosen)):
        run.warn(text)
    return gain


def _tell_of_plan(prepared: Prepared, chosen: Candidate | None) -> None:
    """What the chosen integers are that nobody asked for: a remedy that was taken, more bits than the plan has."""
    if chosen is None or chosen.precision not in INTEGER:
        return
    run = prepared.run
    plan = drafts.draft(run, prepared.recipe, Variant(chosen.runtime, chosen.precision)).plan
    if plan.remedy and any(isinstance(step, Static) and step.outliers == "mitigate" for step in prepared.recipe):
        run.warn(f"{chosen.name}: {plan.remedy}")
    own = run.capabilities(chosen.runtime).weight.bits
    bits = min((e.spec.bits for edge, e in plan.entries.items() if edge.endswith(":weight")), default=own)
    if bits < own:
        run.warn(verdicts.narrow_weights(bits, 8, chosen))
