"""LiteRT (TensorFlow Lite) on the processor: what it accelerates, export, load, and what it really executes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from penjing.records.manifest import Manifest, Program
from penjing.runtimes.artifact import Executed
from penjing.runtimes.sample_by_sample import axes, each
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

SETTINGS: dict[str, str] = {}
"""What a manifest may tell it, and how that reads."""

CONVERTING_S = 600.0  # MobileNetV2's operators, traced four times, took 25 s on a busy machine
ADDED = "added"
"""The site, in a file, of what the export added to the network's own operators."""
_CONVERTING = ("QUANTIZE", "DEQUANTIZE", "CAST")
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV", "CONV_3D")
_MOVING = ("TRANSPOSE", "RESHAPE", "PAD", "PADV2", "SQUEEZE", "EXPAND_DIMS", "SLICE", "STRIDED_SLICE", "BROADCAST_TO")
_UNDELEGATED = frozenset({"hardswish", "gelu"})
"""Functions that XNNPACK computes in floating point alone. LiteRT's own integer kernels of them are loops over single
values on x86, and end the stretch that XNNPACK computes; a dequantizer and a quantizer that it takes cost less."""
_FUNCTIONS = frozenset({"sigmoid", "tanh", "elu", "leaky_relu"}) | _UNDELEGATED
_MOVED = frozenset("max_pool pad reshape transpose select slice split split_with_sizes chunk unbind".split())
_INTEGER = frozenset({"conv", "linear", "add", "mul", "cat", "avg_pool", "matmul"}) | _FUNCTIONS


ROUNDING = 2.0**-18
"""Products of two activations and other kernels of LiteRT's own multiply by a fixed-point number and round twice, first
to a 2^right-th of a step. For the product of attention and values, whose scales give a shift of 7 to the right, results
within 1/256 of a step of a tie go to its other side. This is less: 1/2048 of a step at the end of the grid."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Signed activations of any zero point, signed weights without; every integer kernel writes integers."""
    x86 = any(name.startswith(("avx", "sse")) for name in instruction_sets)
    integer = _INTEGER - _UNDELEGATED if x86 else _INTEGER
    notes: tuple[str, ...] = ("it runs samples one by one: the sizes of a file are fixed",)
    if x86:
        notes += ("hard swish and GELU are computed in floating point: XNNPACK has no integer kernels for them",)
    return Capabilities(
        runtime="litert",
        precisions=("fp32", "int8"),
        weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=True, symmetric=False),
        integer=integer,
        fuses=frozenset({"relu", "clip"}),
        passthrough=_MOVED,
        quantized_output=integer,
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(per=("tensor",), grids=("uniform",)),
        dynamic=None,
        rounding=ROUNDING,
        channel_multiple=channel_multiple(instruction_sets),
        notes=notes,
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.tflite, for one sample."""
    from penjing.runtimes import isolated, litert_program
    from penjing.tasks.outputs import output_names

    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "crossing.pt2"
        inputs, outputs = litert_program.save(network, call, dynamic, output_names(structure), path)
        names = [[port.name for port in ports] for ports in (inputs, outputs)]
        isolated.call("litert", "convert", path, str(folder.absolute() / "model.tflite"), *names, more_s=CONVERTING_S)
    return Manifest(
        runtime="litert",
        precision=precision,
        programs=(Program(name="main", files=("model.tflite",), inputs=inputs, outputs=outputs),),
        structure=structure,
    )


def convert(program_path: str, path: str, inputs: list[str], outputs: list[str]) -> None:
    """See `penjing.runtimes.litert_convert.convert`, which brings torch."""
    from penjing.runtimes import litert_convert

    litert_convert.convert(program_path, path, inputs, outputs)


APART = ("convert",)
"""What is done in a process of its own (see `penjing.runtimes.isolated`)."""


def _interpreter(folder: Path, manifest: Manifest, threads: int, **options: Any) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    path = str(folder / manifest.programs[0].files[0])
    return Interpreter(model_path=path, num_threads=threads, **options)


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        program = manifest.programs[0]
        self.interpreter = _interpreter(folder, manifest, threads)
        self.interpreter.allocate_tensors()
        runner = self.interpreter.get_signature_runner()
        self.inputs = [runner.get_input_details()[port.name]["index"] for port in program.inputs]
        self.outputs = [runner.get_output_details()[port.name]["index"] for port in program.outputs]
        self.axes = axes(program)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call, sample by sample."""
        return each(inputs, self.axes, self._one)

    def _one(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        for index, x in zip(self.inputs, inputs, strict=True):
            self.interpreter.set_tensor(index, x)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.outputs]


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Open model.tflite with that many threads, and with XNNPACK where it knows an operator."""
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the file: its kernels compute in the types that it names, with XNNPACK or without."""
    from ai_edge_litert.interpreter import OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = _interpreter(folder, manifest, 1, experimental_op_resolver_type=resolver)
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    rows = interpreter._get_ops_details()
    computed = {index for row in rows for index in row["outputs"]}
    operators = []
    for row in rows:
        if row["op_name"] in _CONVERTING:
            continue
        types = {tensors[i]["dtype"] for i in (*row["inputs"][:1], *row["outputs"])}
        # An output of the network is called by its port: what is stored beside its operator tells the site.
        stored = [i for i in row["inputs"] if i >= 0 and i not in computed]
        for indices in (row["outputs"], stored):
            sites = tuple(dict.fromkeys(site for i in indices for site in sites_of(tensors[i]["name"])))
            if sites:
                break
        operators.append(Executed(sites, row["op_name"], "int8" if types == {np.int8} else "fp32"))
    return _by_weight(operators)


