"""What repairs of rounding share: layer by layer a weight for the replica, and a bias that gives its means back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from penjing.analyze import lockstep
from penjing.analyze.samples import chunks
from penjing.network.graph import kind, sites
from penjing.steps.draft import Draft
from penjing.steps.step import Context


def repaired(
    draft: Draft,
    context: Context,
    samples: int,
    label: str,
    weigh: Callable[[lockstep.Layer], torch.Tensor | None],
    pieces: int = 1,
) -> Draft:
    """A draft whose layers were repaired in the order of execution, each behind its repaired predecessors.

    Args:
        draft: With a plan; stays as it is.
        context: Its task has the calibration data.
        samples: So many of them are held in memory together.
        label: What progress is reported as.
        weigh: The weight that a layer shall have; `layer.weight` where it keeps its own, None where the repair does
            not reach it. How many of the quantized layers it reaches is reported as "covered".
        pieces: The samples come in at least so many chunks.
    """
    if not draft.plan:
        return draft
    source = draft.network
    draft = draft.copy()
    layers = lockstep.countable(source)
    done: list[str] = []
    covered: set[str] = set()

    def watch(layer: lockstep.Layer) -> list[torch.Tensor] | None:
        if layer.site not in layers:
            return None
        module: Any = draft.network.get_submodule(layer.site)
        weight = weigh(layer)
        if weight is not None and layer.entry is not None:
            covered.add(layer.site)
        if weight is None:
            weight = layer.weight
        elif weight is not layer.weight:
            module.weight.copy_(weight)
        done.append(layer.site)
        context.events("progress", label=label, done=len(done), total=len(layers))
        outputs = layer.twin_outputs(weight)
        if module.bias is None:
            return outputs
        shift = layer.shift(outputs)
        module.bias += shift.to(module.bias.dtype)
        return lockstep.shifted(outputs, shift, layer.axis)

    lockstep.run(source, draft.plan, chunks(context, source, samples, pieces), watch)
    tables = {f"{name}:weight" for name, node in sites(source).items() if kind(source, node) == "embedding"}
    total = sum(edge.endswith(":weight") and edge not in tables for edge in draft.plan.entries)
    context.events("covered", step=label, layers=len(covered), total=total)
    return replace(draft)
