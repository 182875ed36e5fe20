"""From a draft to an artifact, and from an artifact to what its runtime really executes, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from penjing import runtimes
from penjing.analyze.cost import cost
from penjing.draft import Draft
from penjing.graph import RECURRENT, sites
from penjing.plan import Plan
from penjing.records import LayerRow
from penjing.runtimes import isolated
from penjing.runtimes.artifact import Manifest, write_manifest
from penjing.runtimes.loader import write_loader
from penjing.surgery import freeze
from penjing.surgery.recurrent import weights
from penjing.task import Call, Task

INTEGER = ("int8", "int8-bf16")
COUNTED = ("conv", "linear", "add", "matmul", "attention", "conv_transpose", "cat", "avg_pool", *RECURRENT)


def build(draft: Draft, runtime: str, precision: str, task: Task, structure: Any, folder: Path) -> Manifest:
    """Export a draft into an empty folder: the runtime's files, `manifest.json`, `load.py`."""
    network = freeze(draft.network, draft.plan if precision in INTEGER else Plan())
    manifest = runtimes.get(runtime).export(network, task.call(), task.dynamic, precision, structure, folder)
    write_loader(folder / "load.py", manifest, ".", 1)
    write_manifest(folder, manifest)
    return manifest


def executed_rows(
    network: fx.GraphModule, plan: Plan, call: Call, manifest: Manifest, folder: Path
) -> tuple[tuple[LayerRow, ...], dict[str, int], dict[str, int]]:
    """The cost of every layer with what the runtime really executed, and why it is not what was planned.

    Args:
        network: Of the draft that the artifact was built from.
        plan: Empty for a floating-point artifact.
        call: Example inputs.
        manifest: Of the artifact.
        folder: Where the artifact lies.

    Returns:
        Rows, and the operators by kind that ran in integers and in floating point.
    """
    precision = executed_precisions(folder, manifest)
    found = sites(network)
    rows = []
    for row in cost(network, call):
        executed = precision.get(row.name)
        # The input of a float layer may be quantized too: what counts for a layer is its weight.
        edge = "weight" if row.kind in ("conv", "linear") else "in0"
        planned = "int8" if f"{row.name}:{edge}" in plan.entries else manifest.settings.get("precision", "fp32")
        reason = None
        if manifest.precision in INTEGER and executed != "int8" and row.kind in COUNTED:
            reason = plan.floats.get(row.name) or _why_float(planned, executed, manifest.runtime)
        stored = row.weight_bytes // 2 if manifest.precision == "fp16" else _weight_bytes(network, found, row, plan)
        rows.append(replace(row, planned=planned, executed=executed, reason=reason, weight_bytes=stored))
    integer, floating = counted({row.name: row.kind for row in rows if row.name in found}, precision)
    return tuple(rows), integer, floating


def executed_precisions(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Site → the precision in which the runtime computes it: "int8" where any of its operators is integer."""
    precision: dict[str, str] = {}
    for operator in isolated.executed(folder, manifest):
        for name in operator.sites:
            precision[name] = "int8" if precision.get(name) == "int8" else operator.precision
    return precision


def counted(kinds: Mapping[str, str], precision: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """The operators by kind that ran in integers, and in floating point.

    Args:
        kinds: Site → kind.
        precision: Site → what `executed_precisions` tells; sites that it does not show are not counted.
    """
    integer: dict[str, int] = {}
    floating: dict[str, int] = {}
    for name, what in kinds.items():
        if what in COUNTED and name in precision:
            group = integer if precision[name] == "int8" else floating
            group[what] = group.get(what, 0) + 1
    return integer, floating


def _weight_bytes(network: fx.GraphModule, found: Mapping[str, fx.Node], row: LayerRow, plan: Plan) -> int:
    """Bytes of a layer's parameters as the artifact stores them: integer weights, int32 biases."""
    stored: dict[str, Any] = {}
    if row.kind in RECURRENT and f"{row.name}:in0" in plan.entries:
        stored = weights(network, found[row.name])
    elif f"{row.name}:weight" in plan.entries and row.weight_bytes:
        stored = {f"{row.name}:weight": network.get_submodule(row.name.split("@")[0]).weight}
    saved = sum(
        w.numel() * w.element_size() - -(-w.numel() * plan.entries[edge].spec.bits // 8) for edge, w in stored.items()
    )
    return row.weight_bytes - int(saved)


def _why_float(planned: str, executed: str | None, runtime: str) -> str:
    if planned != "int8":
        return "no edge of it is quantized"
    if executed is None:
        return f"{runtime} fused or removed it: its optimized graph does not show it"
    return f"{runtime} did not use an integer kernel although its inputs are integers"
