"""OpenVINO on the processor: what it accelerates, export, load, and what it really executes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError, ExportError, OutputError
from penjing.records.manifest import Manifest, Program
from penjing.runtimes.artifact import Executed, Timed
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

_HINTS = {"fp32": "f32", "fp16": "f32", "int8": "f32", "bf16": "bf16", "int8-bf16": "bf16"}
GROUP = 32  # neighbouring inputs of a linear layer that share a scale where ranges are taken at run time
_PRECISIONS = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}

SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32|bf16|f16",
    "PERFORMANCE_HINT": "LATENCY|THROUGHPUT",
    "NUM_STREAMS": "[0-9]{1,3}",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "[0-9]{1,6}",
}
"""What a manifest may tell it, and how that reads: others make it write files (CACHE_DIR) or load libraries."""

_LARGEST = ("amax", "amin", "max", "min", *(f"adaptive_max_pool{rank}d" for rank in (1, 2, 3)))
"""What picks the largest or smallest of many. Version 2026.4 gives wrong numbers where it fuses one with a quantizer
behind it; from integers to integers of the same scale it is right."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Unsigned activations, signed weights; bfloat16 where the processor multiplies it.

    Signed activations with a zero point other than 0 are refused by convolutions on AMX.
    """
    bf16 = bool({"avx512_bf16", "amx_bf16"} & set(instruction_sets))
    vnni = any("vnni" in name or name == "amx_int8" for name in instruction_sets)
    x86 = any(name.startswith(("avx", "sse")) for name in instruction_sets)
    narrow = x86 and not vnni
    recurrent = {"lstm"} if vnni else set()
    return Capabilities(
        runtime="openvino",
        precisions=("fp32", "fp16", "bf16", "int8", "int8-bf16") if bf16 else ("fp32", "fp16", "int8"),
        weight=QuantSpec(bits=7 if narrow else 8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=False, symmetric=False),
        integer=frozenset({"conv", "conv_transpose", "linear", "add", "cat", "avg_pool", "matmul"} | recurrent),
        fuses=frozenset({"relu", "clip", "hardswish", "silu", "gelu", "sigmoid", "hardsigmoid", "tanh", "elu"}),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(per=("tensor",), grids=("uniform",)),
        passthrough=frozenset({"max_pool", "pad", "reshape", "resize", "transpose", *_LARGEST}),
        stored=frozenset({"embedding", "lstm", "gru"}),
        symmetric_products=True,
        centred_db=1.0 if "amx_int8" in instruction_sets else 0.0,  # measured there alone
        dynamic=QuantSpec(axis=0, group=GROUP, range="dynamic") if vnni else None,
        channel_multiple=channel_multiple(instruction_sets),
        notes=("without VNNI, 8-bit products saturate in 16 bits: weights take 7 bits",) if narrow else (),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.xml and model.bin, by way of ONNX. "fp16" is half precision in the file alone."""
    from penjing.onnx_files import write as onnx_file
    from penjing.runtimes import isolated
    from penjing.tasks.outputs import output_names

    # Not in `folder`: OpenVINO takes a comma in a path for the end of it.
    with tempfile.TemporaryDirectory() as aside:
        onnx_path = Path(aside) / "crossing.onnx"
        inputs, outputs = onnx_file.write(network, call, dynamic, output_names(structure), onnx_path)
        isolated.call("openvino", "convert", onnx_path, str(folder.absolute() / "model.xml"), precision)
    return Manifest(
        runtime="openvino",
        precision=precision,
        programs=(Program(name="main", files=("model.xml", "model.bin"), inputs=inputs, outputs=outputs),),
        structure=structure,
        settings={
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            # Of linear layers with integer weights and floating-point inputs.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
        },
        fixed_shapes=_compiles_fixed(folder / "model.xml", call, _HINTS[precision]),
    )


def _compiles_fixed(path: Path, call: Any, hint: str) -> bool:
    """Whether OpenVINO compiles the network for the shapes of an example.

    Version 2026.4 ends the process at some networks with fixed shapes (an attention in three dimensions behind a
    convolution in one) that it compiles with shapes that vary.
    """
    from penjing.runtimes import isolated

    args, kwargs = call
    try:
        isolated.call("openvino", "compile_fixed", path, [list(t.shape) for t in (*args, *kwargs.values())], hint)
    except ArtifactError:
        return False
    return True


