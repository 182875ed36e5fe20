"""From a draft to an artifact, and from an artifact to what its runtime really executes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from penjing import measure, runtimes
from penjing.analyze.cost import cost
from penjing.errors import QuantizationError
from penjing.network.graph import RECURRENT, compute, sites, tensor_inputs
from penjing.records import LayerRow
from penjing.records.manifest import Manifest, write_manifest
from penjing.runtimes import isolated
from penjing.runtimes.loader import write_loader
from penjing.steps.draft import Draft
from penjing.steps.plan import Capabilities, Plan
from penjing.surgery import freeze, looked_up
from penjing.surgery.attention import zero_hidden_rows
from penjing.tasks.task import Call, Task

INTEGER = ("int8", "int8-bf16", "int8-fp16")
WHOLE = ("int8", "binary")  # how a runtime computes what it computes in integers
COUNTED = ("conv", "linear", "add", "matmul", "attention", "conv_transpose", "cat", "avg_pool", *RECURRENT)
TABLES = ("embedding",)  # nothing is multiplied: that they are stored in integers is all that is asked of them
LOOKED_UP = "it is stored in 8 bits; what is looked up becomes floating point, and nothing is multiplied"
TOLD = 0.1  # a share that stays in floating point and is larger is told


def build(
    draft: Draft, runtime: str, precision: str, task: Task, structure: Any, folder: Path, *, tuned: bool = True
) -> Manifest:
    """Export a draft into an empty folder: the runtime's files, `manifest.json`, `load.py`.

    Args:
        draft: What is exported.
        runtime: The runtime's name.
        precision: One of those that the runtime has.
        task: Gives an example, and the axes that vary.
        structure: Of the network's outputs.
        folder: An empty one.
        tuned: Whether time may go into making it fast; not where all that counts is whether it runs.
    """
    network = zero_hidden_rows(freeze(draft.network, draft.plan if precision in INTEGER else Plan()))
    if precision not in INTEGER:
        network.meta["codebooks"] = looked_up(draft.network, draft.codebooks)
    network.meta["tuned"] = tuned
    manifest = runtimes.get(runtime).export(network, task.call(), task.dynamic, precision, structure, folder)
    write_loader(folder / "load.py", manifest, ".", 1)
    write_manifest(folder, manifest)
    return manifest


def executed_rows(
    network: fx.GraphModule,
    plan: Plan,
    call: Call,
    manifest: Manifest,
    folder: Path,
    capabilities: Capabilities | None = None,
) -> tuple[tuple[LayerRow, ...], dict[str, int], dict[str, int]]:
    """The cost of every layer with what the runtime really executed, and why it is not what was planned.

    Args:
        network: Of the draft that the artifact was built from.
        plan: Empty for a floating-point artifact.
        call: Example inputs.
        manifest: Of the artifact.
        folder: Where the artifact lies.
        capabilities: What the plan was made for; None: what the runtime accelerates on this machine.

    Returns:
        Rows, and the operators by kind that ran in integers and in floating point: as planned, where the runtime does
        not run here.
    """
    if capabilities is None:
        capabilities = runtimes.get(manifest.runtime).capabilities(measure.machine(1).instruction_sets)
    elsewhere = bool(runtimes.absent(manifest.runtime))
    precision = {} if elsewhere else executed_precisions(folder, manifest)
    nodes = sites(network)
    rows = []
    for row in cost(network, call):
        executed = precision.get(row.name)
        # The input of a float layer may be quantized too: what counts for a layer is its weight.
        edge = "weight" if row.kind in ("conv", "linear", *TABLES) else "in0"
        integers = f"{row.name}:{edge}" in plan.entries and row.name not in plan.floats
        planned = "int8" if integers else manifest.settings.get("precision", "fp32")
        matters = row.kind in COUNTED or row.macs or row.parameters
        reason = None
        if elsewhere and integers and manifest.precision in INTEGER:
            precision[row.name] = "int8"  # what it is planned to be, for the counts
        elif elsewhere:
            precision[row.name] = "fp16"
        if manifest.precision in INTEGER and executed != "int8" and matters and not (elsewhere and integers):
            reason = plan.floats.get(row.name) or _why_float(row.kind, planned, executed, capabilities)
        weights = _stored_edges(network, nodes.get(row.name), row.name) & plan.entries.keys()
        size = row.weight_bytes // 2 if manifest.precision == "fp16" else _weight_bytes(network, nodes, row, plan)
        stored = "int8" if weights else None
        rows.append(replace(row, planned=planned, executed=executed, reason=reason, weight_bytes=size, stored=stored))
    integer, floating = counted({row.name: row.kind for row in rows if row.name in nodes}, precision)
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
            group = integer if precision[name] in WHOLE else floating
            group[what] = group.get(what, 0) + 1
    return integer, floating


def float_shares(rows: Iterable[LayerRow]) -> tuple[float, float]:
    """How much of an integer artifact stays in floating point: of its products, and of the bytes of its parameters.

    What a runtime fused so that its graph does not show it counts as it was planned.
    """
    rows = tuple(rows)
    macs = sum(row.macs for row in rows if (row.executed or row.planned) != "int8")
    size = sum(row.weight_bytes for row in rows if row.stored != "int8")
    return macs / max(1, sum(r.macs for r in rows)), size / max(1, sum(r.weight_bytes for r in rows))


def float_doubts(name: str, rows: Sequence[LayerRow]) -> tuple[str, ...]:
    """Warnings for an integer artifact of which more than a tenth stays in floating point, with the reasons."""
    told = []
    computed, stored = float_shares(rows)
    for share, what, sizes, why in (
        (computed, "multiply-accumulates", {r.name: r.macs for r in rows if r.executed != "int8"}, lambda r: r.reason),
        (stored, "bytes of its parameters", {r.name: r.weight_bytes for r in rows if not r.stored}, _why_not_stored),
    ):
        if share <= TOLD:
            continue
        reasons: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda r: -sizes.get(r.name, 0)):
            if sizes.get(row.name) and (reason := why(row)):
                reasons.setdefault(reason, []).append(row.name)
        most = [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
            for reason, names in list(reasons.items())[:3]
        ]
        told.append(
            f"{name}: {share:.0%} of the {what} stay in floating point ({'; '.join(most) or 'no reason known'})"
        )
    return tuple(told)


def _why_not_stored(row: LayerRow) -> str | None:
    """Why a layer's tensors are floats in the file; of kinds that have integer weights it is why it computes so."""
    if row.kind in ("conv", "linear", "conv_transpose", *TABLES, *RECURRENT):
        return row.reason
    return (
        "only weights of convolutions, linear and recurrent layers and tables that are looked up are stored in 8 bits"
    )


