"""Measuring an artifact again: alone, beside its source, or beside another artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from penjing import measure, records
from penjing.errors import TaskError, UsageError
from penjing.measure import energy
from penjing.network.capture import capture_network
from penjing.pipeline import building, energies
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.timing import timed
from penjing.pipeline.verify import batch_of, side_by_side
from penjing.records import Energy, LayerRow, Measured
from penjing.records.folder import ARTIFACT, RECORD, SOURCE
from penjing.records.manifest import MANIFEST, read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.sources.source import open_source, with_declared_axes
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task


def measure_artifact(
    artifact: Path | str,
    *,
    against: str | None = None,
    weights: Path | str | None = None,
    ignore: Sequence[str] = (),
    task: Task | None = None,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 2.0,
    events: Callable[..., None] | None = None,
) -> dict[str, Measured]:
    """Figures by name: "artifact", and what it is measured against.

    Args:
        artifact: A run folder or an artifact folder.
        against: The same, or a SOURCE (then a task gives the example); None takes the run's source, if there is one.
        weights: A file of weights for the SOURCE that `against` is.
        ignore: Patterns of names in that file that the network need not have.
        task: Measures the metric too.
        batch: Samples of a timed call.
        threads: None takes every core.
        seconds: Timed seconds each.
        events: Progress.
    """
    if weights is not None and against is None:
        raise UsageError(
            "weights were given without the network that they belong to",
            code="no-source",
            got=weights,
            expected="--against SOURCE beside --weights",
        )
    threads = measure.check_threads(threads or measure.machine(1).cores)
    with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
        folders = {"artifact": _artifact_folder(Path(artifact))}
        if against is not None:
            folders[against] = _other(against, weights, ignore, task, Path(aside))
        elif (Path(artifact) / SOURCE / MANIFEST).exists():
            folders["source"] = Path(artifact) / SOURCE
        ports = read_manifest(folders["artifact"]).programs[0].inputs
        inputs = batch_of(Path(artifact), ports, batch)
        samples = len(inputs[0]) if inputs[0].ndim else batch
        targets = [measure.Target(name, folder, inputs, samples) for name, folder in folders.items()]
        timings = side_by_side(targets, threads, seconds, events)
        spent = _energies(Path(artifact), folders, targets, threads, seconds, events)
        return {
            name: timed(_figures(folder, task, threads), timings[name], spent.get(name))
            for name, folder in folders.items()
        }


def _energies(
    run: Path,
    folders: Mapping[str, Path],
    targets: Sequence[measure.Target],
    threads: int,
    seconds: float,
    events: Callable[..., None] | None,
) -> dict[str, Energy]:
    """Measured energies where this machine has a meter for each of them, otherwise those that a run's record models."""
    of = {name: energies.meter_of(read_manifest(folder).runtime) for name, folder in folders.items()}
    spent: dict[str, Energy] = {}
    for target in targets:
        if (meter := of[target.name]) is not None and all(of.values()):
            spent |= energy.measured([target], meter, threads=threads, seconds=seconds, events=events)
    if len(spent) == len(targets) or not (run / RECORD).exists():
        return spent if len(spent) == len(targets) else {}
    record = records.read(run)
    rows: dict[str, Sequence[LayerRow]] = {"source": record.layers}
    rows |= {"artifact": record.chosen.layers} if record.chosen is not None else {}
    return {t.name: energy.modelled(rows[t.name], t.batch) for t in targets if rows.get(t.name)}


def _artifact_folder(path: Path) -> Path:
    return path / ARTIFACT if (path / ARTIFACT / MANIFEST).exists() else path


def _other(spec: str, weights: Path | str | None, ignore: Sequence[str], task: Task | None, aside: Path) -> Path:
    """The folder of another artifact; a SOURCE is exported for torch first."""
    folder = _artifact_folder(Path(spec))
    if (folder / MANIFEST).exists():
        return folder
    source = open_source(spec, task=task, weights=weights, ignore=ignore)
    if task is None:
        if source.example is None:
            raise TaskError(
                "measuring against a source needs an example input", code="no-example", expected="--task", got=spec
            )
        task = Task(example=source.example)
    task = with_declared_axes(source, task)
    network = capture_network(source.module, *task.call(), task.dynamic)
    args, kwargs = task.call()
    structure = flatten_outputs(network(*args, **kwargs))[1]
    building.build(Draft(network), "torch", "fp32", task, structure, aside)
    return aside


def _figures(folder: Path, task: Task | None, threads: int) -> Measured:
    manifest = read_manifest(folder)
    metric = None
    if task is not None and task.evaluate is not None:
        predict = predictor(isolated.open_artifact(folder, threads), manifest)
        metric = metric_of(task.evaluate, predict, folder.name)
    return Measured(metric=metric, size_bytes=measure.size_bytes(folder, manifest.files()))
