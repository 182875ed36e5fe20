"""What the optimizations before export gain: operators, parameters and multiply-accumulates that each removes."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import fx

from penjing.analyze.cost import Call, cost, totals
from penjing.network.graph import kind, tensor_inputs
from penjing.records import GainRow, LayerRow
from penjing.steps.draft import Draft, Edit
from penjing.steps.plan import Capabilities
from penjing.surgery.fold import fold_batch_norms

FOLDED = "batch norms folded"


def at_capture(network: fx.GraphModule) -> tuple[GainRow, ...]:
    """What was removed when the network was captured; an optimization that removed nothing has no row."""
    rows = network.meta.get("gained", ())
    return tuple(GainRow(name=name, operators=count) for name, count in rows if count)


def before_export(
    network: fx.GraphModule, call: Call, runtimes: Iterable[tuple[str, Capabilities]]
) -> tuple[GainRow, ...]:
    """What would be gained on the way to integer artifacts. The network is not modified.

    Args:
        network: A captured network.
        call: Example inputs.
        runtimes: Names, and what each is known to accelerate.
    """
    mine = copy.deepcopy(network)
    before = totals(cost(mine, call))
    edits = fold_batch_norms(mine)
    after = totals(cost(mine, call))
    folded = GainRow(
        name=FOLDED,
        operators=len(edits),
        parameters=before.parameters - after.parameters,
        macs=before.macs - after.macs,
    )
    fused = [GainRow(name=f"activations fused by {name}", operators=_fused(mine, known)) for name, known in runtimes]
    return tuple(row for row in (*at_capture(network), folded, *fused) if row.operators)


def _fused(network: fx.GraphModule, capabilities: Capabilities) -> int:
    """How many activations a runtime computes within the integer operator before them, as far as it is known."""
    fused = 0
    for node in network.graph.nodes:
        if node.op not in ("call_module", "call_function") or kind(network, node) not in capabilities.fuses:
            continue
        before = tensor_inputs(node)
        alone = len(before) == 1 and len(before[0].users) == 1
        fused += alone and kind(network, before[0]) in capabilities.integer
    return fused


def of_artifact(network: fx.GraphModule, draft: Draft, rows: Iterable[LayerRow], runtime: str) -> tuple[GainRow, ...]:
    """What was gained on the way to an artifact.

    Args:
        network: The source.
        draft: That the artifact was built from.
        rows: Of the artifact's layers, with what the runtime executed: None where its own graph does not show one.
        runtime: Its name.
    """
    folds = [edit for edit in draft.edits if edit.get("edit") == "fold"]
    unseen = sum(row.executed is None for row in rows)
    steps = [GainRow(name=FOLDED, operators=len(folds), parameters=_parameters_of(folds, network))] if folds else []
    steps += [GainRow(name=f"fused or removed by {runtime}", operators=unseen)] if unseen else []
    return (*at_capture(network), *steps)


def _parameters_of(folds: Iterable[Edit], network: fx.GraphModule) -> int:
    """How many parameters fewer the folding left: those of the norms, without the biases that layers got for them."""
    layers = dict(network.named_modules())
    count = 0
    for fold in folds:
        norm, layer = layers.get(fold["norm"]), layers.get(fold["layer"])
        if norm is None or layer is None:  # made by a step before
            continue
        count += sum(p.numel() for p in norm.parameters())
        if getattr(layer, "bias", None) is None:
            count -= int(norm.num_features)
    return count
