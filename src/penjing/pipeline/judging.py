"""What a candidate's figures are worth before a goal: its drop, whether it meets the goal, and the last word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.export import ExportedProgram

from penjing import measure
from penjing.analyze.cost import cost
from penjing.goals import goal as goals
from penjing.goals.goal import Goal
from penjing.pipeline import questions
from penjing.pipeline import stages as pipeline
from penjing.pipeline.questions import Doubt
from penjing.pipeline.repeatable import raise_repeatable
from penjing.pipeline.stages import Run
from penjing.records import Candidate, GoalResult, Measured, Reference
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.sources.source import check_forward, in_single_precision, open_source
from penjing.storage import checkpoint
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task
from penjing.tasks.witness import Witness


@dataclass(frozen=True)
class Original:
    """The network that `drop` is against, where it is not the source.

    Attributes:
        name: How it is called in tables.
        network: Raised.
        weights: SHA-256 of its tensors.
        macs: Of one sample of the task's example.
    """

    name: str
    network: fx.GraphModule
    weights: str
    macs: int

    def row(self, metrics: dict[str, float | None]) -> Reference:
        """What the record says of it."""
        state = self.network.state_dict().values()
        measured = Measured(
            metric=metrics["evaluate"],
            size_bytes=sum(t.numel() * t.element_size() for t in state),
            parameters=sum(p.numel() for p in self.network.parameters()),
            macs=self.macs,
        )
        return Reference(name=self.name, weights=self.weights, measured=measured, selected=metrics["select"])


def original(reference: str | nn.Module | ExportedProgram | None, task: Task) -> Original | None:
    """The network that `drop` is against; None where that is the source.

    Raises:
        SourceError: It can't be opened, or does not take the task's example.
    """
    if reference is None:
        return None
    opened, task, _ = in_single_precision(open_source(reference), task)
    check_forward(opened, task)
    network = raise_repeatable(opened, task)
    macs = sum(row.macs for row in cost(network, task.call()))
    return Original(opened.name, network, checkpoint.fingerprint(network), macs)


def reference_metrics(run: Run, task: Task, original: Original) -> dict[str, float | None]:
    """The metric of the network that `drop` is against, by `evaluate` and by `select` where the task has it."""
    metrics: dict[str, float | None] | None = run.folder.kept("reference-metrics")
    if metrics is None:
        predict = numpy_predictor(original.network)
        with run.costing("evaluate reference"):
            metrics = {
                name: None if function is None else pipeline.metric_of(function, predict, "the reference")
                for name, function in (("evaluate", task.evaluate), ("select", task.select))
            }
        run.folder.keep("reference-metrics", metrics)
    return metrics


def judged(
    candidate: Candidate, goal: Goal, timing: measure.Timing | None, reference: float | None, task: Task
) -> Candidate:
    """The candidate with its latency, its drop, and whether it meets the goal; a rejected one may not be timed."""
    drop, relative = _drops(candidate.measured.metric, reference, task.higher_is_better)
    measured = pipeline.timed(candidate.measured, timing) if timing is not None else candidate.measured
    candidate = replace(candidate, measured=measured, drop=drop, relative_drop=relative)
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
) -> tuple[Measured | None, GoalResult, Doubt | None]:
    """The chosen candidate's figures; where `select` made the choice, `evaluate` is read now, once, for the verdict.

    What it read for the verdict may be other data than for the source: a doubt.
    """
    chosen = next((c for c in found if c.name == verdict.chosen), None)
    if chosen is None:
        return None, verdict, None
    if looked_at == "evaluate" or run.task.evaluate is None:
        return chosen.measured, verdict, None
    kept = run.folder.kept("verdict")
    if kept is None:
        with run.costing(f"verdict on {chosen.name}"):
            folder = run.folder.path / chosen.folder
            session = isolated.open_artifact(folder, run.threads)
            witness = Witness(predictor(session, read_manifest(folder)))
            kept = pipeline.metric_of(run.task.evaluate, witness, chosen.name)
            run.folder.keep("shown-verdict", witness.shown)
        run.folder.keep("verdict", kept)
    doubt = questions.other_data(run, {chosen.name: run.folder.kept("shown-verdict")}, "evaluate")
    measured = replace(chosen.measured, metric=kept)
    drop, relative = _drops(kept, metrics["evaluate"], run.task.higher_is_better)
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


__all__ = ["Original", "final", "judged", "original", "reference_metrics"]
