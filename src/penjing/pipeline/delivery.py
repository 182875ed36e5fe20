"""The deliver stage: the chosen artifact, its checkpoint, the report and the record, all in place or none of them."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import replace

from penjing import measure
from penjing.pipeline import diagnosis, drafts, evidence, intact, targeting
from penjing.pipeline.building import INTEGER
from penjing.pipeline.judging import Judged
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.run import Run, Variant
from penjing.records import Record, to_json
from penjing.records.comparison import value
from penjing.records.figures import FIGURES
from penjing.records.files import write_text
from penjing.records.folder import ARTIFACT, RECORD
from penjing.records.manifest import read_manifest
from penjing.report import html
from penjing.runtimes.loader import write_loader
from penjing.steps.plan import Plan
from penjing.storage import checkpoint


def deliver(prepared: Prepared, judged: Judged) -> Record:
    """Put what was chosen in place, the record last, with the hashes of the rest; then drop what was for a resume."""
    record, run = _record(prepared, judged), prepared.run
    if prepared.diagnosis is not None:
        record = replace(record, diagnosis=diagnosis.compared(prepared.diagnosis, record))
    chosen, path = judged.chosen, run.folder.path
    assert chosen is not None
    manifest = read_manifest(path / chosen.folder)
    with run.folder.building(ARTIFACT) as aside:
        shutil.copytree(path / chosen.folder, aside, dirs_exist_ok=True)
        write_loader(aside / "load.py", manifest, ".", run.threads)
    write_loader(path / "load.py", manifest, ARTIFACT, run.threads)
    draft = drafts.draft(run, prepared.recipe, Variant(chosen.runtime, chosen.precision))
    plan = draft.plan if chosen.precision in INTEGER else Plan()
    checkpoint.save(replace(draft, plan=plan), path)
    evidence.store_planned(run.folder, run.task, draft.network, plan)
    html.write(record, path / "report.html")
    _tell(run, record)
    record = replace(record, files=intact.hashes(path))
    write_text(path / RECORD, to_json(record))
    run.folder.finish()
    return record


def _tell(run: Run, record: Record) -> None:
    """Every candidate's figures, the artifact's, and the verdict, as events."""
    for candidate in (*record.candidates, *record.rejected):
        figures = {name: number for name, figure in FIGURES.items() if (number := figure.of(candidate)) is not None}
        run.events("figures", name=candidate.name, met=candidate.met, reason=candidate.reason, **figures)
    figures = {name: number for name in FIGURES if (number := value(record, name)) is not None}
    run.events("figures", name="artifact", met=record.goal.met, reason=record.goal.reason, **figures)
    run.events("done", met=record.goal.met, reason=record.goal.reason, chosen=record.goal.chosen)


def _record(prepared: Prepared, judged: Judged) -> Record:
    run, order = prepared.run, prepared.order
    return Record(
        penjing=measure.versions()["penjing"],
        versions=measure.versions(),
        machine=prepared.machine,
        seed=order.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        name=prepared.name,
        weights=prepared.weights,
        task=run.task.name,
        data=prepared.data,
        recipe=prepared.recipe_data,
        metric_name=run.task.metric_name,
        higher_is_better=run.task.higher_is_better,
        source=judged.timed.source,
        artifact=judged.artifact,
        candidates=tuple(c for c in judged.candidates if c.rejection is None),
        goal=judged.verdict,
        layers=prepared.layers,
        steps=tuple(run.costs),
        warnings=tuple(run.warnings),
        zeros=judged.zeros,
        trainings=tuple(run.trainings),
        selected=prepared.metrics["select"],
        floors=judged.timed.floors,
        reference=None if prepared.original is None else prepared.original.row(prepared.beside),
        search=prepared.search,
        target=None if order.target is None else targeting.row(order.target),
        pairs=judged.pairs,
        rejected=tuple(c for c in judged.candidates if c.rejection is not None),
    )
