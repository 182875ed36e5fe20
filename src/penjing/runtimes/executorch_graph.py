"""What ExecuTorch executes: the operators of an artifact's file, those of its XNNPACK delegates among them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from penjing.runtimes.artifact import Executed
from penjing.runtimes.executorch_lowering import SITES

_MOVES = ("et_view", "sym_size", "quantize_per_tensor", "dequantize_per_tensor")
_FLOATS = {"xnn_datatype_fp16": "fp16", "xnn_datatype_bf16": "bf16"}


def operators(data: bytes) -> list[Executed]:
    """Every operator of a .pte file in the order of its calls, delegates' operators with the precision they compute in.

    An operator that XNNPACK fused into the one before it, such as an activation function, is not shown.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(data).program
    plans = {plan.name: plan for plan in program.execution_plan}
    sites: dict[str, Any] = {"delegated": {}, "portable": {}}
    if SITES in plans:
        sites = json.loads(plans[SITES].values[0].val.string_val)
    plan = plans["forward"]
    rows: list[Executed] = []
    for instruction in plan.chains[0].instructions:
        call: Any = instruction.instr_args
        if hasattr(call, "delegate_index"):
            delegate = plan.delegates[call.delegate_index]
            graph = _graph(program.backend_delegate_data[delegate.processed.index].data)
            rows += _delegated(graph, sites["delegated"])
        elif hasattr(call, "op_index"):
            name = plan.operators[call.op_index].name
            places = sites["portable"].get(name, [])
            place = places.pop(0) if places else ""
            if name.partition("::")[2] not in _MOVES:
                rows.append(Executed((place,) if place else (), name, "fp32"))
    return rows


def _graph(data: bytes) -> dict[str, Any]:
    """The graph of an XNNPACK delegate, as its schema names its parts."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = serialization.XNNHeader.from_bytes(bytes(data[: serialization.XNNHeader.EXPECTED_LENGTH]))
    with tempfile.TemporaryDirectory() as aside:
        schema, binary = Path(aside) / "schema.fbs", Path(aside) / "graph.bin"
        schema.write_bytes(serialization._get_schema_bytes())
        binary.write_bytes(data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(aside, str(schema), str(binary), ["--raw-binary"])
        text = (Path(aside) / "graph.json").read_text(encoding="utf-8")
    graph: dict[str, Any] = json.loads(re.sub(r": -?(?:inf|nan)\b", ": null", text))  # bounds that an operator lacks
    return graph


def _delegated(graph: dict[str, Any], sites: dict[str, str]) -> list[Executed]:
    types = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        types[tensor["id_out"]] = tensor["datatype"]
    rows = []
    for node in graph["xnodes"]:
        what, parts = node["xnode_union_type"], node["xnode_union"]
        read = [types.get(parts[key], "") for key in ("input1_id", "input_id") if key in parts]
        place = sites.get(str(node["debug_handle"]), "")
        if what in ("XNNConvert", "XNNStaticReshape"):
            continue
        integer = any(datatype.startswith("xnn_datatype_q") for datatype in read)
        rows.append(Executed((place,) if place else (), what, "int8" if integer else _FLOATS.get(read[0], "fp32")))
    return rows
