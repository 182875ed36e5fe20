"""Every importance score by name, as `Channels` and `Magnitude` take it in `criterion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from penjing.analyze.coupling import Coupling
from penjing.prune.by_activation import ACTIVATION
from penjing.prune.by_curvature import HESSIAN
from penjing.prune.by_gradient import FISHER, GRADIENT, JACOBIAN, TAYLOR
from penjing.prune.by_weight import BN_SCALE, GEOMETRIC_MEDIAN, L1, L2, MAGNITUDE, RANDOM
from penjing.prune.scoring import Criterion, Evidence, Scores, WeightScores
from penjing.steps.step import Context

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        MAGNITUDE, L1, L2, BN_SCALE, GEOMETRIC_MEDIAN, ACTIVATION, GRADIENT, TAYLOR, FISHER, JACOBIAN, HESSIAN, RANDOM,
    )
}  # fmt: skip

OF_UNITS = tuple(name for name, criterion in CRITERIA.items() if criterion.units is not None)
OF_WEIGHTS = tuple(name for name, criterion in CRITERIA.items() if criterion.weights is not None)


def score_units(criterion: str, network: fx.GraphModule, coupling: Coupling, context: Context, batches: int) -> Scores:
    """Group → importance score of every unit (units,), at least 0; units with small scores are removed first.

    Args:
        criterion: One of `OF_UNITS`.
        network: A captured network; it is left unchanged.
        coupling: Its groups of coupled channels.
        context: Has the data and the seed.
        batches: How many batches are read.
    """
    score = CRITERIA[criterion].units
    assert score is not None, criterion
    return score(Evidence(network=network, context=context, batches=batches, seed=context.seed), coupling)


def score_weights(
    criterion: str, network: fx.GraphModule, modules: Mapping[str, Any], context: Context, batches: int
) -> WeightScores:
    """Layer → importance score of every weight, at least 0, in the layout of the layer's weight.

    Args:
        criterion: One of `OF_WEIGHTS`.
        network: A captured network; it is left unchanged.
        modules: Its layers that are scored, by name.
        context: Has the labelled data, the loss and the seed.
        batches: How many batches are read.
    """
    score = CRITERIA[criterion].weights
    assert score is not None, criterion
    return score(Evidence(network=network, context=context, batches=batches, seed=context.seed), modules)


def for_context(criterion: str, context: Context) -> str:
    """Resolve "auto" to the best criterion for units that the task has data for."""
    if criterion != "auto":
        return criterion
    task = context.task
    if task.train is not None and task.loss is not None:
        return TAYLOR.name
    return JACOBIAN.name if task.calibration is not None else L2.name


def relative(scores: Scores) -> Scores:
    """Scores divided by their group's mean, which makes groups of different scales comparable."""
    return {name: value / max(float(value.mean()), 1e-300) for name, value in scores.items()}
