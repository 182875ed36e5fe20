"""What a candidate's figures are worth before a goal: its drop, whether it meets the goal, and the last word."""

from __future__ import annotations

from dataclasses import replace

from penjing import measure, pipeline, runtimes
from penjing.pipeline import Run
from penjing.records import Candidate, GoalResult, Measured
from penjing.runtimes.artifact import predictor, read_manifest
from penjing.search import goal as goals
from penjing.search import questions
from penjing.search.goal import Goal
from penjing.task import Task
from penjing.witness import Witness


def judged(candidate: Candidate, goal: Goal, timing: measure.Timing, reference: float | None, task: Task) -> Candidate:
    """The candidate with its latency, its drop, and whether it meets the goal."""
    drop, relative = _drops(candidate.measured.metric, reference, task.higher_is_better)
    candidate = replace(
        candidate, measured=pipeline.timed(candidate.measured, timing), drop=drop, relative_drop=relative
    )
    met, reason = goals.check(goal, candidate)
    return replace(candidate, met=met, reason=reason)


def _drops(value: float | None, reference: float | None, higher_is_better: bool) -> tuple[float | None, float | None]:
    """Change for the worse: in the metric's own unit, and relative to the source."""
    if value is None or reference is None:
        return None, None
    drop = reference - value if higher_is_better else value - reference
    return drop, drop / abs(reference) if reference else None


def final(
    run: Run, goal: Goal, verdict: GoalResult, found: list[Candidate], metrics: dict[str, float | None], looked_at: str
) -> tuple[Measured | None, GoalResult]:
    """The chosen candidate's figures; where `select` made the choice, `evaluate` is read now, once, for the verdict."""
    chosen = next((c for c in found if c.name == verdict.chosen), None)
    if chosen is None:
        return None, verdict
    if looked_at == "evaluate" or run.task.evaluate is None:
        return chosen.measured, verdict
    kept = run.folder.kept("verdict")
    if kept is None:
        with run.costing(f"verdict on {chosen.name}"):
            folder = run.folder.path / chosen.folder
            session = runtimes.open_artifact(folder, run.threads)
            witness = Witness(predictor(session, read_manifest(folder)))
            kept = pipeline.metric_of(run.task.evaluate, witness, chosen.name)
            run.folder.keep("shown-verdict", witness.shown)
        run.folder.keep("verdict", kept)
    if text := questions.other_data(run, {chosen.name: run.folder.kept("shown-verdict")}, "evaluate"):
        run.warn(text)
    measured = replace(chosen.measured, metric=kept)
    drop, relative = _drops(kept, metrics["evaluate"], run.task.higher_is_better)
    met, reason = goals.check(goal, replace(chosen, measured=measured, drop=drop, relative_drop=relative))
    if not met:
        how = "meets the goal on Task.select alone" if verdict.met else "comes nearest, and no candidate meets the goal"
        reason = f"{chosen.name} {how}: {reason}"
    return measured, replace(verdict, met=met, reason=reason)


__all__ = ["final", "judged"]
