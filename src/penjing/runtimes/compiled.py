"""`torch.compile` as a runtime: inductor, with oneDNN's integer convolutions and linear layers on x86 processors.

The artifact is an exported program; it is compiled when it is opened, by the C++ compiler of that machine. Inductor
computes in integers what it finds between PyTorch's own operators `quantized_decomposed.quantize_per_tensor` and
`dequantize_per_tensor`, with a weight behind `dequantize_per_channel` (`torch/_inductor/fx_passes/quantization.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._inductor import config as inductor

from penjing.network.graph import arguments, kind
from penjing.records.manifest import Manifest, sample_axes
from penjing.runtimes import eager
from penjing.runtimes.artifact import Executed
from penjing.runtimes.decomposed import in_operators_of_torch, site
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

SETTINGS = eager.SETTINGS
APART = ()
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""

OPENING_S = 900  # ResNet-20's 22 layers took 27 s on a busy machine
_INTEGER = ("onednn.qconv", "onednn.qlinear")


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Integers on x86 alone; 7-bit weights where 8 would saturate 16-bit sums (without VNNI)."""
    x86 = any(name.startswith(("avx", "sse")) for name in instruction_sets)
    narrow = not any("vnni" in name for name in instruction_sets)
    return Capabilities(
        runtime="torch-compile",
        precisions=("fp32", "int8") if x86 else ("fp32",),
        weight=QuantSpec(bits=7 if narrow else 8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=False, symmetric=False),
        integer=frozenset({"conv", "linear"}),
        fuses=frozenset({"relu", "clip"}),
        passthrough=frozenset({"max_pool", "reshape"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(per=("tensor",), grids=("uniform",)),
        dynamic=None,
        channel_multiple=channel_multiple(instruction_sets),
        notes=("it is compiled when it is opened, which takes as long as the compiler",),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.pt2, quantized by operators that inductor knows."""
    network = in_operators_of_torch(network, _computed_in_integers, by_channel=True)
    manifest = eager.export(network, call, dynamic, precision, structure, folder)
    return replace(manifest, runtime="torch-compile", opening_s=OPENING_S)


def _computed_in_integers(network: fx.GraphModule, readers: list[fx.Node], value: torch.Tensor) -> bool:
    return value.dtype == torch.int8 and all(_has_kernel(network, reader, value) for reader in readers)


def _has_kernel(network: fx.GraphModule, reader: fx.Node, weight: torch.Tensor) -> bool:
    """Whether an operator that reads an int8 weight may be computed in integers.

    Of convolutions, those over images of several channels. For a batch that varies, inductor of torch 2.13 takes what
    one of a single channel gives for contiguous, and the kernel gives channels last (see its mkldnn_ir.py,
    `_prepare_convolution_fusion_create`); and it gets the size of what a dilated one over a sequence gives wrong.
    """
    return kind(network, reader) != "conv" or (weight.dim() == 4 and weight.shape[1] * arguments(reader)["groups"] > 1)


class _Session(eager.Session):
    """Compiled for a batch of one and for any other when it is opened, so that no later call waits for the compiler."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        super().__init__(folder, manifest, threads)
        self.module = torch.compile(self.module)
        with _quiet():
            for inputs in _examples(self, manifest):
                self.run(inputs)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call."""
        with inductor.patch(freezing=True):  # weights are packed when it is compiled, maybe now for another size
            return super().run(inputs)


def _examples(session: eager.Session, manifest: Manifest) -> list[list[np.ndarray]]:
    """What to compile for: torch specializes a batch of one, and takes a size that changed from there for varying."""
    ports = manifest.programs[0].inputs
    axes = sample_axes(ports)
    one = [x if axis is None else np.take(x, range(1), axis) for x, axis in zip(session.example, axes, strict=True)]
    return [session.example] if axes.count(None) == len(axes) else [one, session.example]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Load model.pt2 and compile it; the number of threads is torch's own, for the whole process."""
    return _Session(folder, manifest, threads)


class _Read(Exception):
    """The graph has been read: no program needs to be written from it."""


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the graph from which inductor writes its program."""
    session = eager.Session(folder, manifest, 1)
    session.module = torch.compile(session.module)
    operators: list[Executed] = []
    layers: dict[str, str] = {}  # a fused kernel goes by its last operator: the scales of its weight say its layer

    def read_scales(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.quantized_decomposed.dequantize_per_channel.default:
                layers[node.args[1].name] = next(map(site, node.users), "")

    def read_operators(graph: fx.Graph) -> None:
        for node in (node for node in graph.nodes if node.op == "call_function"):
            name, sites = str(node.target), {site(node)}
            if integer := name.startswith(_INTEGER):
                sites.add(layers.get(node.args[4].name, ""))
            if sites := sites - {""}:
                operators.append(Executed(tuple(sorted(sites)), name, "int8" if integer else "fp32"))
        raise _Read

    hooks = {"joint_custom_post_pass": read_scales, "post_grad_custom_pre_pass": read_operators}
    try:
        with _quiet(), inductor.patch(hooks | {"freezing": True}):
            session.run(session.example)
    except torch._inductor.exc.InductorError as error:
        if not isinstance(error.inner_exception, _Read):
            raise
    return operators


_LOAD = {  # of eager torch's loader, in the place of
    "with torch alone": "with torch and a C++ compiler",
    'module = torch.export.load(HERE / PROGRAM["files"][0]).module()': """\
import torch._inductor.config
import torch.ao.quantization.fx._decomposed  # registers the quantizers
module = torch.compile(torch.export.load(HERE / PROGRAM["files"][0]).module(check_guards=False))""",
    "with torch.inference_mode():": """\
# Weights are packed when it is compiled, integers among them: at the first call and at a new size.
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):""",
}
LOAD = functools.reduce(lambda text, row: text.replace(*row), _LOAD.items(), eager.LOAD)
