"""Kernels of Penjing's own on the processor: a binary or ternary network as one library, which needs no runtime at all.

Binary layers count bits (`penjing.kernels.binary`), ternary weights take two bits (`penjing.kernels.ternary`); what is
around them is computed in 32 bits by plain C.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError, ExportError
from penjing.records.manifest import Manifest, Program
from penjing.runtimes import trusted
from penjing.runtimes.artifact import Executed
from penjing.steps.plan import GENERIC, Capabilities, channel_multiple

LIBRARY = "model.so"
_SITES = r"([^,]{1,200}(,[^,]{1,200})*)?"

_COMPUTED = {"binary": "count bits", "ternary": "packed weights", "fp32": "plain C"}

SETTINGS = {"instructions": r"[a-z0-9-]{1,32}", "flags": r"[a-z0-9_,]{0,400}"} | dict.fromkeys(_COMPUTED, _SITES)
"""What a manifest may tell it, and how that reads: what the library was generated for, and how layers are computed."""
APART = ()
"""What else is done in a process of its own (see `penjing.runtimes.isolated`)."""


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Two levels alone are integers to it, and those are in the weights themselves: it has no quantized operators."""
    return Capabilities(
        runtime="kernels",
        precisions=("fp32", "fp16"),
        weight=GENERIC.weight,
        activation=GENERIC.activation,
        integer=frozenset(),
        fuses=frozenset(),
        passthrough=frozenset(),
        dynamic=None,
        stored=frozenset(),
        channel_multiple=channel_multiple(instruction_sets),
        notes=(
            "layers of quantize.Binary count bits, weights of quantize.Ternary take two bits",
            "other layers are computed in fp32, and stored in 16 bits for fp16",
            "it takes networks with such layers alone, and a C compiler links them",
        ),
    )


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.so for this processor.

    Raises:
        ExportError: No layer is binary, or there is an operator that the kernels lack; the error names it.
    """
    from penjing.kernels.instruction_sets import here
    from penjing.kernels.library import write
    from penjing.kernels.network import described, has_levels
    from penjing.network.exporting import input_names, port_names
    from penjing.runtimes.single_sample import ports
    from penjing.tasks.outputs import output_names

    names = port_names(network, input_names(network, *call), output_names(structure))
    inputs, outputs, _ = ports(network, call, dynamic, *names, "kernels")
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) not in (2, 4):
        raise ExportError(
            "a library of kernels takes one batch of images or vectors, and gives one tensor",
            code="ports",
            got=f"inputs {[list(p.shape) for p in inputs]}, outputs {[list(p.shape) for p in outputs]}",
            expected="an input (batch, channels, height, width) or (batch, channels), and one output",
            remedy="choose another runtime",
        )
    if not has_levels(network):
        raise _without_levels(network)
    operations = described(network, inputs[0].shape[1:])
    instructions = here()
    executed = write(operations, folder / LIBRARY, instructions, float_bits=16 if precision == "fp16" else 32)
    trusted.remember(folder / LIBRARY)
    return Manifest(
        runtime="kernels",
        precision=precision,
        programs=(Program(name="main", files=(LIBRARY,), inputs=inputs, outputs=outputs),),
        structure=structure,
        settings={
            "instructions": instructions.name,
            "flags": ",".join(sorted(instructions.flags)),
            **{kind: ",".join(site for site, how in executed.items() if how == kind) for kind in _COMPUTED},
        },
    )


def _without_levels(network: Any) -> ExportError:
    """The error of a network without weights of two or three levels: other runtimes are faster then."""
    weights = {name: p.numel() for name, p in network.named_parameters() if p.dim() > 1}
    largest = max(weights, key=lambda name: weights[name], default="").rpartition(".")[0]
    return ExportError(
        "the runtime kernels is for networks with binary or ternary layers, and this network has none",
        code="no-levels",
        got=f"floating-point weights of {largest}, the largest" if largest else "no layer with weights",
        expected="layers whose weights have two or three levels",
        remedy="put quantize.Binary(...) or quantize.Ternary(...) into the recipe, or choose another runtime",
    )


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        path = folder / manifest.programs[0].files[0]
        trusted.check(path)
        from penjing.kernels.instruction_sets import named, runs_here
        from penjing.kernels.opened import Opened

        row = named(manifest.settings["instructions"])
        if not runs_here(row):
            raise ArtifactError(
                "the artifact was generated for another processor",
                code="processor",
                got="a processor without some of its instructions",
                expected=f"{row.machine or 'any machine'} with {', '.join(sorted(row.flags)) or 'nothing further'}",
                remedy="run `penjing compress` on this machine",
            )
        (given,), (answer,) = manifest.programs[0].inputs, manifest.programs[0].outputs
        self.opened = Opened(path, (given.shape[1:], answer.shape[1:]), threads)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call."""
        return [self.opened(inputs[0])]


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Load model.so, if this user's Penjing wrote it or its hash is trusted; threads share rows, or samples.

    Raises:
        ArtifactError: It is another's machine code, or for another processor.
    """
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """Layers and additions as the library computes them.

    "binary" counts bits; "ternary" multiplies weights of two bits in fp32; what is around them is "fp32".
    """
    return [
        Executed((site,), name, kind)
        for kind, name in _COMPUTED.items()
        for site in filter(None, manifest.settings[kind].split(","))
    ]


COMMANDS = """
Any C or C++ program loads model.so (`dlopen`), or is linked with it:

```
int64_t penjing_bytes(void);
void penjing_prepare(char *memory);  /* penjing_bytes() zeros, at an address that is a multiple of 64 */
void penjing_network(const float *in, float *out, char *memory, int32_t samples);
void penjing_threads(int32_t count);  /* of libraries with large layers, whose rows they share; 1 before */
```

It is generated for one kind of processor (`settings` in manifest.json).
"""

LOAD = '''\
"""Open this artifact, a shared library, with NumPy alone: ``from load import predict``. Needs: numpy."""
@ALONE@import ctypes, json, pathlib
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
flags = set(filter(None, MANIFEST["settings"]["flags"].split(",")))
if flags and not any(flags <= set(line.split()) for line in open("/proc/cpuinfo") if line.startswith("flags")):
    raise SystemExit(f"this processor lacks some of {', '.join(sorted(flags))}")
# Machine code: it is run when it is called.
library = ctypes.CDLL(str(HERE / PROGRAM["files"][0]))
library.penjing_bytes.restype = ctypes.c_int64
memory = np.zeros(library.penjing_bytes() + 64, np.uint8)
memory = memory[-memory.ctypes.data % 64:]
library.penjing_prepare(ctypes.c_void_p(memory.ctypes.data))


def run(inputs):
    """Flat list of arrays in, flat list of arrays out; not for several threads at once."""
    (x,), shape = inputs, PROGRAM["inputs"][0]["shape"][1:]
    if list(x.shape[1:]) != shape:
        raise ValueError(f"the input has the shape {x.shape}; expected (samples, {', '.join(map(str, shape))})")
    out = np.empty((len(x), *PROGRAM["outputs"][0]["shape"][1:]), np.float32)
    places = [ctypes.c_void_p(array.ctypes.data) for array in (x, out, memory)]
    library.penjing_network(*places, ctypes.c_int32(len(x)))
    return [out]

'''
