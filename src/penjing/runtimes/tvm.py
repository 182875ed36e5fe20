"""TVM on the processor: a network compiled with LLVM for one kind of processor, with schedules tuned in a limited time.

The schedules that TVM starts from are many times slower than tuned ones: see `penjing.runtimes.tvm_tuning`.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import ArtifactError, ExportError, UsageError
from penjing.records.manifest import Manifest, Program
from penjing.runtimes import trusted
from penjing.runtimes.artifact import Executed
from penjing.runtimes.sample_by_sample import axes, each
from penjing.steps.plan import GENERIC, Capabilities, channel_multiple

SETTINGS = {"processor": r"[A-Za-z0-9_.+-]{1,64}"}
"""What a manifest may tell it, and how that reads."""
APART = ("build",)
"""What is done in a process of its own (see `penjing.runtimes.isolated`)."""

SECONDS_VARIABLE = "PENJING_TVM_SECONDS"
SECONDS = 120.0  # of tuning, unless the environment variable says otherwise; what was tuned before costs nothing
_COMPILING_S = 600.0  # that building may take beside the tuning


def capabilities(instruction_sets: tuple[str, ...]) -> Capabilities:
    """Floating point alone: Relax has quantizers, and computes what is between them in floating point."""
    return Capabilities(
        runtime="tvm",
        precisions=("fp32",),
        weight=GENERIC.weight,
        activation=GENERIC.activation,
        integer=frozenset(),
        fuses=frozenset({"relu", "clip"}),
        passthrough=GENERIC.passthrough,
        dynamic=None,
        channel_multiple=channel_multiple(instruction_sets),
        notes=(
            f"schedules are tuned for {SECONDS:.0f} s ({SECONDS_VARIABLE} sets another time), and kept for later",
            "it runs samples one by one",
            "no INT8: its Relax front end has no integer kernels",
        ),
    )


def seconds() -> float:
    """Seconds of tuning.

    Raises:
        UsageError: The environment variable is not a number of seconds.
    """
    text = os.environ.get(SECONDS_VARIABLE, "")
    try:
        value = float(text) if text else SECONDS
        if not 0 <= value <= 86_400:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{SECONDS_VARIABLE} is not a time", code="seconds", got=text[:40], expected="0 to 86400 seconds"
        ) from None
    return value


def export(network: Any, call: Any, dynamic: Any, precision: str, structure: Any, folder: Path) -> Manifest:
    """Write model.so, for one sample and for this processor."""
    import torch

    from penjing.runtimes import isolated, single_sample
    from penjing.tasks.outputs import output_names

    names = output_names(structure)
    program, inputs, outputs = single_sample.exported(network, call, dynamic, names, "TVM", _prepared)
    _count_from_the_front(program)
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "relax.json"
        path.write_text(_relax(program, network), encoding="utf-8")
        library = folder.absolute() / "model.so"
        budget = seconds() if network.meta.get("tuned", True) else None
        threads = torch.get_num_threads()
        more_s = (budget or 0.0) * 1.5 + _COMPILING_S
        processor = isolated.call("tvm", "build", path, str(library), budget, threads, more_s=more_s)
    trusted.remember(library)
    return Manifest(
        runtime="tvm",
        precision=precision,
        programs=(Program(name="main", files=("model.so",), inputs=inputs, outputs=outputs),),
        structure=structure,
        settings={"processor": processor},
    )


def _prepared(network: Any) -> Any:
    from penjing.runtimes import decomposed

    network = decomposed.sited(network)
    decomposed.maxima_of_axes(network)
    return network


def _count_from_the_front(program: Any) -> None:
    """Write indices that count from the back as ones from the front: TVM reads memory before the tensor for them.

    Those are of `select`, and of constants that index a tensor, such as x[:, -1] and x[:, [-1, -2]].
    """
    import torch

    names = {s.arg.name: s.target for s in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.select.int and node.args[2] < 0:
            source, axis, index = node.args
            node.args = (source, axis, index + source.meta["val"].shape[axis])
        elif node.target is torch.ops.aten.index.Tensor:
            for axis, index in enumerate(node.args[1]):
                name = None if index is None else names.get(_stored(index))
                holder = next((held for held in (program.constants, program.state_dict) if name in held), None)
                if holder is not None and holder[name].dtype in (torch.int32, torch.int64):
                    size = node.args[0].meta["val"].shape[axis]
                    holder[name] = torch.where(holder[name] < 0, holder[name] + size, holder[name])


def _stored(node: Any) -> str | None:
    """The name of the stored tensor that a node gives, behind copies of it; None where others read it too."""
    while len(node.users) == 1 and node.op == "call_function" and "lift_fresh" in str(node.target):
        node = node.args[0]
    return str(node.name) if len(node.users) == 1 else None


def _relax(program: Any, network: Any) -> str:
    """The program of a network as Relax, in JSON.

    Raises:
        ExportError: TVM's front end has no such operator.
    """
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    program = program.run_decompositions()
    try:
        own = {"amax.default": _largest, "amin.default": _smallest}
        module = from_exported_program(program, keep_params_as_input=False, custom_convert_map=own)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ExportError(
            f"TVM can't read the network{_culprit(error, text, program, network)}",
            code="unreadable",
            got=f"{type(error).__name__}: {text}",
            expected="operators that the Relax front end of TVM knows",
            remedy="write that operator with others, or choose another runtime",
        ) from error
    return str(tvm.ir.save_json(module))


def _largest(node: Any, importer: Any) -> Any:
    """The maximum of axes, which the front end (0.26) has no form of."""
    from tvm import relax

    return importer.block_builder.emit(relax.op.max(*_over_axes(node, importer)))


def _smallest(node: Any, importer: Any) -> Any:
    from tvm import relax

    return importer.block_builder.emit(relax.op.min(*_over_axes(node, importer)))


def _over_axes(node: Any, importer: Any) -> tuple[Any, Any, bool]:
    """The value, its axes (None: all), and whether they stay with a size of 1."""
    source, axes, keep = (*node.args, [], False)[:3] if len(node.args) == 1 else (*node.args, False)[:3]
    return importer.env[source], list(axes) or None, keep


def _culprit(error: BaseException, text: str, program: Any, network: Any) -> str:
    """The operator that the front end has no form of, or that it was translating, in words; empty if neither is told.

    Args:
        error: What it raised.
        text: Its words, such as "Unsupported function types ['amax.default']".
        program: What was translated.
        network: Of which the program was made.
    """
    from torch import fx

    from penjing.network.graph import line, sites
    from penjing.runtimes.decomposed import site

    nodes = [n for n in program.graph.nodes if n.op == "call_function" and f"'{_name(n)}'" in text]
    nodes += [n for frame, _ in traceback.walk_tb(error.__traceback__)
              if isinstance(n := frame.f_locals.get("node"), fx.Node) and n.op == "call_function"]  # fmt: skip
    if not nodes:
        return ""
    own = sites(network).get(site(nodes[0]))
    return f": {site(nodes[0]) or nodes[0].name} ({_name(nodes[0])}){'' if own is None else line(own)}"


def _name(node: Any) -> str:
    """What the front end calls an operator: without its library."""
    return str(node.target).partition(".")[2]


def build(path: str, library: str, budget: float | None, threads: int) -> str:
    """See `penjing.runtimes.tvm_tuning.build`."""
    from penjing.runtimes import tvm_tuning

    return tvm_tuning.build(path, library, budget, threads)


class _Session:
    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        path = folder / manifest.programs[0].files[0]
        trusted.check(path)
        import tvm
        from tvm import relax

        here, built = processor(), manifest.settings["processor"]
        if here != built:
            raise ArtifactError(
                "the artifact was compiled for another processor",
                code="processor",
                got=f"{here}, as LLVM calls it",
                expected=built,
                remedy="run `penjing compress` on this machine",
            )
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self.tvm, self.axes = tvm, axes(manifest.programs[0])
        self.types = [port.dtype for port in manifest.programs[0].outputs]
        self.main = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())["main"]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One call, sample by sample."""
        return each(inputs, self.axes, self._one)

    def _one(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        given = [self.tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs]
        results = self.main(*given)
        values = [x.numpy() for x in ([results] if hasattr(results, "numpy") else results)]
        # The front end makes some integers of another width.
        return [x.astype(kind, copy=False) for x, kind in zip(values, self.types, strict=True)]


def processor() -> str:
    """What LLVM calls this machine's processor, such as "znver4"."""
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


def open_session(folder: Path, manifest: Manifest, threads: int) -> _Session:
    """Load model.so, if this user compiled it here, with that many threads of TVM's pool for the whole process.

    Raises:
        ArtifactError: It is another's machine code, or for another processor.
    """
    return _Session(folder, manifest, threads)


def executed(folder: Path, manifest: Manifest) -> list[Executed]:
    """Nothing is told: functions are fused and named by TVM, all in floating point."""
    return []


COMMANDS = """
TVM's C++ runtime loads model.so (`tvm::runtime::Module::LoadFromFile`, then the virtual machine of Relax). It is
compiled for one kind of processor (`settings` in manifest.json): for another device, run `penjing compress` there.
"""

LOAD = '''\
"""Open this artifact with TVM alone: ``from load import predict``. Needs: numpy, apache-tvm."""
@ALONE@import json, os, pathlib
import numpy as np
import tvm
from tvm import relax

HERE = pathlib.Path(__file__).resolve().parent / "@FOLDER@"
MANIFEST = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
PROGRAM = MANIFEST["programs"][0]
tvm.get_global_func("runtime.config_threadpool")(1, int(os.environ.get("THREADS", @THREADS@)))
# Machine code: it is run when it is called.
machine = relax.VirtualMachine(tvm.runtime.load_module(str(HERE / PROGRAM["files"][0])), tvm.cpu())


def axes(ports):
    """The axis of the samples of each, None where there is none."""
    return [next((i for i, n in enumerate(port["shape"]) if isinstance(n, str)), None) for port in ports]


def one(inputs):
    """It is compiled for a single sample."""
    results = machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs))
    values = [x.numpy() for x in ([results] if hasattr(results, "numpy") else results)]
    return [x.astype(port["dtype"], copy=False) for x, port in zip(values, PROGRAM["outputs"])]


def run(inputs):
    """Flat list of arrays in, flat list of arrays out."""
    places = axes(PROGRAM["inputs"])
    counts = [x.shape[axis] for x, axis in zip(inputs, places) if axis is not None]
    if not counts or counts[0] == 1:
        return one(inputs)
    samples = [
        one([x if axis is None else np.take(x, [i], axis) for x, axis in zip(inputs, places)])
        for i in range(counts[0])
    ]
    return [
        parts[0] if axis is None else np.concatenate(parts, axis)
        for parts, axis in zip(zip(*samples), axes(PROGRAM["outputs"]))
    ]

'''
