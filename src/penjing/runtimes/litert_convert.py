"""From an exported program to a .tflite file with litert-torch, in a process of its own: the converter may end it."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from penjing.errors import ExportError


def convert(program_path: str, path: str, inputs: list[str], outputs: list[str]) -> None:
    """Write `path` from a program that `penjing.runtimes.litert_program.save` wrote.

    Args:
        program_path: The program, a .pt2 file.
        path: The .tflite file to write.
        inputs: Names of the inputs in the file's signature.
        outputs: Names of the outputs.

    Raises:
        ExportError: The converter knows no form of an operator.
    """
    with _quiet():
        import torch
        import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

        program = torch.export.load(program_path)
        _name_by_site(program)
        _apart(program)
        try:
            data = _flatbuffer(program, inputs, outputs)
        except Exception as error:
            raise _refusal(error, program) from error
        _check(data)
    Path(path).write_bytes(data)


def _name_by_site(program: Any) -> None:
    """Let the converter call what it makes of an operator by its site: it takes the names of modules."""
    from penjing.runtimes.decomposed import site
    from penjing.runtimes.litert import ADDED, named

    for node in program.graph.nodes:
        node.meta["nn_module_stack"] = {"site": ("", named(site(node)) or ADDED)}


def _apart(program: Any) -> None:
    """Keep the converter from computing in integers what has to be in floating point between quantizers.

    A concatenation of quantized values that the plan leaves in floating point would get the scale of its first value.
    A softmax would get steps of 1/256, in which the attention over a few hundred tokens is lost.
    """
    import torch

    forth = torch.ops.quantized_decomposed.quantize_per_tensor.default
    back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    aten, graph = torch.ops.aten, program.graph
    if not any(node.target is back for node in graph.nodes):
        return
    for node in list(graph.nodes):
        joins = node.target in (aten.cat.default, aten.stack.default)
        softmax = node.target in (aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
        quantized = any(x.target is back for x in node.all_input_nodes)
        if not softmax and not (joins and quantized and not any(user.target is forth for user in node.users)):
            continue
        _bar(node)
    graph.lint()
    program.graph_module.recompile()


def _in_floating_point(program: Any) -> None:
    """Keep the converter from computing in integers a function of one value that the plan leaves in floating point.

    Behind the layout pass, which would transpose in front of a barrier and back behind it.
    """
    import torch

    from penjing.runtimes.decomposed import floats

    back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(program.graph.nodes):
        if floats(node) and len(node.all_input_nodes) == 1 and node.all_input_nodes[0].target is back:
            _bar(node)
    program.graph.lint()
    program.graph_module.recompile()


def _bar(node: Any) -> None:
    """Let an operator read its inputs through a barrier, which the converter fuses nothing across."""
    from litert_torch.backend.optimization_barrier import optimization_barrier_op

    graph, parts = node.graph, node.all_input_nodes
    barred = (*parts, parts[0]) if len(parts) == 1 else tuple(parts)  # its lowering takes two at least
    with graph.inserting_before(node):
        barrier = graph.call_function(optimization_barrier_op, (barred,))
        barrier.meta["val"] = [x.meta["val"] for x in barred]
        for number, x in enumerate(parts):
            value = graph.call_function(operator.getitem, (barrier, number))
            value.meta.update(x.meta)
            node.replace_input_with(x, value)


def _pads_in_channels_last() -> None:
    """Let the converter's layout pass pad pictures whose channels come last, too.

    It would transpose them for this and back; in floating point later passes remove that, in front of integers not.
    """
    import torch
    from litert_torch._convert.fx_passes.optimize_layout_transposes_pass import layout_rewrite

    def pad(x: Any, sides: list[int], value: float = 0.0) -> Any:
        pairs = [tuple(sides[i : i + 2]) for i in range(0, len(sides), 2)]  # of the last axis first
        pairs += [(0, 0)] * (4 - len(pairs))
        width, height, channels, samples = pairs
        last = [n for pair in (channels, width, height, samples) for n in pair]
        return torch.ops.aten.constant_pad_nd.default(x, last, value)

    @layout_rewrite.rewriters.register(torch.ops.aten.constant_pad_nd.default)  # type: ignore[untyped-decorator]
    def _rewrite(node: Any) -> None:
        node.target = pad


def _flatbuffer(program: Any, inputs: list[str], outputs: list[str]) -> bytes:
    """What `litert_torch.convert` does with a module, from a program, with names of inputs and outputs."""
    from litert_converter.mlir import passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext
    from litert_torch import backend, fx_infra
    from litert_torch._convert import core
    from litert_torch.backend import inline_consts

    program = fx_infra.safe_run_decompositions(program, fx_infra.decomp.pre_convert_decomp(), can_skip=False)
    _pads_in_channels_last()
    program = core._run_convert_passes(program)
    _in_floating_point(program)
    context = backend.export_utils.create_ir_context()
    lowered = backend.export.exported_program_to_mlir(
        program, ir_context=context, lowering_context_plugins=[inline_consts.InlineConstsContext()]
    )
    converter_api_ext.set_signature(
        lowered.module.operation, signature_name="serving_default", input_names=inputs, output_names=outputs
    )
    module = converter_api_ext.merge_modules([lowered.module])
    config = converter_api_ext.ConvertToTFLConfig()
    config.model_origin_framework = "PYTORCH"
    config.qdq_conversion_mode = "DYNAMIC"  # "STATIC" makes inputs and outputs of integers
    config.unsafe_fuse_dynamic_shaped_broadcast = True
    config.canonicalizing_inf_as_min_max_float = False
    config.enable_x64 = False
    config.strict_qdq_mode = True
    with context:
        converter_api_ext.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        data: bytes = converter_api_ext.export_flatbuffer_to_bytes(module.operation)
    return data


def _check(data: bytes) -> None:
    """Raise ExportError if the runtime has no kernel for an operator that the converter wrote."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        Interpreter(model_content=data).allocate_tensors()
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        known = re.search(r"builtin opcode '(\w+)'", text)
        places = _places(data, known[1]) if known else []
        what = f"{known[1]} of {', '.join(places)}" if known and places else known[1] if known else "an operator"
        raise ExportError(
            f"LiteRT can't run the network: it has no kernel for {what}",
            code="no-litert-kernel",
            got=text[:400],
            expected="operators that LiteRT's processor kernels compute",
            remedy=_REMEDY,
        ) from error


