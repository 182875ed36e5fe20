"""The diagnosis of a run before it begins: told as soon as the source is there, kept for a resume."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from penjing.pipeline import effort
from penjing.pipeline.building import INTEGER
from penjing.pipeline.diagnosis import diagnose, prepared
from penjing.pipeline.order import Order
from penjing.pipeline.run import Run
from penjing.recipes.recipe import Recipe
from penjing.records import Diagnosis, from_dict


def before(run: Run, order: Order) -> Diagnosis | None:
    """What is to be expected; None where the diagnosis fails: the run goes on."""
    if stored := run.folder.read_state("diagnosis"):
        return from_dict(Diagnosis, stored)
    call = run.task.call()
    try:
        with run.costing("diagnose"):
            ready = {name: prepared(run.network, call, run.capabilities(name)) for name in order.runtimes}
            sets = run.instruction_sets if order.target is None else order.target.instruction_sets
            here, integers = order.target is None, _quantizes(run, order)
            diagnosis = diagnose(run.network, ready, sets, run.threads, here=here, quantizes=integers)
    except Exception as error:  # of a reading: the run tells of its own accord what it can't do
        run.warn(f"the network could not be diagnosed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return None
    run.events("diagnosis", **dataclasses.asdict(diagnosis))
    run.folder.write_state("diagnosis", dataclasses.asdict(diagnosis))
    return diagnosis


def with_effort(diagnosis: Diagnosis | None, run: Run, order: Order, recipe: Recipe) -> Diagnosis | None:
    """The diagnosis with what the run is expected to take, once its source was evaluated.

    A search says itself what it will try; what an interrupted run had expected stays.
    """
    if diagnosis is None or order.searches:
        return diagnosis
    if diagnosis.effort is None:
        integers = _quantizes(run, order)
        built = [
            sum(integers or precision not in INTEGER for precision in run.capabilities(name).precisions)
            for name in order.runtimes
        ]
        if order.auto:
            built = [max(built)]
        diagnosis = replace(diagnosis, effort=effort.expected(run, recipe, sum(built), len(built)))
        run.folder.write_state("diagnosis", dataclasses.asdict(diagnosis))
    assert diagnosis.effort is not None
    run.events("effort", **dataclasses.asdict(diagnosis.effort))
    return diagnosis


def _quantizes(run: Run, order: Order) -> bool:
    return order.searches or order.recipe.quantizes or (run.start is not None and bool(run.start.plan))