def compile_fixed(path: str, shapes: list[list[int]], hint: str) -> None:
    """Compile a network for input shapes, and forget it; raises or crashes where OpenVINO does."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(dict(enumerate(shapes)))
    for threads in ("1", "2"):  # with one, other operators are fused
        core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads})


def convert(onnx_path: str, path: str, precision: str) -> None:
    """Write model.xml and model.bin from an ONNX file, for one of the precisions.

    Raises:
        ExportError: OpenVINO can't read it.
        OutputError: The disk is full.
    """
    import onnx
    import openvino

    from penjing.onnx_files import rewrites as onnx_rewrites
    from penjing.runtimes import openvino_rewrites

    crossing = onnx.load(onnx_path)
    if onnx_rewrites.weights_of_their_own(crossing) | onnx_rewrites.without_zero_points(crossing):
        onnx.save(crossing, onnx_path)
    try:
        # convert_model folds constants, read_model does not: a third of the XML.
        model = openvino.convert_model(onnx_path)
    except Exception as error:
        raise ExportError(
            "OpenVINO can't read the network",
            code="unreadable",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            expected="operators that OpenVINO's ONNX reader knows",
            remedy="write that operator with others, or choose another runtime",
        ) from error
    openvino_rewrites.integer_lstms(model, onnx_rewrites.integer_lstms(crossing))
    _name_results(model, onnx_path)
    openvino_rewrites.first_of_equals(model)
    openvino_rewrites.select_for_booleans(model)
    openvino_rewrites.magnitudes_of_sizes(model)
    openvino_rewrites.unequal_biases(model)
    openvino_rewrites.reductions_alone(model)
    if _HINTS[precision] == "bf16":
        openvino_rewrites.finite_in_bfloat16(model)
    _name(model, onnx_path)
    try:
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
    except RuntimeError as error:
        raise OutputError(
            "the run folder can't be written",
            code="unwritable",
            got=f"{Path(path).name}: {error}",
            expected="a folder with write permission and free space",
            remedy="free some space and continue with --resume, or choose another folder with --out",
        ) from error


APART = ("convert", "compile_fixed")
"""What is done in a process of its own (see `penjing.runtimes.isolated`)."""


def _name_results(model: Any, onnx_path: str) -> None:
    """Call the operators that compute an output by their sites, as all others: the reader calls them by the output."""
    import onnx

    nodes = onnx.load(onnx_path, load_external_data=False).graph.node
    sites = {tensor: node.name for node in nodes for tensor in node.output}
    for result in model.get_results():
        value = result.input_value(0)
        for tensor in value.get_names() & sites.keys():
            value.get_node().set_friendly_name(sites[tensor])


def _name(model: Any, onnx_path: str) -> None:
    """Give the operators names that are the same at every export: the reader calls some by their number there."""
    import onnx

    graph = onnx.load(onnx_path, load_external_data=False).graph
    nodes = graph.node
    known = {part.name for part in (*nodes, *graph.initializer, *graph.input)}
    for position, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if name.rpartition("/")[0] not in known and name not in known and re.search(r"_\d+", name):
            op.set_friendly_name(f"{op.get_type_name()}#{position}")


def _compile(folder: Path, manifest: Manifest, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(folder / manifest.programs[0].files[0]))
    return core.compile_model(model, "CPU", {**manifest.settings, "INFERENCE_NUM_THREADS": str(threads)})


FIXED_SHAPES = 2
"""So many input shapes get a compiled network of their own, which is faster than one whose axes vary; the others
share one that varies, for every compiled network takes memory."""


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        import openvino

        self.core = openvino.Core()
        self.model = self.core.read_model(str(folder / manifest.programs[0].files[0]))
        self.settings = {**manifest.settings, "INFERENCE_NUM_THREADS": str(threads)}
        self.fixed = FIXED_SHAPES if manifest.fixed_shapes else 0
        self.requests: dict[Any, Any] = {}
        self.outputs = len(manifest.programs[0].outputs)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        # The request reuses its output memory: what leaves here must outlive the next call.
        results = self._request(tuple(x.shape for x in inputs)).infer(inputs, share_inputs=True, share_outputs=True)
        return [np.array(results[i]) for i in range(self.outputs)]

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        key = shapes if shapes in self.requests or len(self.requests) < self.fixed else "any"
        if key not in self.requests:
            model = self.model.clone()
            if key != "any":
                model.reshape(dict(enumerate(shapes)))
            self.requests[key] = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        return self.requests[key]


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Open model.xml with that many threads and the manifest's settings."""
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The operators of the compiled model's runtime graph."""
    runtime_model = _compile(folder, manifest, 1).get_runtime_model()
    operators = []
    for op in runtime_model.get_ordered_ops():
        info = op.get_rt_info()
        kind = info["layerType"].astype(str) if "layerType" in info else op.get_type_name()
        if kind in ("Const", "Constant", "Input", "Output", "Parameter", "Result", "Reorder"):
            continue
        precision = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else "f32"
        names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else op.get_friendly_name()
        sites = tuple(dict.fromkeys(_origin(name) for name in names.split(",") if name))
        if precision.lower() == "f16" and manifest.settings["INFERENCE_PRECISION_HINT"] == "f32":
            precision = "f32"  # it names what the weights are stored in; the products are those of the hint
        operators.append(Executed(sites, kind, _PRECISIONS.get(precision.lower(), precision.lower())))
    return operators


