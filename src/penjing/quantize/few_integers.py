"""Few integers for a weight tensor: a codebook on the grid of its scales.

Han et al., "Deep Compression", ICLR 2016, on integers: each layer runs with the kernel of its grid as before, and what
there is to store of a weight is which of the few integers it has. Channels have scales of their own, and one codebook
in common, so that it is the shape of their distribution that its entries follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from penjing.analyze.output_gradients import squared_gradients
from penjing.errors import RecipeError, TaskError
from penjing.numerics.codebooks import kmeans
from penjing.numerics.grid import broadcast, integers
from penjing.steps.plan import LISTED, Entry, QuantSpec
from penjing.steps.step import Context

LEAST = 1e-3  # of the mean sensitivity: what every weight counts at least


def chosen(
    network: fx.GraphModule,
    entries: Mapping[str, Entry],
    counts: Mapping[str, int | None],
    context: Context,
    samples: int,
) -> dict[str, Entry]:
    """The entries of weights with few integers each; of those that have no more than these anyway, nothing.

    Args:
        network: Its batch norms are folded.
        entries: Edge → entry of the plan.
        counts: Edge → how many integers it may have; None is any. Edges that are not weights of layers are passed over.
        context: Has the calibration data, which says what an error of each weight counts.
        samples: Calibration samples that are read.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    layers = {edge: edge.removesuffix(":weight").split("@")[0] for edge in counts if edge.endswith(":weight")}
    names = {edge: f"{layer}.weight" for edge, layer in layers.items() if f"{layer}.weight" in parameters}
    if not any(counts[edge] for edge in names):
        return {}
    sensitivities = _sensitivities(network, set(names.values()), context, samples)
    few: dict[str, Entry] = {}
    for edge, name in names.items():
        entry, weight, count = entries[edge], parameters[name].detach(), counts[edge]
        if count is None or any(entry.zero_point):
            continue
        values = codebook(weight, torch.tensor(entry.scale), entry.spec, sensitivities[name], count)
        if values:
            few[edge] = replace(entry, spec=replace(entry.spec, grid=LISTED, values=values))
    return few


def check(where: str, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for settings of a codebook beside others that leave it nothing to choose from."""
    if values["weight_entries"] and (values["weight_grid"] != "uniform" or values["weight_symmetric"] is False):
        raise RecipeError(
            f"Static(weight_entries=...){where} chooses among the integers of a symmetric, uniform grid",
            code="settings",
            field="weight_entries",
            got=f"weight_grid={values['weight_grid']!r}, weight_symmetric={values['weight_symmetric']}",
            expected="weight_grid='uniform', and weight_symmetric left out",
        )


def codebook(
    weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec, sensitivity: torch.Tensor, count: int
) -> tuple[int, ...]:
    """At most `count` integers for a weight, by k-means; none if it has no more anyway.

    Args:
        weight: (out, in, …). Where it is exactly 0, it stays 0, which is then one of the integers.
        scale: (scales,), float32.
        spec: A uniform grid with a zero point of 0.
        sensitivity: What a squared error counts, in the shape of the weight.
        count: At least 2.
    """
    rounded = integers(weight, scale, torch.zeros_like(scale, dtype=torch.int32), spec)
    if len(torch.unique(rounded)) <= count:
        return ()
    steps = broadcast(scale, weight, spec).expand_as(weight)
    importance = (sensitivity / sensitivity.mean().clamp(min=1e-30)).clamp(min=LEAST) * steps.double().square()
    low, high = spec.limits
    exact = (weight / steps).clamp(low, high)
    used = weight != 0
    zeros = not bool(used.all())
    entries = kmeans(exact[used], importance[used], count - zeros).round().int().tolist()
    return tuple(sorted({*entries, *([0] if zeros else [])}))


def _sensitivities(network: fx.GraphModule, names: set[str], context: Context, samples: int) -> Mapping[str, Any]:
    """Parameter → the squared derivatives of the outputs; all alike where outputs have no derivatives."""
    try:
        return squared_gradients(network, sorted(names), context, samples)
    except TaskError as error:
        if error.code != "integer-outputs":
            raise
        return {name: torch.ones_like(network.get_parameter(name)) for name in names}


__all__ = ["check", "chosen", "codebook"]
