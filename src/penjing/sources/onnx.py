"""Opening an ONNX file as a network that trains, whoever exported it. The file is data: nothing in it is executed.

Tensors that lie in files of their own are read from the folder of the file alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from penjing.errors import CheckpointError, MissingDependency, PenjingError, SourceError
from penjing.onnx_files.build import build
from penjing.onnx_files.network import OnnxNetwork
from penjing.onnx_files.node import LARGEST
from penjing.onnx_files.operators.elementwise import TYPES
from penjing.onnx_files.read import prepared
from penjing.records import reading

MOST_BYTES = 1 << 31
"""Of a file: what a protocol buffer holds. Larger networks keep their tensors in files beside it."""
FIRST_SET = 7
"""The oldest set of operators that is read."""
_QUANTIZED = frozenset((
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits", "QuantizeLinear",
    "QLinearConv", "QLinearMatMul",
))  # fmt: skip


def open_model(path: Path) -> Any:
    """Read and check a file, with the tensors that lie beside it.

    Raises:
        MissingDependency: The package onnx is not installed.
        CheckpointError: The file is damaged, or names files outside its folder.
        SourceError: Its operators are of a set that is not read, or it is quantized already.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency(
            "ONNX files are read with the package onnx",
            code="not-installed",
            got="it is not installed",
            expected="onnx and onnxscript",
            remedy="pip install onnx onnxscript",
        ) from None
    try:
        content = reading.data(path, MOST_BYTES)
        model = onnx.load_model_from_string(content)
        _check_external(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        _check(model)
    except CheckpointError:
        raise
    except Exception as error:  # of the system, of protocol buffers and of onnx's checker
        raise CheckpointError(
            "the ONNX file can't be read",
            code="damaged",
            got=f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            expected="a valid ONNX model, with its external data beside it",
            remedy="download or export it again; onnx.checker.check_model(path) says what is wrong",
        ) from error
    _check_sets(model, path)
    _check_floating(model, path)
    return model


def _check(model: Any) -> None:
    """Onnx's own check; inputs and outputs of an unknown rank, which runtimes take, are none of its business."""
    import onnx

    open_ranks = [
        value.type.tensor_type
        for value in [*model.graph.input, *model.graph.output]
        if value.type.tensor_type.elem_type and not value.type.tensor_type.HasField("shape")
    ]
    for kind in open_ranks:
        kind.shape.SetInParent()
    onnx.checker.check_model(model)
    for kind in open_ranks:
        kind.ClearField("shape")


def open_network(path: Path | str, **fixed: float) -> tuple[OnnxNetwork, Any, Mapping[str | int, Mapping[int, str]]]:
    """The network of a file, with what the file declares of its inputs.

    Args:
        path: The file.
        fixed: Inputs that are numbers from now on, by their names: ``sr=16000`` takes the branch for it.

    Returns:
        The network, in eval mode; example inputs or None; the axes that vary, in the form of `Task.dynamic`.

    Raises:
        SourceError: As `open_model`; or an operator can't be taken, or there is no such input.
    """
    path = Path(path)
    model = open_model(path)
    if fixed:
        _fix(model, fixed, path)
    try:
        network = build(prepared(model), path.name).eval()
        example, dynamic = declared_inputs(model)
        network.declared, network.fixed_axes = _described(model), _fixed_axes(model, dynamic)
    except PenjingError:
        raise
    except Exception as error:  # what the check leaves: names that are no text, nesting without end, damaged tensors
        raise CheckpointError(
            "the ONNX file can't be read",
            code="damaged",
            got=f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            expected="a valid ONNX model of tensors of numbers",
            remedy="download or export it again; onnx.checker.check_model(path, full_check=True) may say more",
        ) from error
    return network, example, dynamic


def _fix(model: Any, fixed: Mapping[str, float], path: Path) -> None:
    """Make inputs constants."""
    import onnx

    inputs = {value.name: value for value in model.graph.input}
    for name, number in fixed.items():
        if name not in inputs:
            raise SourceError(
                "the ONNX file has no such input",
                code="unknown-input",
                got=repr(name),
                expected=f"one of {', '.join(inputs)}",
                remedy=f"python -c \"import onnx; print(onnx.load('{path.name}').graph.input)\" shows them",
            )
        kind = inputs[name].type.tensor_type
        shape = [max(dim.dim_value, 1) for dim in kind.shape.dim]
        array = np.full(shape, number, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model.graph.input.remove(inputs[name])


def _check_external(model: Any, path: Path) -> None:
    """Every file with tensors is one in the folder of the model, and large enough for what is read of it."""
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries and tensor.data_location != 1:
            continue
        location = entries.get("location", "")
        parts = PurePosixPath(location.replace("\\", "/")).parts
        inside = bool(parts) and ".." not in parts and not PurePosixPath(location).is_absolute() and ":" not in location
        target = folder.joinpath(*parts) if inside else folder
        if not inside or not target.resolve().is_relative_to(folder) or target.is_symlink():
            raise CheckpointError(
                "a tensor of the ONNX file lies outside its folder",
                code="outside",
                got=f"{tensor.name!r} in {location!r}",
                expected=f"a file below {folder}",
                remedy="export the network again, with its tensors beside the file",
            )
        size = target.stat().st_size if target.is_file() else -1
        start, length = (_whole(entries.get(key)) for key in ("offset", "length"))
        if size < 0 or start is None or length is None or start + length > size:
            raise CheckpointError(
                "the external data of the ONNX file is missing or too short",
                code="incomplete",
                got=f"{location!r}: {'no file' if size < 0 else f'{size:,} bytes'}",
                expected=f"{entries.get('offset', 0)} + {entries.get('length', 'all')} bytes for {tensor.name!r}",
                remedy="copy the files that lie beside the ONNX file, too",
            )


def _whole(text: str | None) -> int | None:
    """A number of bytes; 0 where the file does not say, None where it is not one."""
    if text is None:
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _tensors(graph: Any) -> Any:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _tensors(inner)


def _check_sets(model: Any, path: Path) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not FIRST_SET <= version <= newest:
        raise SourceError(
            "the operators of the ONNX file are of a set that is not read",
            code="unknown-set",
            got=f"{path.name}: set {version}",
            expected=f"sets {FIRST_SET} to {newest}",
            remedy="convert it: onnx.version_converter.convert_version(onnx.load(path), 18)"
            if version
            else "the file names no set of the standard operators: export it again",
        )


def _check_floating(model: Any, path: Path) -> None:
    for line, node in enumerate(_nodes(model.graph), 1):
        # Runtimes have domains of their own for more of them: QLinearAdd, DynamicQuantizeLSTM, QGemm.
        own = node.domain not in ("", "ai.onnx") and str(node.op_type).startswith(
            ("QLinear", "DynamicQuantize", "QGemm")
        )
        if node.op_type in _QUANTIZED or own:
            raise SourceError(
                "the ONNX file is quantized already",
                code="quantized",
                got=f"{path.name}: {node.op_type} (node {line}, {node.name!r})",
                expected="a network in floating point, which can be trained and quantized for each runtime",
                remedy="give the file that it was quantized from",
            )


def declared_inputs(model: Any) -> tuple[tuple[torch.Tensor, ...] | None, dict[str | int, dict[int, str]]]:
    """Example inputs of zeros, and the axes that vary, as far as the file declares them.

    Of a network with recurrent layers only the first axis of each input, axes called as one and those called batch
    vary: `torch.export` writes out every step of the others. Of its axes without a name the first is the batch.

    Returns:
        The example, None where a size besides the first axis is not declared; position → {axis: name}.
    """
    recurrent = any(node.op_type in ("LSTM", "GRU", "RNN") for node in _nodes(model.graph))
    stored = {tensor.name for tensor in model.graph.initializer}
    values: list[torch.Tensor] = []
    dynamic: dict[str | int, dict[int, str]] = {}
    firsts: set[str] = set()
    known = True
    for position, port in enumerate(p for p in model.graph.input if p.name not in stored):
        kind = port.type.tensor_type
        shape: list[int] = []
        known &= kind.HasField("shape")
        opened = False  # by an axis before
        for axis, dim in enumerate(kind.shape.dim):
            fixed = dim.HasField("dim_value") and dim.dim_value > 0
            known &= fixed or axis == 0
            shape.append(dim.dim_value if fixed else 1)
            if not fixed:
                # An axis without a name varies, too, and is like no other. States of recurrent layers and inputs whose
                # steps come first have the batch in their second axis.
                plain = "batch" if axis == 0 or (recurrent and not opened) else f"axis_{position}_{axis}"
                opened = True
                word = _word(dim.dim_param) if dim.dim_param else plain
                firsts |= {word} if axis == 0 or "batch" in word.lower() else set()
                if not recurrent or word in firsts:
                    dynamic.setdefault(position, {})[axis] = word
        known &= kind.elem_type in TYPES and reading.fits(shape, LARGEST)
        values.append(torch.zeros(shape, dtype=TYPES.get(kind.elem_type, torch.float32)) if known else torch.zeros(0))
    return (tuple(values) if known and values else None), dynamic


def _described(model: Any) -> tuple[str, ...]:
    """The inputs as the file declares them: ``input_ids int64 (batch, tokens)``."""
    stored, inputs = {tensor.name for tensor in model.graph.initializer}, []
    for port in model.graph.input:
        if port.name not in stored:
            kind = port.type.tensor_type
            axes = ", ".join(str(dim.dim_param or dim.dim_value or "?") for dim in kind.shape.dim)
            inputs.append(f"{port.name} {str(TYPES.get(kind.elem_type, '?')).removeprefix('torch.')} ({axes})")
    return tuple(inputs)


def _fixed_axes(model: Any, dynamic: Mapping[str | int, Mapping[int, str]]) -> tuple[str, ...]:
    """Axes without a declared size that do not vary all the same: ``the axis length of ids``."""
    stored = {tensor.name for tensor in model.graph.initializer}
    ports = [port for port in model.graph.input if port.name not in stored]
    return tuple(
        f"the axis {dim.dim_param or axis} of {port.name}"
        for position, port in enumerate(ports)
        for axis, dim in enumerate(port.type.tensor_type.shape.dim)
        if not dim.dim_value and axis not in dynamic.get(position, {})
    )


def _nodes(graph: Any) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _nodes(inner)


def _word(name: str) -> str:
    """A name of an axis as an identifier, as `torch.export` takes it."""
    word = re.sub(r"\W", "_", name)
    return f"_{word}" if word[:1].isdigit() else word


__all__ = ["declared_inputs", "open_model", "open_network"]