def _places(data: bytes, operator: str) -> list[str]:
    """The sites that the operators of a type compute, by the names of their outputs."""
    from ai_edge_litert import schema_py_generated as schema

    from penjing.runtimes.litert import sites_of

    number = getattr(schema.BuiltinOperator, operator, None)
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    places: list[str] = []
    for graph in model.subgraphs:
        for op in graph.operators:
            if model.operatorCodes[op.opcodeIndex].builtinCode == number:
                places += [site for i in op.outputs for site in sites_of(graph.tensors[i].name.decode())]
    return list(dict.fromkeys(places))[:3]


def _refusal(error: Exception, program: Any) -> ExportError:
    """The converter's error, with the operator and the layer that it names."""
    from penjing.runtimes.decomposed import site

    text = " ".join(str(error).split())
    what, node = "", _lowered(error)
    if node is None and "output tokens" in text:  # torch's check of what such an operator could not compute
        node = next((n for n in program.graph.nodes if "linalg" in str(n.target)), None)
    if place := re.search(r'loc\("([^"]*);"\("([^"]+)"', text):
        what = f": {unquote(place[1])} ({place[2]})"
    elif target := re.search(r"Lowering not found: ([\w.]+)|target=torch\.ops\.([\w.]+)\]", text):
        name = target[1] or target[2]
        where = next((site(node) for node in program.graph.nodes if str(node.target) == name), "")
        what = f": {where} ({name})" if where else f": {name}"
    elif node is not None:
        what = f": {site(node) or node.name} ({node.target})"
    return ExportError(
        f"the network has no LiteRT form{what}",
        code="no-litert-form",
        got=f"{type(error).__name__}: {text[:400]}",
        expected="operators that LiteRT's converter knows",
        remedy=_REMEDY,
    )


def _lowered(error: BaseException | None) -> Any:
    """The operator that was being lowered when an error was raised, or None."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "run_node" and "node" in frame.f_locals:
                return frame.f_locals["node"]
        error = error.__cause__ or error.__context__
    return None


_REMEDY = "write that operator with others, or choose another runtime"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            import litert_torch
            from litert_torch._config import config

            config.show_progress = False
            del litert_torch
            yield
        finally:
            logging.disable(logging.NOTSET)
