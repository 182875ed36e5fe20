"""The prepare stage: everything is opened, checked and measured once, before any step begins."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from penjing import measure, records
from penjing.analyze.cost import cost
from penjing.measure import energy, time_limits
from penjing.numerics import compiled
from penjing.pipeline import evidence, fitting, forecast, questions, reference, targeting
from penjing.pipeline import request as requests
from penjing.pipeline.applied import Applied
from penjing.pipeline.building import build
from penjing.pipeline.order import Order
from penjing.pipeline.questions import Doubt
from penjing.pipeline.reference import Original
from penjing.pipeline.repeatable import capture_repeatable
from penjing.pipeline.run import Run
from penjing.randomness import seed_everything
from penjing.recipes.recipe import Recipe
from penjing.records import WEIGHTS_FILE, Diagnosis, LayerRow, Machine, Measured, Record
from penjing.records.events import Events
from penjing.records.folder import EVENTS, EVIDENCE, RECORD, SOURCE, RunFolder
from penjing.records.manifest import Manifest, read_manifest
from penjing.records.search import SearchRow
from penjing.sources.source import Source, check_forward, in_single_precision, open_source, with_declared_axes
from penjing.steps.draft import Draft
from penjing.storage.packed import packed_bytes
from penjing.tasks import finite
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task, agreement_task


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the later stages read.

    Attributes:
        order: What was asked for.
        run: With the source's network and the task.
        name: Of the source.
        weights: The file that its weights were loaded from, as it was named; "" where there is none.
        machine: Where the run takes place.
        recipe: The steps, with every teacher opened.
        recipe_data: All steps as plain data, those among them that were taken before this run.
        data: SHA-256 of the data, by its role.
        original: The network that drops are against; None: the source.
        metrics: The source's, by `evaluate` and `select`.
        beside: Those of the network that drops are against.
        looked_at: Which of both gives the candidates' metrics.
        source: The source's figures, without those that are timed.
        layers: Its layers.
        manifest: Of the source as a torch artifact.
        structure: How the outputs are nested.
        doubts: About the metric, as far as the source alone shows them.
        search: What was tried, at the end of a search.
        diagnosis: What is to be expected; None where that is not known.
    """

    order: Order
    run: Run
    name: str
    weights: str
    machine: Machine
    recipe: Recipe
    recipe_data: list[dict[str, Any]]
    data: dict[str, str]
    original: Original | None
    metrics: dict[str, float | None]
    beside: dict[str, float | None]
    looked_at: str
    source: Measured
    layers: tuple[LayerRow, ...]
    manifest: Manifest
    structure: Any
    doubts: tuple[Doubt | None, ...]
    diagnosis: Diagnosis | None = None
    search: SearchRow | None = None


def prepare(order: Order, folder: RunFolder) -> Prepared | Record:
    """Open and check the request; returns the record itself if this very run has already finished.

    Raises:
        PenjingError: The request, the data or the folder do not fit.
    """
    machine = measure.machine(order.bench.threads)
    torch.set_num_threads(order.bench.threads)
    seed_everything(order.seed)
    requests.check_goal(order.goal, order.task)
    if order.target is not None:
        targeting.check_goal(order.goal, order.target)
    requests.check_inputs(order.task)
    direction = questions.check_direction(order.task)
    opened, task, told = _opened(order)
    original = reference.original(order.reference, task)
    run = _started(order, opened, original, task, folder, machine)
    recipe = requests.with_teachers(order.recipe, run.task)
    requests.check_recipe(recipe, run.network, run.task, order.seed)
    if order.target is not None:
        fitting.check_source(order.target, run.network, run.task.call(), recipe)
    data = requests.data_hashes(run.task, recipe)
    if opened.loaded is not None:
        data[WEIGHTS_FILE] = opened.loaded.sha256
    recipe_data = (order.model.recipe if isinstance(order.model, Applied) else []) + order.recipe.to_data()
    finished = records.read(folder.path) if folder.resumed and (folder.path / RECORD).exists() else None
    request = requests.request(run, opened.name, order.goal, recipe_data, order.runtimes, data, original)
    request |= {"searches": order.searches}
    folder.claim(request, requests.asked(finished) if finished is not None else None)
    if finished is not None:
        folder.finish()
        requests.check_files(folder.path, finished)
        return finished
    run.events.into(folder.path / EVENTS)
    run.events("requested", folder=str(folder.path), resumed=folder.resumed, **request)
    notes = [requests.untrained(recipe), requests.undropped(recipe, opened.module), told]
    notes += [targeting.told(order.target) if order.target is not None else None]
    notes += [direction.text if direction is not None else None]
    notes += [order.model.planned_for_another(order.runtimes) if isinstance(order.model, Applied) else None]
    for text in filter(None, notes):
        run.warn(text)
    manifest, structure = store_source(run)
    source, layers = source_figures(run)
    diagnosis = forecast.before(run, order)
    metrics, hashes, destroyed = questions.source_metrics(run, run.task)
    beside = metrics if original is None else reference.reference_metrics(run, run.task, original)
    run.events("source", name=opened.name, metric=metrics["evaluate"], metric_name=run.task.metric_name)
    if small := requests.small_drop(order.goal, beside["evaluate"]):
        run.warn(small)
    return Prepared(
        order=order,
        run=run,
        name=opened.name,
        weights="" if opened.loaded is None else opened.loaded.file,
        machine=machine,
        recipe=recipe,
        recipe_data=recipe_data,
        data=data | hashes,
        original=original,
        metrics=metrics,
        beside=beside,
        looked_at="select" if run.task.select is not None else "evaluate",
        source=replace(source, metric=metrics["evaluate"]),
        layers=layers,
        manifest=manifest,
        structure=structure,
        doubts=(direction, destroyed),
        diagnosis=forecast.with_effort(diagnosis, run, order, recipe),
    )


