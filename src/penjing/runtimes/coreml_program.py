"""A frozen network as an exported program that coremltools converts, with the tables of its palettes beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from penjing.network.exporting import input_names, port_names
from penjing.records.manifest import Port
from penjing.runtimes import coreml_palettes
from penjing.runtimes.decomposed import decomposed

_WHOLE = (
    *(
        "linear",
        "matmul",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "batch_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ),
    *("layer_norm", "group_norm", "instance_norm", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "elu"),
    *("leaky_relu", "relu6", "softplus", "mish", "softmax", "log_softmax", "scaled_dot_product_attention", "prelu"),
    *("upsample_bilinear2d", "upsample_nearest2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "pixel_shuffle"),
)
"""Operators that coremltools turns into one of its own, or into a pattern that Core ML fuses."""


def save(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: Mapping[str | int, Mapping[int, str]] | None,
    outputs: list[str],
    folder: Path,
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Write ``program.pt2``, and ``tables.npz`` where the network has codebooks; returns the ports.

    Args:
        network: A captured network, frozen where it is quantized; ``meta["codebooks"]``: `coreml_palettes`.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        outputs: Names of the flat outputs.
        folder: Where the files are written.

    Raises:
        ExportError: torch can't export it.
    """
    program = decomposed(network, call, dynamic)
    table = torch.export.default_decompositions()
    for overload in list(table):
        if getattr(overload, "_opname", "") in _WHOLE:
            del table[overload]
    program = program.run_decompositions(table)
    for node in program.graph.nodes:  # addresses in this process's memory, and paths of this machine
        node.meta.pop("from_node", None)
        node.meta.pop("stack_trace", None)
    torch.export.save(program, folder / "program.pt2")
    tables = coreml_palettes.arrays(network.meta.get("codebooks") or {})
    if tables:
        np.savez(folder / "tables.npz", **tables)  # type: ignore[arg-type]
    return _ports(program, network, call, dynamic, outputs)


def _ports(
    program: ExportedProgram, network: fx.GraphModule, call: Any, dynamic: Any, outputs: list[str]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    inputs = input_names(network, *call)
    named, words = port_names(network, inputs, outputs)
    nodes = {node.name: node for node in program.graph.nodes}
    given = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
    symbols: dict[str, str] = {}
    for position, (name, value) in enumerate(zip(inputs, given, strict=True)):
        axes = {0: "batch"} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))
        symbols |= {str(value.shape[axis]): word for axis, word in axes.items() if axis < value.dim()}
    taken: set[str] = set()

    def port(name: str, value: torch.Tensor) -> Port:
        word = re.sub(r"\W", "_", name or "output")
        word = word if re.match("[A-Za-z_]", word) else f"_{word}"
        while word in taken:
            word += "_"
        taken.add(word)
        shape = tuple(n if isinstance(n, int) else symbols.get(str(n), str(n)) for n in value.shape)
        return Port(name=word, dtype=str(value.dtype).removeprefix("torch."), shape=shape)

    results = [nodes[name].meta["val"] for name in program.graph_signature.user_outputs]
    return (
        tuple(port(name, value) for name, value in zip(named, given, strict=True)),
        tuple(port(name, value) for name, value in zip(words, results, strict=True)),
    )
