"""A frozen network as an ONNX file with QuantizeLinear and DequantizeLinear: what several runtimes read."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from penjing.errors import ExportError
from penjing.network.exporting import export, input_names, port_names, with_plain_outputs
from penjing.network.graph import line
from penjing.numerics.codebooks import LookedUp
from penjing.onnx_files import export_cache
from penjing.onnx_files import pooling as onnx_pooling
from penjing.onnx_files import rewrites as onnx_rewrites
from penjing.onnx_files.codebooks import look_up
from penjing.onnx_files.decompositions import node_by_node
from penjing.onnx_files.exporter_table import read_once
from penjing.onnx_files.node_names import name_nodes
from penjing.onnx_files.translations import translations
from penjing.records.manifest import Port

OPSET = 18
_PORTS = "/port/"  # inputs and outputs, until they get their names: the exporter calls nothing so


def write(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: Any,
    outputs: list[str],
    path: Path,
    half: bool = False,
    codebooks: Mapping[str, LookedUp] | None = None,
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Write `path`; nodes are called by the sites of the network, inputs by the parameters of its forward.

    Args:
        network: A captured network, frozen where it is quantized.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        outputs: Names of the flat outputs.
        path: The file to write.
        half: Store weights in half precision; they are cast to float32 when the file is loaded.
        codebooks: Parameter → its codebook; such weights are stored as indices and looked up when the file is loaded.

    Returns:
        The ports of the inputs and of the outputs.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    import onnx

    key = export_cache.fingerprint(network, call, dynamic, outputs)
    data = export_cache.recall(key)
    if data is None:
        data = _exported(network, call, dynamic, outputs)
        export_cache.store(key, data)
    model = onnx.load_from_string(data)
    if codebooks:
        look_up(model, codebooks)
    if half:
        onnx_rewrites.store_in_half(model)
    if half or codebooks:
        data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(model)
    path.write_bytes(data)
    return _ports(model.graph.input), _ports(model.graph.output)


def _exported(
    network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Any, outputs: list[str]
) -> bytes:
    program = export(with_plain_outputs(network), call, dynamic)
    inputs = input_names(network, *call)
    # The exporter passes through the operators twice. Where an attention mask needs gradients (a learned bias), torch
    # takes another kernel, and the strides it gives would not be those that views were decided by: no gradients then.
    with quiet(), torch.no_grad(), read_once(OPSET), node_by_node():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=onnx_pooling.translations() | translations(),
                input_names=[f"{_PORTS}in{i}" for i in range(len(inputs))],
                output_names=[f"{_PORTS}out{i}" for i in range(len(outputs))],
                verbose=False,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the outer ones only say in which step it happened
                cause = cause.__cause__
            raise ExportError(
                f"the network has no ONNX form{_culprit(network, str(cause))}",
                code="no-onnx-form",
                got=f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}",
                expected="operators that the ONNX exporter of torch translates",
                remedy="write it with the real and the imaginary part, as of torch.view_as_real"
                if "complex-valued" in str(cause)
                else "write that operator with others",
            ) from error
    assert exported is not None
    model = exported.model_proto
    _name_ports(model, *port_names(network, inputs, outputs))
    onnx_rewrites.pool_globally(model)
    onnx_rewrites.pad_in_convolutions(model)
    onnx_rewrites.turn_for_each(model)
    onnx_rewrites.read_sizes_behind(model)
    name_nodes(model, network)
    onnx_rewrites.drop_unread(model)
    _tidy(model, inputs, call, dynamic)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _culprit(network: fx.GraphModule, message: str) -> str:
    """The operator that an error of the exporter names, and its line; nothing where it names none."""
    named = re.search(r"op='(\w+)\.(\w+)'", message)
    if named is None:
        return ""
    where = next((node for node in network.graph.nodes if f"{named[1]}.{named[2]}." in f"{node.target}."), None)
    return f": {named[1]}.{named[2]}" + (line(where) if where is not None else "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is shown inside the block.

    The exporter logs what is missing in its own surroundings and prints its progress; the user asked for neither.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]  # what it can't fold stays as it is
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_ports(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Call inputs and outputs as the user does; what the exporter called so is called otherwise.

    An output that is called as an input gets an underscore: an ONNX file has one name for one value. The user's own
    keys stand in `Manifest.structure`.
    """
    ports = {value.name: name for value, name in zip(model.graph.input, inputs, strict=True)}
    for value, word in zip(model.graph.output, outputs, strict=True):
        name = word or "output"
        while name in ports.values():
            name += "_"
        ports[value.name] = name
    words = set(ports.values())
    values = {name for graph in onnx_rewrites.graphs(model.graph) for name in _values(graph)} | words
    for name in sorted(words - ports.keys()):
        other = name
        while other in values:
            other += "_"
        values.add(other)
        ports[name] = other
    for graph in onnx_rewrites.graphs(model.graph):
        for part in [*graph.initializer, *graph.input, *graph.output, *graph.value_info]:
            part.name = ports.get(part.name, part.name)
        for node in graph.node:
            node.input[:] = [ports.get(name, name) for name in node.input]
            node.output[:] = [ports.get(name, name) for name in node.output]


def _values(graph: Any) -> Iterator[str]:
    yield from (part.name for part in [*graph.initializer, *graph.input, *graph.output, *graph.value_info])
    for node in graph.node:
        yield from (*node.input, *node.output)


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
