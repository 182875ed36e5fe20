"""Drafts: the network after the steps of a recipe, for each candidate, each step run once."""

from __future__ import annotations

from penjing.pipeline.building import INTEGER
from penjing.pipeline.run import Run, Variant, ends_run
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.stages import STAGES
from penjing.steps.step import Step
from penjing.storage import checkpoint


def draft(run: Run, recipe: Recipe, variant: Variant) -> Draft:
    """The draft after all steps; steps before the first that depends on the runtime run once for all runtimes.

    A floating-point variant takes those alone: what is made for one runtime's integers (ranges, corrected biases) is
    of no use to it. Where a step fails that is for integers alone, it goes on without that step.
    """
    floats = variant.precision not in INTEGER
    current = Draft(run.network) if run.start is None else run.start
    where, branch = "all", ""
    for position, step in enumerate(recipe):
        if step.per_runtime:
            if floats and not step.for_floats:
                break
            where = variant.runtime
        try:
            current = _once(run, step, current, where, position, branch)
        except Exception as error:
            if ends_run(error) or not floats or not STAGES[step.stage].only_prepares:
                raise
            branch = "-floats"
    return current


def shared(run: Run, recipe: Recipe) -> None:
    """Run the steps that all candidates need, so that they fail once, and by their own name."""
    current = Draft(run.network) if run.start is None else run.start
    for position, step in enumerate(recipe):
        if step.per_runtime:
            break
        try:
            current = _once(run, step, current, "all", position)
        except Exception as error:
            if ends_run(error) or not STAGES[step.stage].only_prepares:
                raise
            break  # it fails for integers again, and floating-point candidates go on without it


def _once(run: Run, step: Step, current: Draft, where: str, position: int, branch: str = "") -> Draft:
    """What a step makes, or how it fails: neither is computed twice."""
    key = (where, position, branch)
    if key not in run.drafts:
        try:
            run.drafts[key] = _step(run, step, current, where, f"{where}-{position}{branch}")
        except Exception as error:
            if ends_run(error):
                raise
            run.drafts[key] = error
    outcome = run.drafts[key]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _step(run: Run, step: Step, current: Draft, where: str, name: str) -> Draft:
    folder = run.folder.path / "state" / name
    if (folder / checkpoint.EDITS).exists():
        run.events("resumed", step=type(step).__name__, where=where)
        return checkpoint.load(folder, run.network)
    folder.mkdir(parents=True, exist_ok=True)
    label = type(step).__name__ + ("" if where == "all" else f" for {where}")
    with run.costing(label):
        done = step(current, run.context(None if where == "all" else where, folder))
    checkpoint.save(done, folder)
    return done