def _by_weight(operators: list[Executed]) -> list[Executed]:
    """Operators with the sites of which they are the most important part; a part in floating point before an integer.

    Products before sums and functions, and these before what only moves values. What fusions and layouts leave of a
    site besides says nothing about its precision.
    """

    def weight(operator: Executed) -> tuple[int, bool]:
        moves = operator.type in _MOVING
        return (2 if operator.type in _PRODUCTS else 0 if moves else 1), operator.precision != "int8"

    most: dict[str, tuple[int, bool]] = {}
    for operator in operators:
        for site in operator.sites:
            most[site] = max(weight(operator), most.get(site, (0, False)))
    return [
        replace(operator, sites=tuple(site for site in operator.sites if weight(operator) == most[site]))
        for operator in operators
    ]


def named(site: str) -> str:
    """A site as a name in the file; its writer cuts a name at an @, and joins names with semicolons."""
    return quote(site, safe="/#")


def sites_of(name: str) -> list[str]:
    """The sites in the name of a tensor: "/relu#0;;norm;;stem;2" is what a fusion of three operators writes."""
    return [unquote(part) for part in name.split(";")[:-1] if part and part != ADDED]


COMMANDS = """
With LiteRT's own program (C++; `benchmark_model`, https://ai.google.dev/edge/litert/models/measurement):

```
benchmark_model --graph=@FILE@ --num_threads=@THREADS@ --use_xnnpack=true
```

On Android, with the program built for it:

```
adb push @FILES@ benchmark_model /data/local/tmp/
adb shell "cd /data/local/tmp && ./benchmark_model --graph=@FILE@ --num_threads=@THREADS@ --use_xnnpack=true"
```
"""
"""How the runtime's own programs measure the artifact: one sample a call."""

LOAD = '''\
"""Open this artifact with LiteRT alone: ``from load import predict``. Needs: ai-edge-litert, numpy."""
@ALONE@import json, os, pathlib
import numpy as np
from ai_edge_litert.interpreter import Interpreter

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
interpreter = Interpreter(
    model_path=str(HERE / PROGRAM["files"][0]), num_threads=int(os.environ.get("THREADS", @THREADS@))
)
interpreter.allocate_tensors()
runner = interpreter.get_signature_runner()
INPUTS = [runner.get_input_details()[port["name"]]["index"] for port in PROGRAM["inputs"]]
OUTPUTS = [runner.get_output_details()[port["name"]]["index"] for port in PROGRAM["outputs"]]
del runner  # it would keep the interpreter from allocating
AXES = [[next((i for i, n in enumerate(port["shape"]) if isinstance(n, str)), None) for port in PROGRAM[key]]
        for key in ("inputs", "outputs")]  # of the samples


def one(inputs):
    """A call with one sample, for which the file was made."""
    for index, x in zip(INPUTS, inputs):
        interpreter.set_tensor(index, x)
    interpreter.invoke()
    return [interpreter.get_tensor(index) for index in OUTPUTS]


def run(inputs):
    """Flat list of arrays in, flat list of arrays out; sample by sample."""
    counts = [x.shape[axis] for x, axis in zip(inputs, AXES[0]) if axis is not None] or [1]
    samples = [one([x if axis is None else np.take(x, [i], axis) for x, axis in zip(inputs, AXES[0])])
               for i in range(counts[0])]
    return [parts[0] if axis is None else np.concatenate(parts, axis) for parts, axis in zip(zip(*samples), AXES[1])]

'''
