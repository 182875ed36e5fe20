"""A frozen network as an ONNX file with QuantizeLinear and DequantizeLinear: what several runtimes read."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing import operators  # noqa: F401  registers the operators that are translated here
from penjing.errors import ExportError
from penjing.network import export, input_names, operator_name, site
from penjing.runtimes.artifact import Port

OPSET = 18


def write(
    network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Any, outputs: list[str], path: Path
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Write `path`; nodes are called by the sites of the network, inputs by the parameters of its forward.

    Args:
        network: A raised network, frozen where it is quantized.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        outputs: Names of the flat outputs.
        path: The file to write.

    Returns:
        The ports of the inputs and of the outputs.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    import onnx

    program = export(network, call, dynamic)
    inputs = input_names(network, *call)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                "the network has no ONNX form",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
                expected="operators that the ONNX exporter of torch translates",
            ) from error
    assert exported is not None
    model = exported.model_proto
    _rename_nodes(model, _site_by_program_node(network, program))
    _tidy(model, inputs, call, dynamic)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return _ports(model.graph.input), _ports(model.graph.output)


def _translations() -> dict[Any, Any]:
    from onnxscript import opset18 as op

    def quantize(x, scale, zero_point, axis: int, low: int, high: int):  # type: ignore[no-untyped-def]
        if low in (-128, 0) and high in (127, 255):
            return op.QuantizeLinear(x, scale, zero_point, axis=axis)
        # A narrow range has no ONNX type of its own: clip in integers, where the edges are exact.
        q = op.QuantizeLinear(x, scale, zero_point, axis=axis)
        return op.Clip(q, op.CastLike(op.Constant(value_int=low), q), op.CastLike(op.Constant(value_int=high), q))

    def dequantize(q, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    return {torch.ops.penjing.quantize.default: quantize, torch.ops.penjing.dequantize.default: dequantize}


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter logs what is missing in its own surroundings and prints its progress; the user asked for neither."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _site_by_program_node(network: fx.GraphModule, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Exporting traces the network node by node, so the n-th call of an operator here is the n-th there."""
    mine: dict[str, list[str]] = defaultdict(list)
    for node in network.graph.nodes:
        if node.op == "call_module":
            mine[_layer_operator(network.get_submodule(str(node.target)))].append(site(node))
        elif node.op == "call_function":
            mine[operator_name(node)].append(str(node.meta.get("site", "")))
    theirs: dict[str, list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            theirs[operator_name(node)].append(node.name)
    pairs: dict[str, str] = {}
    for name, nodes in theirs.items():
        if len(nodes) == len(mine[name]):
            pairs |= {node: where for node, where in zip(nodes, mine[name], strict=True) if where}
    return pairs


def _layer_operator(module: torch.nn.Module) -> str:
    name = type(module).__name__
    fixed = {"Linear": "linear", "Embedding": "embedding", "Dropout": "dropout", "LayerNorm": "layer_norm"}
    if name.startswith("ConvTranspose"):
        return f"conv_transpose{name[-2]}d"
    if name.startswith("Conv"):
        return f"conv{name[-2]}d"
    return fixed.get(name, "group_norm" if name == "GroupNorm" else "batch_norm")


def _rename_nodes(model: Any, sites: dict[str, str]) -> None:
    taken: set[str] = set()
    for node in model.graph.node:
        origin = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.fx_node"), "")
        name = origin.split(" ")[0].removeprefix("%").rstrip(":")
        if name in sites:
            # One source operator may become several ONNX nodes: the type tells them apart.
            wanted = sites[name] if sites[name] not in taken else f"{sites[name]}|{node.op_type}"
            node.name = wanted if wanted not in taken else f"{wanted}|{node.name}"
        taken.add(node.name)


def _tidy(model: Any, inputs: list[str], call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Any) -> None:
    """Name the axes that vary; drop traces of the machine that exported (paths, stack traces)."""
    symbols: dict[str, str] = {}
    for position, (name, value) in enumerate(zip(inputs, model.graph.input, strict=False)):
        axes = {0: "batch"} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))
        for axis, word in axes.items():
            dims = value.type.tensor_type.shape.dim
            if axis < len(dims) and dims[axis].dim_param:
                symbols[dims[axis].dim_param] = word
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.get(dim.dim_param, dim.dim_param)
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for part in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer, model.graph]:
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]


def _ports(values: Any) -> tuple[Port, ...]:
    import onnx

    return tuple(
        Port(
            name=value.name,
            dtype=str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
