"""ncnn on the processor, made for phones: what it accelerates, export by way of pnnx, load, and what it executes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError
from penjing.records.manifest import Manifest, Program, sample_axes
from penjing.runtimes.artifact import Executed
from penjing.runtimes.ncnn_files import NO_BATCH, read_param, write_param
from penjing.runtimes.ncnn_integers import in_integers, placed
from penjing.steps.plan import Capabilities, Formats, QuantSpec, channel_multiple

PARAM, BIN = "model.param", "model.bin"

SETTINGS = {"batch_axes": "([0-9]|-)(,([0-9]|-))*", "half_precision": "on|off"}
"""What a manifest may tell it, and how that reads: the axis of every input that ncnn takes for the batch."""
APART = ()
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""

_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Symmetric integers, rounded at the inputs of convolutions and linear layers; what they give is in floats."""
    return Capabilities(
        runtime="ncnn",
        precisions=("fp32", "fp16", "int8"),
        weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
        activation=QuantSpec(bits=8, signed=True, symmetric=True),
        integer=frozenset({"conv", "linear"}),
        fuses=frozenset({"relu", "clip"}),
        passthrough=frozenset(),
        weights=Formats(symmetric=(True,), per=("tensor", "channel")),
        activations=Formats(symmetric=(True,), per=("tensor",), grids=("uniform",)),
        dynamic=None,
        stored=frozenset(),
        channel_multiple=channel_multiple(instruction_sets),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.param and model.bin by way of TorchScript and pnnx, from an example of one sample."""
    from penjing.network.exporting import input_names, port_names
    from penjing.runtimes.ncnn_convert import batches, converted, refuse_unknown
    from penjing.runtimes.ncnn_graph import in_floats, scripted
    from penjing.runtimes.ncnn_ports import ports, resized, shapes
    from penjing.tasks.outputs import output_names

    words = input_names(network, *call)
    names = port_names(network, words, output_names(structure))
    inputs, outputs = ports(network, call, dynamic, words, *names)
    floats, weighted = in_floats(network)
    single = resized(call, dynamic, 1)
    sizes = shapes(single, dynamic, words)
    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / "model.pt").write_bytes(scripted(floats, single))
        written = converted(network, Path(aside), sizes)
        layers, data = read_param(written["param"].decode()), written["bin"]
        halved = converted(network, Path(aside), sizes, half=True)["bin"] if precision == "fp16" else data
    refuse_unknown(layers, network)
    places = placed(layers, data, weighted)
    layers = [layer.called(places[i][0].site if i in places else "") for i, layer in enumerate(layers)]
    if precision == "int8":
        layers, halved = in_integers(layers, data, places, weighted)
    (folder / PARAM).write_text(write_param(layers), encoding="utf-8")
    (folder / BIN).write_bytes(halved)
    return Manifest(
        runtime="ncnn",
        precision=precision,
        programs=(Program(name="main", files=(PARAM, BIN), inputs=inputs, outputs=outputs),),
        structure=structure,
        settings={
            "batch_axes": batches(written["py"].decode(), inputs),
            "half_precision": "on" if precision == "fp16" else "off",
        },
    )


def _opened(folder: Path, manifest: Manifest, threads: int) -> Any:
    import ncnn

    net = ncnn.Net()
    for option in _HALF:
        setattr(net.opt, option, manifest.settings["half_precision"] == "on" and "bf16" not in option)
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    param, weights = (str(folder / name) for name in manifest.programs[0].files)
    for load, path in ((net.load_param, param), (net.load_model, weights)):
        if load(path) != 0:
            raise ArtifactError(
                "ncnn can't read a file of the artifact",
                code="unopenable",
                got=path,
                expected="the file that was written, of a version that this ncnn reads",
                remedy="`penjing verify` checks whether the files are unchanged",
            )
    return net


class _Session:
    """One call a sample: an array is handed over with a batch of one, whatever its axis."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        program = manifest.programs[0]
        self.net = _opened(folder, manifest, threads)
        self.batches = [NO_BATCH if axis == "-" else int(axis) for axis in manifest.settings["batch_axes"].split(",")]
        count = len(program.inputs)
        axes = sample_axes((*program.inputs, *program.outputs))
        self.axes, self.joined = axes[:count], axes[count:]
        self.outputs = program.outputs

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        sizes = {x.shape[a] for x, a in zip(inputs, self.axes, strict=True) if a is not None}
        if not sizes:
            return self._one(inputs)
        parts = [
            self._one([x if a is None else np.take(x, [i], a) for x, a in zip(inputs, self.axes, strict=True)])
            for i in range(max(sizes))
        ]
        return [
            results[0] if axis is None else np.concatenate(results, axis)
            for axis, results in zip(self.joined, zip(*parts, strict=True), strict=True)
        ]

    def _one(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        import ncnn

        with self.net.create_extractor() as extractor:
            for i, (x, axis) in enumerate(zip(inputs, self.batches, strict=True)):
                x = np.ascontiguousarray(x, dtype=np.float32 if x.dtype.kind == "f" else np.int32)
                extractor.input(f"in{i}", ncnn.Mat(x, batch_index=axis).clone())
            results = []
            for i, (port, joined) in enumerate(zip(self.outputs, self.joined, strict=True)):
                code, mat = extractor.extract(f"out{i}")
                if code != 0:
                    raise RuntimeError(f"ncnn returned {code} for the output {port.name}")
                # A result that ncnn computes without the batch has an axis less.
                batch = (joined or 0) if mat.dims < len(port.shape) else NO_BATCH
                result = np.array(mat.numpy(batch_index=batch)).astype(port.dtype)
                results.append(result if port.shape else result.reshape(()))
        return results


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Open model.param and model.bin with that many threads."""
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """The layers that ncnn makes of model.param on this processor.

    It computes in integers where scales of integers follow a layer's weights, and has no other kernel for those; in
    half precision where the layer says so: on many processors weights alone are halved.
    """
    opened = {layer.name: layer for layer in _opened(folder, manifest, 1).layers()}
    halves = manifest.settings["half_precision"] == "on"
    operators = []
    for layer in read_param((folder / PARAM).read_text(encoding="utf-8")):
        if layer.type not in ("Input", "Split"):
            floats = "fp16" if halves and opened[layer.name].support_fp16_storage else "fp32"
            sites = (layer.site,) if layer.site else ()
            operators.append(Executed(sites, layer.type, "int8" if layer.integer else floats))
    return operators


COMMANDS = """
With ncnn's own program (C++; `benchncnn`, built with it; it takes the layers of the file, and weights of its own):

```
benchncnn 10 @THREADS@ 0 -1 0 param=@FILE@ shape=@SHAPES@
```

On Android, with the program built for it:

```
adb push @FILES@ benchncnn /data/local/tmp/
adb shell "cd /data/local/tmp && ./benchncnn 10 @THREADS@ 2 -1 0 param=@FILE@ shape=@SHAPES@"
```
"""
"""How the runtime's own programs measure the artifact."""

LOAD = '''\
"""Open this artifact with ncnn alone: ``from load import predict``. Needs: numpy, ncnn."""
@ALONE@import json, os, pathlib
import numpy as np
import ncnn

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
net = ncnn.Net()
for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
    setattr(net.opt, option, MANIFEST["settings"]["half_precision"] == "on")
net.opt.use_bf16_packed = net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
net.opt.num_threads = int(os.environ.get("THREADS", @THREADS@))
if net.load_param(str(HERE / PROGRAM["files"][0])) or net.load_model(str(HERE / PROGRAM["files"][1])):
    raise SystemExit("ncnn can't read the artifact")
BATCHES = [233 if axis == "-" else int(axis) for axis in MANIFEST["settings"]["batch_axes"].split(",")]
names = [port["shape"][0] for port in PROGRAM["inputs"] if port["shape"] and isinstance(port["shape"][0], str)]


def axes(ports):
    """The axis of each that holds the samples."""
    return [p["shape"].index(names[0]) if names and names[0] in p["shape"] else None for p in ports]


def one(inputs):
    """One sample."""
    results = []
    with net.create_extractor() as extractor:
        for i, (x, axis) in enumerate(zip(inputs, BATCHES)):
            x = np.ascontiguousarray(x, dtype=np.float32 if x.dtype.kind == "f" else np.int32)
            extractor.input(f"in{i}", ncnn.Mat(x, batch_index=axis).clone())
        for i, (port, axis) in enumerate(zip(PROGRAM["outputs"], axes(PROGRAM["outputs"]))):
            code, mat = extractor.extract(f"out{i}")
            if code:
                raise RuntimeError(f"ncnn returned {code}")
            batch = (axis or 0) if mat.dims < len(port["shape"]) else 233
            result = np.array(mat.numpy(batch_index=batch)).astype(port["dtype"])
            results.append(result if port["shape"] else result.reshape(()))
    return results


def run(inputs):
    """Flat list of arrays in, flat list of arrays out; ncnn is called for one sample after the other."""
    held = axes(PROGRAM["inputs"])
    for port, x in zip(PROGRAM["inputs"], inputs):
        wrong = [e for e, n in zip(port["shape"], x.shape) if not isinstance(e, str) and e != n]
        if wrong or len(port["shape"]) != len(x.shape):
            raise ValueError(f"{port['name']} has the shape {x.shape}; expected {port['shape']}")
    count = max((x.shape[a] for x, a in zip(inputs, held) if a is not None), default=None)
    if count is None:
        return one(inputs)
    parts = [one([x if a is None else np.take(x, [i], a) for x, a in zip(inputs, held)]) for i in range(count)]
    return [r[0] if a is None else np.concatenate(r, a) for a, r in zip(axes(PROGRAM["outputs"]), zip(*parts))]

'''
