"""The judge stage: figures against the goal, and the final choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from penjing.goals import judging as goals
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

READS = 3  # candidates that `evaluate` reads at most, where `select` chose


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
    artifact, verdict, last = final(prepared, candidates)
    verdict = doubted(verdict, (*prepared.doubts, differs, *last))
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
    prepared: Prepared, candidates: Sequence[Candidate]
) -> tuple[Measured | None, GoalResult, tuple[Doubt | None, ...]]:
    """The figures of the candidate that is chosen, and the verdict.

    Where `select` makes the choice, `evaluate` is read now for the verdict. A choice by samples can miss the goal on
    others: then the next best on `select` is read, `READS` of them at most, and the first that meets the goal is
    chosen; where none does, the one that comes nearest. What `evaluate` read may be other data than for the source:
    doubts.
    """
    first = verdict = goals.choose(prepared.order.goal, candidates)
    named = {c.name: c for c in candidates}
    if verdict.chosen is None:
        return None, verdict, ()
    if prepared.looked_at == "evaluate" or prepared.run.task.evaluate is None:
        return named[verdict.chosen].measured, verdict, ()
    read: list[Candidate] = []
    doubts = []
    while verdict.chosen is not None and (verdict.met or not read) and len(read) < READS:
        candidate, doubt = _evaluated(prepared, named[verdict.chosen])
        read.append(candidate)
        doubts.append(doubt)
        if candidate.met:
            break
        verdict = goals.choose(prepared.order.goal, [c for c in candidates if c.name not in {r.name for r in read}])
    best = goals.choose(prepared.order.goal, read).chosen
    chosen = next((c for c in read if c.name == best), read[0])
    return (
        chosen.measured,
        replace(first, chosen=chosen.name, met=chosen.met, reason=_why(first, chosen, read)),
        (*doubts,),
    )


def _evaluated(prepared: Prepared, candidate: Candidate) -> tuple[Candidate, Doubt | None]:
    """A candidate as `evaluate` sees it, and what makes that doubtful."""
    run, name = prepared.run, candidate.name
    assert run.task.evaluate is not None
    value = run.folder.read_state(f"verdict-{name}")
    if value is None:
        with run.costing(f"verdict on {name}"):
            folder = run.folder.path / candidate.folder
            session = isolated.open_artifact(folder, run.threads)
            witness = Witness(predictor(session, read_manifest(folder)))
            value = metric_of(run.task.evaluate, witness, name)
            run.folder.write_state(f"shown-verdict-{name}", witness.shown)
        run.folder.write_state(f"verdict-{name}", value)
    doubt = questions.other_data(run, {name: run.folder.read_state(f"shown-verdict-{name}")}, "evaluate")
    measured = replace(candidate.measured, metric=value)
    return judged(
        replace(candidate, measured=measured), prepared.order.goal, prepared.beside["evaluate"], run.task
    ), doubt


def _why(first: GoalResult, chosen: Candidate, read: Sequence[Candidate]) -> str:
    """The reason of a verdict on what `evaluate` read."""
    others = [f"{c.name} met it on Task.select alone: {c.reason}" for c in read if c.name != chosen.name]
    if chosen.met:
        reason = f"{chosen.name}: {chosen.reason}"
    elif first.met:
        reason = f"{chosen.name} meets the goal on Task.select alone: {chosen.reason}"
    else:
        reason = f"{chosen.name} comes nearest, and no candidate meets the goal: {chosen.reason}"
    return "; ".join([reason, *others])


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
