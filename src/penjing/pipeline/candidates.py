"""The build stage: every candidate is exported, opened in its runtime, evaluated, and compared with its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penjing import measure, runtimes
from penjing.analyze.activations import Activations
from penjing.errors import ArtifactError, MissingDependency, PenjingError, TargetError, TaskError
from penjing.measure import energy
from penjing.numerics import compiled
from penjing.pipeline import building, drafts, evidence, fitting, gains, picking, stored_only
from penjing.pipeline.bisecting import located
from penjing.pipeline.building import INTEGER, check_integers, executed_rows, float_doubts, float_shares
from penjing.pipeline.causes import doubts
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.run import Run, Variant, ends_run
from penjing.recipes.recipe import Recipe
from penjing.records import Candidate, DeviceFigures, Measured, Parity, Rejection, from_dict
from penjing.records.folder import CANDIDATES
from penjing.records.manifest import Manifest
from penjing.records.parity import by_reason
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.storage.packed import packed_bytes
from penjing.surgery import reorder
from penjing.tasks.witness import Witness


def build(prepared: Prepared) -> tuple[Candidate, ...]:
    """All candidates that could be built, rejected ones among them, with all their figures but those that are timed.

    One that can't be built is a warning, and the first failure an error only when none is left. A variant whose plan
    was chosen for another precision is not a candidate.
    """
    run, recipe, variants = prepared.run, prepared.recipe, _variants(prepared)
    if not variants and run.target is not None:
        raise TargetError(
            f"{run.target.name} runs integers alone, and the recipe makes none",
            code="no-precision",
            got=f"{run.target.name}: {', '.join(run.target.precisions)}",
            expected="a recipe with a step that quantizes, such as quantize.Static",
            remedy="leave the recipe out: what is taken then quantizes",
        )
    if not all(run.folder.read_state(variant.name) for variant in variants):
        drafts.shared(run, recipe)  # what all candidates need fails once, and by its own name
    metric = getattr(run.task, prepared.looked_at)
    candidates: list[Candidate] = []
    failure: Exception | None = None
    for position, variant in enumerate(variants):
        run.events("progress", label="candidates", done=position, total=len(variants), name=variant.name)
        try:
            candidates += filter(None, [candidate(run, recipe, variant, prepared.structure, metric)])
        except Exception as error:  # each runtime, exporter and step has exceptions of its own
            if ends_run(error):
                raise
            failure = failure or error
            run.warn(f"{variant.name} could not be built: {_told(error)}")
    run.events("progress", label="candidates", done=len(variants), total=len(variants), name="")
    if not candidates:
        assert failure is not None
        raise failure
    weighed = stored_only.weighed(candidates)
    for reason, names in by_reason((c.name, c.rejection.reason) for c in weighed if c.rejection is not None):
        run.warn(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not offered: {reason}")
    for built in weighed:
        for text in built.doubts:
            run.warn(text)
    return weighed


def _told(error: Exception) -> str:
    if isinstance(error, PenjingError):
        return error.what + (f" ({error.got})" if error.got else "")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _variants(prepared: Prepared) -> list[Variant]:
    """Every precision of every runtime; those of integers where a step makes a plan, or the run began with one."""
    start = prepared.run.start
    quantizes = prepared.recipe.quantizes or (start is not None and bool(start.plan))
    return [
        Variant(name, precision)
        for name in picking.picked(prepared)
        for precision in prepared.run.capabilities(name).precisions
        if (quantizes or precision not in INTEGER)
        and (prepared.order.precisions is None or precision in prepared.order.precisions)
    ]


def candidate(
    run: Run, recipe: Recipe, variant: Variant, structure: Any, metric: Callable[[Any], float] | None
) -> Candidate | None:
    """Build one artifact and measure all but its latency, which is measured side by side with the others.

    None where the plan was chosen for another precision of the same runtime, and is not what was measured then.
    """
    if stored := run.folder.read_state(variant.name):
        run.events("resumed", candidate=variant.name)
        return from_dict(Candidate, stored)
    draft = drafts.draft(run, recipe, variant)
    integers = variant.precision in INTEGER
    if integers and draft.plan.precision not in ("", variant.precision):
        return None
    if integers:
        check_integers(variant.name, draft.plan)
    where = f"{CANDIDATES}/{variant.name}"
    needs, ordered = _for_device(run, draft, variant)
    with run.costing(f"export {variant.name}"), run.folder.building(where) as aside:
        manifest = building.build(ordered, variant.runtime, variant.precision, run.task, structure, aside)
    folder = run.folder.path / where
    draft = draft if integers else replace(draft, plan=Plan())
    with run.costing(f"evaluate {variant.name}"):
        value, parity, rejection = _evaluated(run, variant.name, draft, manifest, folder, metric)
        capabilities = run.capabilities(variant.runtime)
        rows, integer, floating = executed_rows(
            draft.network, draft.plan, run.task.call(), manifest, folder, capabilities
        )
        packed = _packed(run, folder, manifest)
    gained = gains.of_artifact(run.network, draft, rows, variant.runtime)
    device: DeviceFigures | None = None
    left: tuple[str, ...] = ()
    if run.target is not None and needs is not None:
        device = fitting.figures(run.target, needs, measure.size_bytes(folder, manifest.files()))
        device, refused, left = _checked(run, variant.name, device, folder / manifest.programs[0].files[0])
        rejection = rejection or refused or fitting.rejection(run.target, draft.network, draft.plan, rows, device)
        # What runs in integers there is not seen here: it counts as planned.
        rows = tuple(replace(r, executed=None, reason=None if r.planned == "int8" else r.reason) for r in rows)
    absent = runtimes.absent(variant.runtime)
    if absent and rejection is None:
        rejection = Rejection(reason=absent)
    shares = float_shares(rows) if integers else (None, None)
    told: tuple[str, ...] = ()
    if rejection is None:
        told = doubts(variant.name, variant.precision, parity, draft, run.task)
        told += float_doubts(variant.name, rows) if integers else ()
        told += left
    built = Candidate(
        name=variant.name,
        runtime=variant.runtime,
        precision=variant.precision,
        folder=where,
        measured=Measured(
            metric=value,
            size_bytes=measure.size_bytes(folder, manifest.files()),
            packed_bytes=packed,
            parameters=sum(p.numel() for p in draft.network.parameters()),
            macs=sum(row.macs for row in rows),
            energy_mj=energy.modelled(rows, run.batch),
        ),
        parity=parity,
        integer_operators=integer,
        float_operators=floating,
        layers=rows,
        sha256={name: measure.sha256(folder / name) for name in manifest.files()},
        rejection=rejection,
        float_macs_share=shares[0],
        float_bytes_share=shares[1],
        doubts=told,
        gains=gained,
        device=device,
    )
    run.folder.write_state(variant.name, dataclasses.asdict(built))
    run.events("candidate", name=variant.name, metric=value, size_bytes=built.measured.size_bytes)
    if rejection is not None:
        run.events("rejected", candidate=variant.name, reason=rejection.reason, operator=rejection.operator)
    return built


def _for_device(run: Run, draft: Draft, variant: Variant) -> tuple[Activations | None, Draft]:
    """What the artifact's activations need on the target, and the draft with its operators in the order for that."""
    if run.target is None:
        return None, draft
    plan = draft.plan if variant.precision in INTEGER else Plan()
    needs = fitting.needed(draft.network, run.task.call(), plan, variant.precision)
    if needs.size_bytes == needs.graph_bytes:
        return needs, draft
    ordered = draft.copy()
    reorder(ordered.network, needs.order)
    return needs, ordered


