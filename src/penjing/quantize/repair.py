"""The common part of repairs: a new weight for each layer of the replica, and a bias that restores its means."""

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
    """Repair the layers of a draft in execution order, each on the outputs of its repaired predecessors.

    Args:
        draft: With a plan; it is not modified.
        context: Its task has the calibration data.
        samples: Number of samples, which are in memory at once.
        label: Name under which progress is reported.
        weigh: Returns the new weight of a layer; `layer.weight` to keep it, None if the repair does not support the
            layer. The number of supported quantized layers is reported as "covered".
        pieces: Minimum number of chunks that the samples are divided into.
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
        outputs = layer.replica_outputs(weight)
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