def profile(folder: Path, manifest: Manifest, inputs: list[np.ndarray], threads: int, calls: int) -> list[Timed]:
    """Mean times of the compiled model's operators, with the shapes of `inputs`."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(folder / manifest.programs[0].files[0]))
    if manifest.fixed_shapes:
        model.reshape(dict(enumerate(tuple(x.shape) for x in inputs)))
    settings = {**manifest.settings, "INFERENCE_NUM_THREADS": str(threads), "PERF_COUNT": "YES"}
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    total: dict[str, float] = {}
    for call in range(calls + 5):
        request.infer(inputs)
        if call >= 5:  # the first ones warm up
            for info in request.get_profiling_info():
                total[info.node_name] = total.get(info.node_name, 0.0) + info.real_time.total_seconds() * 1e3
    timings = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        name = op.get_friendly_name()
        names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else name
        kind = info["layerType"].astype(str) if "layerType" in info else op.get_type_name()
        if total.get(name):
            sites = tuple(dict.fromkeys(_origin(part) for part in names.split(",") if part))
            timings.append(Timed(sites, kind, total[name] / calls))
    return timings


def expose(folder: Path, manifest: Manifest, sites: Sequence[str], into: Path) -> list[str]:
    """Write model.xml with the values of `sites` as further outputs; returns those that it names."""
    import openvino

    model = openvino.Core().read_model(str(folder / manifest.programs[0].files[0]))
    values = {op.get_friendly_name(): op.output(0) for op in model.get_ordered_ops() if op.get_output_size()}
    given = {result.input_value(0).get_node().get_friendly_name() for result in model.get_results()}
    shown = []
    for site in sites:
        name = next((n for n in (f"{site}/bias", f"{site}/scale", site) if n in values), None)
        if name is not None and name not in given:
            model.add_outputs([values[name]])
            given.add(name)
            shown.append(site)
    openvino.save_model(model, str(into / manifest.programs[0].files[0]), compress_to_fp16=False)
    return shown


def _origin(name: str) -> str:
    """The reader and the low-precision passes append what they made of a node: "conv1/WithoutBiases"."""
    name = re.split(r"/(?:WithoutBiases|Dequantization|Fused|bias\b|scale\b|axes\b|reverse\b)", name)[0]
    return name.removesuffix("_original")


COMMANDS = """
With OpenVINO's own program (C++; `benchmark_app` of the package, `pip install openvino`):

```
benchmark_app -m @FILE@ -d CPU -hint none -nstreams 1 -nthreads @THREADS@ -api sync -t 10 -data_shape "@SHAPES@"
```

On Android, with the program built for it (arm64):

```
adb push @FILES@ benchmark_app libopenvino*.so /data/local/tmp/
adb shell "cd /data/local/tmp && LD_LIBRARY_PATH=. ./benchmark_app -m @FILE@ -d CPU -hint none -nstreams 1 \\
  -nthreads @THREADS@ -api sync -t 10 -data_shape '@SHAPES@'"
```
"""
"""How the runtime's own programs measure the artifact."""

LOAD = '''\
"""Open this artifact with OpenVINO alone: ``from load import predict``. Needs: numpy, openvino."""
@ALONE@import json, os, pathlib
import numpy as np
import openvino

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
SETTINGS = ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT", "NUM_STREAMS", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
settings = {name: value for name, value in MANIFEST["settings"].items() if name in SETTINGS}
settings["INFERENCE_NUM_THREADS"] = os.environ.get("THREADS", "@THREADS@")
core = openvino.Core()
model = core.read_model(str(HERE / PROGRAM["files"][0]))
compiled = {}
fixed = 2 if MANIFEST["fixed_shapes"] else 0


def compiled_for(shapes):
    """A network compiled for these shapes alone is faster; from the third on they share one whose axes vary."""
    key = shapes if shapes in compiled or len(compiled) < fixed else "any"
    if key not in compiled:
        copy = model.clone()
        if key != "any":
            copy.reshape(dict(enumerate(shapes)))
        compiled[key] = core.compile_model(copy, "CPU", settings)
    return compiled[key]


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    results = compiled_for(tuple(x.shape for x in inputs))(inputs)
    return [np.array(results[i]) for i in range(len(PROGRAM["outputs"]))]

'''
