"""What a run takes: seconds and memory, expected from what the source took, its size and its operators."""

from __future__ import annotations

from penjing import measure
from penjing.analyze.cost import peak_activation_bytes
from penjing.pipeline.run import Run
from penjing.quantize import BiasCorrection, CoordinateRounding, Static
from penjing.recipes.recipe import Recipe
from penjing.records import Effort
from penjing.steps.step import Step

# Of `benchmarks/diagnosis.py`, on a machine with two cores.
OPERATOR_S = 0.03  # to export one operator
OPEN_S = 2.5  # to start a runtime's process and open an artifact: once to judge it, and once more to time it
PASSES = 2.0  # of a sample through the network with statistics, in passes without
WEIGHT_S = 2.5e-6  # to search the rounding of one weight
EVALUATED = 0.5  # of the time that the metric takes on the source: runtimes are faster, the data are not
COPIES = 4  # of the weights: source, draft, frozen, exported
SAMPLES = 64  # that are held together


def expected(run: Run, recipe: Recipe, candidates: int, runtimes: int) -> Effort:
    """The effort of a run whose source has been evaluated.

    Args:
        run: With the costs of its source.
        recipe: The steps.
        candidates: Artifacts to be built.
        runtimes: For which the steps that depend on one are taken.
    """
    operators = sum(node.op in ("call_module", "call_function") for node in run.network.graph.nodes)
    weights = sum(p.numel() for p in run.network.parameters())
    known, unknown = 0.0, []
    for step in recipe:
        seconds = _step_s(step, run.sample_s, weights)
        if seconds is None:
            unknown.append(type(step).__name__)
        else:
            known += seconds * (runtimes if step.per_runtime else 1)
    evaluated = EVALUATED * sum(cost.wall_s for cost in run.costs if cost.name == "evaluate source")
    known += candidates * (OPERATOR_S * operators + evaluated + 2 * OPEN_S) + OPEN_S
    known += (candidates + 1) * run.seconds
    size = sum(p.numel() * p.element_size() for p in run.network.parameters())
    memory = measure.peak_memory_bytes() + COPIES * size
    memory += SAMPLES * peak_activation_bytes(run.network, run.task.call())
    return Effort(
        candidates=candidates,
        expected_s=round(known, 1),
        unknown=tuple(dict.fromkeys(unknown)),
        expected_memory_bytes=memory,
    )


def _step_s(step: Step, sample_s: float, weights: int) -> float | None:
    """Seconds of a step; None where they are not known beforehand."""
    minutes = getattr(step, "minutes", None)
    if isinstance(minutes, int | float):
        return 60.0 * minutes
    if isinstance(step, Static | BiasCorrection):
        return PASSES * step.samples * sample_s
    if isinstance(step, CoordinateRounding):
        return PASSES * step.samples * sample_s + WEIGHT_S * weights
    return None