def _checked(
    run: Run, name: str, device: DeviceFigures, file: Path
) -> tuple[DeviceFigures, Rejection | None, tuple[str, ...]]:
    """The figures with the estimate of the device's compiler, why it refuses the file, and what it leaves undone."""
    assert run.target is not None
    try:
        if run.target.check is None:
            return device, None, ()
        with run.costing(f"check {name} for {run.target.name}"):
            device, left = fitting.compiled(run.target, file, device)
    except MissingDependency as error:
        return device, None, (f"{name}: {error.what}, which is not here: {error.remedy}",)
    except ArtifactError as error:
        return device, Rejection(reason=f"{error.what}: {error.got}"), ()
    if not left:
        return device, None, ()
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return device, None, (f"{name}: {device.compiler} leaves to the processor {'; '.join(left[:3])}{more}",)


def _evaluated(
    run: Run, name: str, draft: Draft, manifest: Manifest, folder: Path, metric: Callable[[Any], float] | None
) -> tuple[float | None, tuple[Parity, ...], Rejection | None]:
    """The artifact's metric, its parity, and why it is rejected, from one session of its runtime.

    Raises:
        TaskError: The metric failed on an artifact that computes what was planned.
    """
    session = isolated.open_artifact(folder, run.threads)
    answers = evidence.answers(run.folder, session)
    witness = Witness(predictor(session, manifest))
    value, failure = None, None
    try:
        value = metric_of(metric, witness, name) if metric else None
        run.folder.write_state(f"shown-{name}", witness.shown if metric else None)
    except TaskError as error:  # an artifact that answers NaN may have no metric
        failure = error
    parity = evidence.parity(run.folder, run.task, session, answers, draft, run.network, manifest)
    del session, witness  # the process ends: looking for an operator opens others
    rejection = rejected(run, draft, manifest, folder, parity)
    if failure is not None and rejection is None:
        raise failure
    return value, parity, rejection


def rejected(run: Run, draft: Draft, manifest: Manifest, folder: Path, parity: Sequence[Parity]) -> Rejection | None:
    """Why an artifact is not to be offered, with the first operator that differs; None where it may be.

    Args:
        run: For its data and threads.
        draft: What it was exported from, its plan empty for a floating-point artifact.
        manifest: Its manifest.
        folder: Where it lies.
        parity: Its comparisons.
    """
    rejection = measure.limits.rejection(parity)
    if rejection is None:
        return None
    with run.costing(f"look for the operator at which {folder.name} differs"):
        return located(rejection, parity, draft, run.task, folder, manifest, run.threads)


def _packed(run: Run, folder: Path, manifest: Manifest) -> int | None:
    """Bytes of the artifact's files as one packed file; None where the coder's loops can't be compiled."""
    if not compiled.available():
        return None
    key = "".join(measure.sha256(folder / name) for name in sorted(set(manifest.files())))
    if key not in run.packed:
        run.packed[key] = packed_bytes(folder, manifest.files())
    return run.packed[key]