def again(prepared: Prepared, recipe: Recipe, folder: RunFolder, *, seconds: float) -> Prepared:
    """The same source and task for another recipe in another folder; what is prepared already is not computed again.

    Args:
        prepared: Of the run that this one belongs to.
        recipe: Other steps.
        folder: Of the new run, resumed where it was begun.
        seconds: Timed seconds per artifact.

    Raises:
        PenjingError: The recipe does not fit the source or the task.
    """
    run, order = prepared.run, replace(prepared.order, recipe=recipe)
    opened = requests.with_teachers(recipe, run.task)
    requests.check_recipe(opened, run.network, run.task, run.seed)
    recipe_data = recipe.to_data()
    data = {role: sha for role, sha in prepared.data.items() if not role.startswith("teacher")}
    folder.claim(requests.request(run, prepared.name, order.goal, recipe_data, order.runtimes, data, prepared.original))
    if not (folder.path / SOURCE).exists():
        with folder.building(SOURCE) as aside:
            shutil.copytree(run.folder.path / SOURCE, aside, dirs_exist_ok=True, copy_function=_linked)
    if not (folder.path / EVIDENCE).exists():
        _linked(run.folder.path / EVIDENCE, folder.path / EVIDENCE)
    own = replace(run, folder=folder, seconds=seconds, drafts={}, warnings=[])
    return replace(prepared, order=order, run=own, recipe=opened, recipe_data=recipe_data)


def _linked(file: Path | str, other: Path | str) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _opened(order: Order) -> tuple[Source, Task, str | None]:
    """The source and the task in single precision, and what is to be told of that."""
    if isinstance(order.model, Applied):
        source = open_source(order.model.draft.network, task=order.task)
        return replace(source, name=order.model.name), order.task, None
    source = open_source(order.model)
    opened, task, told = in_single_precision(source, with_declared_axes(source, order.task))
    check_forward(opened, task)
    return opened, task, told


def _started(
    order: Order, opened: Source, original: Original | None, task: Task, folder: RunFolder, machine: Machine
) -> Run:
    events = Events(listeners=order.listeners)
    events("stage", name="capture")
    start = order.model.draft if isinstance(order.model, Applied) else None
    network = start.network if start is not None else capture_repeatable(opened, task)
    if task.evaluate is None and task.calibration is not None:
        agrees = (network, "the source") if original is None else (original.network, "the reference")
        task = agreement_task(task, *agrees)
    return Run(
        network=network,
        start=start,
        task=task,
        folder=folder,
        events=events,
        seed=order.seed,
        device=order.device,
        threads=order.bench.threads,
        batch=evidence.batch_size(task, order.bench.batch),
        seconds=order.bench.seconds,
        instruction_sets=machine.instruction_sets,
        target=order.target,
    )


def store_source(run: Run) -> tuple[Manifest, Any]:
    """Store the source as a torch artifact and its answers on a few samples; manifest and output structure."""
    args, kwargs = evidence.one_call(run.task, evidence.SAMPLES)
    start = time.perf_counter()
    with torch.no_grad():
        leaves, structure = flatten_outputs(run.network(*args, **kwargs))
    took = time.perf_counter() - start
    run.sample_s = took / evidence.SAMPLES
    time_limits.expect(took, sum(t.numel() for t in (*args, *kwargs.values())))
    finite.check_answers(leaves, structure)
    if not (run.folder.path / SOURCE).exists():
        with run.costing("export source"), run.folder.building(SOURCE) as aside:
            build(Draft(run.network), "torch", "fp32", run.task, structure, aside)
    manifest = read_manifest(run.folder.path / SOURCE)
    if not (run.folder.path / EVIDENCE).exists():
        evidence.store_source(run.folder, run.task, manifest, leaves)
    return manifest, structure


def source_figures(run: Run) -> tuple[Measured, tuple[LayerRow, ...]]:
    """Size, parameters and MACs of the source; its sizes are those of its weights and buffers alone."""
    rows = cost(run.network, run.task.call())
    state = run.network.state_dict().values()
    packed = run.folder.read_state("packed-source")
    if packed is None and compiled.available():
        with tempfile.TemporaryDirectory() as folder:
            weights = {name: tensor.detach().contiguous().clone() for name, tensor in run.network.state_dict().items()}
            save_file(weights, f"{folder}/{WEIGHTS_FILE}")
            packed = packed_bytes(Path(folder), [WEIGHTS_FILE])
        run.folder.write_state("packed-source", packed)
    figures = Measured(
        size_bytes=sum(t.numel() * t.element_size() for t in state),
        packed_bytes=packed,
        parameters=sum(p.numel() for p in run.network.parameters()),
        macs=sum(row.macs for row in rows),
        energy_mj=energy.modelled(rows, run.batch),
    )
    return figures, rows
