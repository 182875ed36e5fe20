"""Torch itself, eager, as a runtime: how the source is measured, and an artifact for those who stay in torch."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from penjing.network.exporting import export as export_network
from penjing.network.exporting import input_names, port_names, with_plain_outputs
from penjing.records.manifest import Manifest, Port, Program
from penjing.runtimes.artifact import Executed
from penjing.sources.pt2 import open_program
from penjing.steps.plan import GENERIC, Capabilities
from penjing.tasks.outputs import flatten_outputs, output_names

SETTINGS = {"keywords": r"[^\x00-\x1f\x7f]*"}
"""What a manifest may tell it, and how that reads."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Eager torch has no integer kernels for plans: quantized networks run in simulation and gain nothing."""
    return replace(GENERIC, runtime="torch", precisions=("fp32",), notes=("eager torch runs plans in simulation",))


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.pt2."""
    program = export_network(with_plain_outputs(network), call, dynamic)
    for node in program.graph.nodes:  # addresses in this process's memory, and paths of this machine
        node.meta.pop("from_node", None)
        node.meta.pop("stack_trace", None)
    # Of the example its shapes: a file of somebody's data, or of all that it is a slice of, is not to be shipped.
    program.example_inputs = tree_map(lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), program.example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()  # on a full disk torch's own writer fails with a text of its inner workings
        torch.export.save(program, buffer)
    (folder / "model.pt2").write_bytes(buffer.getvalue())
    args, kwargs = call
    values = [*args, *kwargs.values()]
    names, output_words = port_names(network, input_names(network, *call), output_names(structure))
    inputs = tuple(
        replace(_port(n, v, dynamic, i), name=word)
        for i, (n, v, word) in enumerate(zip(input_names(network, *call), values, names, strict=True))
    )
    with torch.no_grad():
        outputs, _ = flatten_outputs(network(*args, **kwargs))
    ports = tuple(_port(n, v, None, 0) for n, v in zip(output_words, outputs, strict=True))
    return Manifest(
        runtime="torch",
        precision=precision,
        programs=(Program(name="main", files=("model.pt2",), inputs=inputs, outputs=ports),),
        structure=structure,
        settings={"keywords": ",".join(kwargs)},
    )


def _port(name: str, tensor: torch.Tensor, dynamic: Any, position: int) -> Port:
    axes = {0: "batch"} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))
    shape = tuple(axes.get(i, size) for i, size in enumerate(tensor.shape))
    return Port(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)


class Session:
    """An opened program; `example` holds zeros in the shapes that it was exported with."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = open_program(folder / manifest.programs[0].files[0])
            self.module: Any = program.module(check_guards=False)
        self.example = [x.numpy() for x in tree_leaves(program.example_inputs)]
        self.keywords = [k for k in manifest.settings.get("keywords", "").split(",") if k]

    @torch.inference_mode()
    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call."""
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
        split = len(tensors) - len(self.keywords)
        result = self.module(*tensors[:split], **dict(zip(self.keywords, tensors[split:], strict=True)))
        return [t.numpy() for t in flatten_outputs(result)[0]]


def open_session(folder: Path, manifest: Manifest, threads: int) -> Session:
    """Load model.pt2; the number of threads is torch's own, for the whole process."""
    return Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """Nothing is fused or changed: the graph is what was exported."""
    return []


LOAD = '''\
"""Open this artifact with torch alone: ``from load import predict``. Needs: numpy, torch."""
@ALONE@import json, os, pathlib
import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
torch.set_num_threads(int(os.environ.get("THREADS", @THREADS@)))
module = torch.export.load(HERE / PROGRAM["files"][0]).module()
KEYWORDS = [k for k in MANIFEST["settings"]["keywords"].split(",") if k]


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    split = len(tensors) - len(KEYWORDS)
    with torch.inference_mode():
        result = module(*tensors[:split], **dict(zip(KEYWORDS, tensors[split:])))
    return [t.numpy() for t in torch.utils._pytree.tree_leaves(result)]

'''