def check_integers(name: str, plan: Plan) -> None:
    """Raise QuantizationError if a plan has no integer operator: its artifact may not be called INT8."""
    if any(not edge.endswith(":weight") for edge in plan.entries):
        return
    reasons = list(dict.fromkeys(plan.floats.values()))
    raise QuantizationError(
        f"{name} would have no integer operator",
        code="no-integers",
        got="; ".join(reasons[:3]) or "no operator that has an integer kernel",
        expected="a convolution, a linear layer or a product that the runtime computes in integers",
        remedy="use the floating-point artifact; fp16 halves its size",
    )


def _stored_edges(network: fx.GraphModule, node: fx.Node | None, name: str) -> set[str]:
    """Edges of a plan that stand for the stored tensors of an operator."""
    if node is None or node.op == "call_module":
        return {f"{name}:weight"}
    return {f"{name}:in{port}" for port, read in enumerate(tensor_inputs(node)) if read.op == "get_attr"}


def _weight_bytes(network: fx.GraphModule, nodes: Mapping[str, fx.Node], row: LayerRow, plan: Plan) -> int:
    """Bytes of a layer's parameters as the artifact stores them: integer weights, int32 biases."""
    stored: dict[str, Any] = {}
    node = nodes.get(row.name)
    if f"{row.name}:weight" in plan.entries and row.weight_bytes:
        stored = {f"{row.name}:weight": network.get_submodule(row.name.split("@")[0]).weight}
    elif node is not None and node.op == "call_function" and row.weight_bytes:
        edges = _stored_edges(network, node, row.name) & plan.entries.keys()
        read = {f"{row.name}:in{port}": tensor for port, tensor in enumerate(tensor_inputs(node))}
        stored = {edge: compute(network, read[edge], (), {}) for edge in sorted(edges)}
    saved = sum(
        w.numel() * w.element_size() - -(-w.numel() * plan.entries[edge].spec.bits // 8) for edge, w in stored.items()
    )
    return row.weight_bytes - int(saved)


def _why_float(kind: str, planned: str, executed: str | None, capabilities: Capabilities) -> str:
    if kind in TABLES and planned == "int8":
        return LOOKED_UP
    runtime = capabilities.runtime
    if kind not in capabilities.integer | capabilities.fuses | capabilities.passthrough:
        return capabilities.without_kernel(kind)
    if planned != "int8":
        return "no edge of it is quantized"
    if executed is None:
        return f"{runtime} fused or removed it: its optimized graph does not show it"
    return f"{runtime} did not use an integer kernel although its inputs are integers"
