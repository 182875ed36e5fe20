"""ONNX Runtime on the processor: what it accelerates, export, load, and what it really executes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penjing.records.manifest import Manifest, Program
from penjing.runtimes.artifact import Executed
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

# Of ONNX Runtime's documentation, "Quantize ONNX models", and its QDQ selectors (qdq_selector_action_transformer).
_INTEGER_TYPES = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QAttention", "QMoE")

_AT_LOAD = ("Cast", "Add", "Gather", "Reshape", "Mul", "Transpose")  # how stored weights become those it computes with
_BETWEEN = ("sigmoid", "hardsigmoid", "mul", "leaky_relu")  # kernels that read integers and write them

SETTINGS = {"disabled_optimizers": "[A-Za-z0-9_ ]*"}
"""What a manifest may tell it, and how that reads."""
APART = ()
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""

# Its wheel carries telemetry, which writes into the home folder and looks names up; read when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Unsigned activations and signed weights; 7-bit weights where 8 would saturate 16-bit sums (AVX2 without VNNI)."""
    x86 = any(name.startswith(("avx", "sse")) for name in instruction_sets)
    vnni = any("vnni" in name for name in instruction_sets)
    narrow = x86 and not vnni
    note = "without VNNI, 8-bit products saturate in 16 bits: weights take 7 bits" if narrow else ""
    return Capabilities(
        runtime="onnxruntime",
        precisions=("fp32", "fp16", "int8"),
        weight=QuantSpec(bits=7 if narrow else 8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=False, symmetric=False),
        integer=frozenset({"conv", "linear", "add", "cat", "avg_pool", "matmul", *_BETWEEN}),
        fuses=frozenset({"relu", "clip"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(per=("tensor",), grids=("uniform",)),
        passthrough=frozenset({"max_pool", "pad", "reshape", "resize", "transpose"}),
        quantized_output=frozenset({"conv", "add", "cat", "avg_pool", *_BETWEEN}),
        stored=frozenset({"embedding", "conv_transpose", "lstm", "gru"}),
        recurrent=frozenset({"lstm"}),
        channel_multiple=channel_multiple(instruction_sets),
        notes=(note,) if note else (),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.onnx. "fp16" is half precision in the file alone: the processor computes in float32."""
    import onnx

    from penjing.onnx_files import rewrites as onnx_rewrites
    from penjing.onnx_files import write as onnx_file
    from penjing.onnx_files.hard_sigmoids import hard_sigmoids_as_sums
    from penjing.tasks.outputs import output_names

    path = folder / "model.onnx"
    half, codebooks = precision == "fp16", network.meta.get("codebooks")
    names = output_names(structure)
    inputs, outputs = onnx_file.write(network, call, dynamic, names, path, half=half, codebooks=codebooks)
    if precision == "int8":
        model = onnx.load(str(path))
        hard_sigmoids_as_sums(model)
        onnx_rewrites.cast_when_loaded(model)
        onnx_rewrites.drop_unread(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    program = Program(name="main", files=("model.onnx",), inputs=inputs, outputs=outputs)
    # It would quantize the weights of a layer that the plan left in floating point between quantized neighbours.
    settings = {"disabled_optimizers": "WeightBiasQuantization"} if precision == "int8" else {}
    return Manifest(
        runtime="onnxruntime", precision=precision, programs=(program,), structure=structure, settings=settings
    )


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        self.session = _inference(folder, manifest, _options(threads))
        self.names = [port.name for port in manifest.programs[0].inputs]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        result: list[np.ndarray] = self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        return result


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Open model.onnx with that many threads."""
    return _Session(folder, manifest, threads)


def _inference(folder: Path, manifest: Manifest, options: Any, *disabled: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        str(folder / manifest.programs[0].files[0]),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[*manifest.settings.get("disabled_optimizers", "").split(), *disabled],
    )


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the optimized file that ONNX Runtime writes."""
    import onnx

    source = folder / manifest.programs[0].files[0]
    graph = onnx.load(str(source), load_external_data=False).graph
    nodes = graph.node
    if manifest.precision in ("fp32", "fp16"):
        # It never lowers a precision of its own accord, and its layout transformer drops the nodes' names.
        stored = {tensor.name for tensor in graph.initializer}  # what is computed from there alone, is so at load
        run = []
        for node in nodes:
            if node.op_type in _AT_LOAD and stored.issuperset(node.input):
                stored.update(node.output)
            else:
                run.append(node)
        return [Executed((node.name,), node.op_type, "fp32") for node in run]
    sites = {node.name for node in nodes}
    with tempfile.TemporaryDirectory() as aside:
        optimized = Path(aside) / "optimized.onnx"
        options = _options(1)
        options.optimized_model_filepath = str(optimized)
        # Blocked layouts are for floating-point operators alone, and their transformer drops the names.
        _inference(folder, manifest, options, "NchwcTransformer")
        graph = onnx.load(str(optimized)).graph
    operators = []
    for node in graph.node:
        integer = node.op_type.startswith(_INTEGER_TYPES)
        name = _origin(node.name, sites)
        operators.append(Executed((name,) if name else (), node.op_type, "int8" if integer else "fp32"))
    return operators


def expose(folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
    """Write model.onnx with the values of `sites` as further outputs; returns those that it names."""
    import onnx

    model = onnx.load(str(folder / manifest.programs[0].files[0]))
    values = {node.name: node.output[0] for node in model.graph.node}
    given = {value.name for value in model.graph.output}
    shown = []
    for site in sites:
        # A linear layer may be a product and an addition, which is called by what it adds.
        value = next((values[n] for n in (f"{site}/bias", f"{site}/scale", site) if n in values), None)
        if value is not None and value not in given:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
            given.add(value)
            shown.append(site)
    (into / manifest.programs[0].files[0]).write_bytes(model.SerializeToString())
    return shown


def _origin(name: str, sites: set[str]) -> str | None:
    """Fusions append to a node's name ("conv1_token_3"): the longest known name that it starts with."""
    known = [s for s in sites if s and (name == s or name.startswith((f"{s}_", f"{s}/")))]
    return max(known, key=len) if known else None


COMMANDS = """
With ONNX Runtime's own program (C++; built with it, `onnxruntime_perf_test`):

```
onnxruntime_perf_test -e cpu -x @THREADS@ -y 1 -I -t 10 @SIZES@ @FILE@
```

On Android, with the program built for it:

```
adb push @FILES@ onnxruntime_perf_test /data/local/tmp/
adb shell "cd /data/local/tmp && ./onnxruntime_perf_test -e cpu -x @THREADS@ -y 1 -I -t 10 @SIZES@ @FILE@"
```
"""
"""How the runtime's own programs measure the artifact."""

LOAD = '''\
"""Open this artifact with ONNX Runtime alone: ``from load import predict``. Needs: numpy, onnxruntime."""
@ALONE@import json, os, pathlib
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import numpy as np
import onnxruntime

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("THREADS", @THREADS@))
options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(
    str(HERE / PROGRAM["files"][0]), options, providers=["CPUExecutionProvider"],
    disabled_optimizers=MANIFEST["settings"].get("disabled_optimizers", "").split(),
)


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    return session.run(None, {port["name"]: x for port, x in zip(PROGRAM["inputs"], inputs)})

'''
