"""From an exported program to a Core ML package, by coremltools; the same program gives the same bytes."""

from __future__ import annotations

import contextlib
import io
import json
import operator
import re
import shutil
import traceback
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ExportError
from penjing.runtimes import coreml_palettes

_DATA = Path("Data") / "com.apple.CoreML"
SPEC, WEIGHTS = _DATA / "model.mlmodel", _DATA / "weights" / "weight.bin"
FILES = ("Manifest.json", SPEC.as_posix(), WEIGHTS.as_posix())
"""What a package holds."""
_RESCALING = "common::distributive_quantized_binary_op_scale_normalization"
"""It divides the scales around an addition by one of them, and float16 does not have the quotients."""
_NUMBERS = uuid.UUID("6f6d5cbe-76a5-4d0f-9a6a-5d8c8d5f6b1e")  # of the names in a package's list of contents


def convert(folder: str, package: str, half: bool, inputs: list[str], outputs: list[str]) -> None:
    """Write a package from ``program.pt2`` and ``tables.npz``.

    Args:
        folder: Where these lie.
        package: The folder to write.
        half: Whether it computes in float16, which the Neural Engine needs, instead of float32.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.

    Raises:
        ExportError: coremltools can't convert the program.
    """
    import coremltools as ct
    import torch
    from coremltools.converters.mil.mil import Builder

    from penjing.numerics import operators  # noqa: F401  registers what a program may hold
    from penjing.runtimes import decomposed  # noqa: F401  registers quantized_decomposed

    _norm_groups_of_any_batch()
    Builder.name_count.clear()  # its names go on from one conversion of a process to the next
    program = torch.export.load(str(Path(folder) / "program.pt2"))
    _spell_out_defaults(program.graph_module)
    tables = Path(folder) / "tables.npz"
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({_RESCALING})
    if tables.exists():
        coreml_palettes.register(dict(np.load(tables)))
        pipeline.remove_passes({_RESCALING, *coreml_palettes.KEPT_APART})
        pipeline.append_pass(coreml_palettes.NAME)
    try:
        with _quiet():
            model = ct.convert(
                program,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                outputs=[ct.TensorType(dtype=np.float32) for _ in outputs],
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
    except Exception as error:
        raise ExportError(
            f"Core ML has no form of the network{_culprit(error, program)}",
            code="no-coreml-form",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            expected="operators that coremltools converts",
            remedy="write that operator with others, or choose another runtime",
        ) from error
    spec = model.get_spec()
    _rename(spec, inputs, outputs)
    _write(spec, Path(model.weights_dir), Path(package))


def _norm_groups_of_any_batch() -> None:
    """Let coremltools (9.0) normalize groups where the number of samples varies: it writes that number into a reshape.

    With -1 in its place the reshape has no unknown size.
    """
    from coremltools.converters.mil.frontend._utils import any_symbolic
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil import Builder as mb

    written = ops._group_norm_impl
    if getattr(written, "of_any_batch", False):
        return

    def norm(x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
        samples, channels, *sizes = x.shape
        if not any_symbolic([samples]) or any_symbolic([channels, *sizes]):
            return written(x, groups, weight, bias, eps)
        axes = list(range(2, 3 + len(sizes)))
        y = mb.reshape(x=x, shape=[-1, groups, channels // groups, *sizes])
        y = mb.sub(x=y, y=mb.reduce_mean(x=y, axes=axes, keep_dims=True))
        variance = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=axes, keep_dims=True)
        y = mb.real_div(x=y, y=mb.sqrt(x=mb.add(x=variance, y=eps)))
        y = mb.reshape(x=y, shape=[-1, channels, *sizes])
        across = [1, channels, *(1 for _ in sizes)]
        y = y if weight is None else mb.mul(x=y, y=mb.reshape(x=weight, shape=across))
        return y if bias is None else mb.add(x=y, y=mb.reshape(x=bias, shape=across))

    norm.of_any_batch = True  # type: ignore[attr-defined]
    ops._group_norm_impl = norm


def _culprit(error: BaseException, program: Any) -> str:
    """The operator that coremltools was converting, or that its words name, in words; empty if neither is told."""
    from penjing.runtimes.decomposed import site

    converting = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]
    words = {str(getattr(node, "name", "")) for node in converting} | set(re.split(r"\W+", str(error)))
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.name in words and site(n)]
    return f": {site(nodes[0])} ({nodes[0].target})" if nodes else ""


def _spell_out_defaults(graph_module: Any) -> None:
    """Arguments that were left to their defaults: coremltools counts them.

    Parts of a result that nothing reads are dropped: reading a program brings them back.
    """
    import torch

    for node in list(graph_module.graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph_module.graph.erase_node(node)
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        missing = [a for a in node.target._schema.arguments[len(node.args) :] if not a.kwarg_only]
        if missing and not node.kwargs and all(a.has_default_value() for a in missing):
            node.args = (*node.args, *(a.default_value for a in missing))
    graph_module.recompile()


@contextlib.contextmanager
def _quiet() -> Any:
    """It prints its progress, and warns of versions that it was not tested with."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _rename(spec: Any, inputs: list[str], outputs: list[str]) -> None:
    """Call inputs and outputs as the manifest does; a value of the middle that is called so gets another name."""
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    names = {value.name: word for value, word in zip(function.inputs, inputs, strict=True)}
    names |= dict(zip(block.outputs, outputs, strict=True))
    words = set(names.values())

    def called(name: str) -> str:
        return names.get(name, f"{name}_inner" if name in words else name)

    def visit(block: Any) -> None:
        for operation in block.operations:
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        binding.name = called(binding.name)
            for output in operation.outputs:
                output.name = called(output.name)
            for inner in operation.blocks:
                visit(inner)
        block.outputs[:] = [called(name) for name in block.outputs]

    visit(block)
    for value in [*function.inputs, *spec.description.input, *spec.description.output]:
        value.name = called(value.name)


def _write(spec: Any, weights: Path, package: Path) -> None:
    """The package's three files; the list of contents has names that follow from what they name."""
    for key in list(spec.description.metadata.userDefined):
        del spec.description.metadata.userDefined[key]
    (package / WEIGHTS).parent.mkdir(parents=True)
    (package / SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    if (weights / "weight.bin").exists():
        shutil.copyfile(weights / "weight.bin", package / WEIGHTS)
    else:
        (package / WEIGHTS).write_bytes(b"")
    entries = {}
    for name, path, text in (
        ("model.mlmodel", "com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
        ("weights", "com.apple.CoreML/weights", "CoreML Model Weights"),
    ):
        number = str(uuid.uuid5(_NUMBERS, path)).upper()
        entries[number] = {"author": "com.apple.CoreML", "description": text, "name": name, "path": path}
    root = next(iter(entries))
    content = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
