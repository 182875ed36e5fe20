"""Opening a SOURCE: Python, an exported program, an ONNX or Keras file, a Hugging Face folder, a built-in network.

Weights may come from a file of their own; see `penjing.sources.weights`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from penjing.errors import CheckpointError, PenjingError, SourceError, UsageError
from penjing.modes import in_eval_mode
from penjing.network.single_precision import single_module
from penjing.network.wrappers import unwrapped
from penjing.sources import finite, huggingface, keras, keras_h5, onnx, pt2, weights
from penjing.tasks.outputs import first_output
from penjing.tasks.single_precision import single_task
from penjing.tasks.task import Call, Task
from penjing.tasks.undisturbed import same_state
from penjing.tasks.usercode import call_named, line_of, load_named, public_callables, split_spec, suggest, suggest_file

_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")
_WEIGHTS = (".safetensors", ".npz", *keras_h5.SUFFIXES)
_FORMS = (
    "file.py:factory, package.module:factory, a .pt2, .onnx or .keras file, a Hugging Face folder or a built-in "
    "architecture"
)
_FILES = (".pt2", ".onnx", ".keras")
_PAIRED = (
    "give the network as file.py:factory or a built-in architecture, and its weights with --weights {} (in Python: "
    "load_weights)"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened network, as given by the user.

    Attributes:
        name: Its name in tables.
        module: The network, in the mode the user left it in.
        spec: The string it was opened by; None for a network given as an object.
        example: Example inputs in the form of `Task.example`, if the source declares them.
        dynamic: Axes that vary in the form of `Task.dynamic`, if the source declares them.
        loaded: The weights that it was given from a file of their own.
        inputs: Its inputs in words, if the source declares them.
        notes: What else the user is to know of what was opened.
    """

    name: str
    module: nn.Module | ExportedProgram
    spec: str | None = None
    example: Any | None = None
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None
    loaded: weights.Loaded | None = None
    inputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_source(
    spec: str | Path | nn.Module | ExportedProgram | Source,
    *,
    task: Task | None = None,
    weights: Path | str | None = None,
    ignore: Sequence[str] = (),
) -> Source:
    """Open a SOURCE, and run it once on the example if a task is given.

    Args:
        spec: ``file.py:factory``, ``package.module:factory`` (a callable without arguments that returns a module,
            or a module), a ``.pt2``, ``.onnx`` or ``.keras`` file, a Hugging Face folder, the name of a built-in
            architecture, or an object: a module, a model of Keras or an exported program; a source that is open stays
            as it is.
        task: A task whose example the network must accept.
        weights: A file of weights for the network, or ``FILE:key``.
        ignore: Patterns of names in that file that the network need not have.

    Raises:
        SourceError: It is missing, its factory raises, it is not a network, a weight is NaN, or its forward fails on
            the example.
        CheckpointError: Opening it would run code that the user did not name.
        MissingDependency: A package that this kind of source needs is not installed.
    """
    source = spec if isinstance(spec, Source) else _open(str(spec) if isinstance(spec, Path) else spec)
    if weights is None and ignore:
        raise UsageError(
            "names to ignore were given without a file of weights",
            code="no-weights",
            got=", ".join(ignore),
            expected="--weights FILE beside --ignore-weights",
        )
    if weights is not None:
        source = _with_weights(source, weights, ignore)
    finite.check_module(source.module, source.name)
    if task is not None:
        check_forward(source, task)
    return source


def load_weights(model: str | Path | nn.Module, file: Path | str, *, ignore: Sequence[str] = ()) -> nn.Module:
    """Give a network the weights of a file: all of them or, with an error that lists what does not fit, none.

    The file is safetensors, what `torch.save` wrote (a state dict, alone or within a training checkpoint), or the index
    of several such files. It is read without running code. ``FILE:key`` takes the state dict below that key, such as
    ``last.ckpt:ema``. Prefixes that training has left (``module.``, ``_orig_mod.``, ``model.``) are taken off where all
    names fit then. What is half precision in the file has the network's own precision.

    Args:
        model: The network, which is changed in place, or a SOURCE as on the command line.
        file: The weights.
        ignore: Patterns of names in the file that the network need not have: ``["criterion.*"]``.

    Returns:
        The network.

    Raises:
        CheckpointError: The file can't be read, would run code, holds NaN, or does not fit; the network is unchanged.
        SourceError: The SOURCE can't be opened.
    """
    source = open_source(model, weights=file, ignore=ignore)
    assert isinstance(source.module, nn.Module)
    same = isinstance(model, nn.Module) and not keras.is_model(model)  # a model of Keras is opened as a copy
    return model if isinstance(model, nn.Module) and same else source.module


def _with_weights(source: Source, file: Path | str, ignore: Sequence[str]) -> Source:
    if not isinstance(source.module, nn.Module):
        raise SourceError(
            "weights can't be loaded into an exported program",
            code="weights-of-a-program",
            got=source.spec or source.name,
            expected="a network that Python builds, or a built-in architecture",
            remedy="give the file of weights with the factory that the program was exported from",
        )
    return replace(source, loaded=weights.load(source.module, file, ignore))


def _open(spec: Any) -> Source:
    if keras.is_model(spec):
        return Source(name=type(spec).__name__, module=keras.open_model(spec))
    if isinstance(spec, nn.Module | ExportedProgram):
        example = _program_example(spec) if isinstance(spec, ExportedProgram) else None
        module = spec if isinstance(spec, ExportedProgram) else unwrapped(spec)
        dynamic = _program_axes(spec) if isinstance(spec, ExportedProgram) else None
        return Source(name=type(module).__name__, module=module, example=example, dynamic=dynamic)
    if not isinstance(spec, str):
        raise SourceError(
            "the source is not a network",
            code="not-a-network",
            got=type(spec).__name__,
            expected=f"an nn.Module, or {_FORMS}",
            remedy="wrap a function in a module whose forward calls it; for a traced or scripted one, give the original"
            if callable(spec)
            else None,
        )
    from penjing import architectures

    if spec in architectures.names():
        return Source(name=spec, module=architectures.build(spec), spec=spec)
    parts = split_spec(spec)
    if parts is not None:
        return _open_python(spec, *parts)
    path = Path(spec)
    if not path.is_dir():
        _refuse_suffix(path, path.suffix.lower())
    if path.is_dir() or (path.suffix.lower() in _FILES and path.exists()):
        return replace(_open_file(path), spec=spec)
    plain = "/" not in spec and "\\" not in spec
    raise SourceError(
        "the source is missing",
        code="missing",
        got=repr(spec),
        expected=_FORMS,
        remedy=(suggest(spec, architectures.names()) if plain else None)
        or suggest_file(path)
        or "check the path; built-in architectures: " + ", ".join(architectures.names()),
    )


def open_file(path: Path) -> Source:
    """Open a ``.pt2``, ``.onnx`` or ``.keras`` file or a Hugging Face folder without running code from it.

    Raises:
        SourceError: The folder does not contain a network, or a weight is NaN.
        CheckpointError: The file is damaged, or would run code.
        MissingDependency: A package that this kind of source needs is not installed.
    """
    source = _open_file(path)
    finite.check_module(source.module, source.name)
    return source


def _open_file(path: Path) -> Source:
    if path.is_dir():
        return _open_folder(str(path), path)
    if path.suffix.lower() == ".onnx":
        network, example, dynamic = onnx.open_network(path)
        return Source(
            name=path.stem,
            module=network,
            spec=str(path),
            example=example,
            dynamic=dynamic,
            inputs=network.declared,
        )
    if path.suffix.lower() == ".keras":
        model, inputs = keras.open_file(path)
        return Source(name=path.stem, module=model, spec=str(path), example=inputs)
    program = pt2.open_program(path)
    axes = _program_axes(program)
    return Source(name=path.stem, module=program, spec=str(path), example=_program_example(program), dynamic=axes)


def _open_python(spec: str, where: str, name: str) -> Source:
    opened = load_named(where, name, error=SourceError, role="source")
    if not keras.is_model(opened) and not isinstance(opened, nn.Module | ExportedProgram) and callable(opened):
        opened = call_named(opened, where, error=SourceError, role="source")
    if keras.is_model(opened):
        opened = keras.open_model(opened)
    if not isinstance(opened, nn.Module | ExportedProgram):
        raise SourceError(
            f"{spec} is not a network",
            code="not-a-network",
            got=type(opened).__name__,
            expected="an nn.Module, or a callable without arguments that returns one",
            remedy="return the module itself (not its state dict, nor a tuple)",
        )
    module = opened if isinstance(opened, ExportedProgram) else unwrapped(opened)
    return Source(name=name, module=module, spec=spec)


def _open_folder(spec: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        run = (folder / "record.json").is_file()
        raise SourceError(
            "the folder is a finished run, not a source" if run else "the folder holds no Hugging Face model",
            code="run" if run else "no-model",
            got=str(folder),
            expected=f"config.json and model.safetensors in it, or another source: {_FORMS}",
            remedy="penjing measure or penjing verify opens it" if run else "give the folder that holds config.json",
        )
    module, example, notes = huggingface.open_folder(folder)
    return Source(name=folder.resolve().name, module=module, spec=spec, example=example, notes=notes)


def _refuse_suffix(path: Path, suffix: str) -> None:
    """Refuse file types that can't be opened as a network, even if the file is missing: the remedy is the same."""
    if suffix == ".py":
        names = public_callables(path)
        raise SourceError(
            "a Python file needs the name of its factory",
            code="no-name",
            got=str(path),
            expected=f"{path}:factory",
            remedy=f"one of its functions and classes: {', '.join(names)}" if names else suggest_file(path),
        )
    if suffix in _PICKLED:
        raise CheckpointError(
            "a pickled file is not opened as a source",
            code="pickle",
            got=f"{path}: a whole model would run code when opened, and a state dict does not hold a network",
            expected=_FORMS,
            remedy=_PAIRED.format(path.name),
        )
    if suffix in keras_h5.SUFFIXES and (refusal := keras_h5.refusal(path, as_weights=False)):
        raise refusal
    if suffix in _WEIGHTS:
        raise SourceError(
            "a file of weights is not a network",
            code="only-weights",
            got=str(path),
            expected=_FORMS,
            remedy=_PAIRED.format(path.name)
            if suffix == ".safetensors"
            else "write a factory that builds the network and loads these weights, and give it as file.py:factory",
        )


def with_declared_axes(source: Source, task: Task) -> Task:
    """The task with the axes that vary as the source declares them, where the task itself says nothing."""
    return task if task.dynamic is not None or source.dynamic is None else replace(task, dynamic=source.dynamic)


def in_single_precision(source: Source, task: Task) -> tuple[Source, Task, str | None]:
    """Convert source and task to float32, with a note for the user, None where there is nothing to tell.

    What was converted when weights were loaded is told, too, and axes that a file declares as varying and that do not.
    """
    note = None
    if isinstance(source.module, nn.Module):
        module, note = single_module(source.module)
        source = replace(source, module=module)
    single = single_task(task)
    if note is None and single is not task:
        note = "the task's inputs are given to the network in float32"
    loaded = source.loaded.notes if source.loaded is not None else ()
    notes = [*source.notes, *loaded, *([note] if note else [])]
    axes = getattr(source.module, "fixed_axes", ())
    if axes and task.dynamic is source.dynamic:
        has, it = ("has", "it") if len(axes) == 1 else ("have", "them")
        notes.append(
            f"{' and '.join(axes)} {has} the example's size in every artifact, although {source.name} declares {it} as "
            f"varying: {getattr(source.module, 'fixed_because', '')}"
        )
    return source, single, "; ".join(notes) or None


def check_forward(source: Source, task: Task) -> Any:
    """Run the network once on the task's example, in eval mode and without gradients; modes and state are restored.

    Returns:
        The outputs.

    Raises:
        SourceError: The forward raised (with the line of the user's code), or returned no tensors.
    """
    module = source.module
    if isinstance(module, ExportedProgram):
        module = module.module(check_guards=False)
    assert isinstance(module, nn.Module)
    with same_state(module):
        return forward(module, task.call(), source.name)


def forward(module: nn.Module, call: Call, name: str) -> Any:
    """Run a network once in eval mode and without gradients; its modes are restored, its state is not.

    Raises:
        SourceError: The forward raised (with the line of the user's code), or returned no tensors.
    """
    args, kwargs = call
    try:
        with in_eval_mode(module), torch.no_grad():
            outputs = module(*args, **kwargs)
    except PenjingError:
        raise
    except (Exception, SystemExit) as cause:
        raise SourceError(
            f"the forward of {name} fails on the task's example",
            code="forward",
            got=f"{type(cause).__name__}: {str(cause).strip()} ({line_of(cause)})",
            expected=f"outputs for {describe_call(args, kwargs)}",
            remedy=_how_to_call(module, call),
        ) from cause
    first_output(outputs)
    return outputs


def _how_to_call(module: nn.Module, call: Call) -> str:
    """What to do about a forward that failed: other names where those of the call are not its parameters."""
    args, kwargs = call
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        needed = [name for name, parameter in signature.parameters.items() if parameter.default is parameter.empty]
        if len(needed) == 1 and len(kwargs) > 1:
            return (
                f"the forward takes {needed[0]} alone, and the example's keys are its keyword arguments: wrap the "
                f"network in a module with forward(self, {', '.join(kwargs)}) that builds {needed[0]} of them"
            )
        return f"the inputs of the example are those of forward{signature}: give them in this order, or by these names"
    return "call the network on Task.example in a Python shell; shapes, types and names must fit its forward"


def describe_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Describe the shapes and dtypes of a call for messages: ``(float32[1, 3, 8, 8], mask=bool[1, 8])``."""

    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, tuple | list):
            return f"[{', '.join(one(item) for item in value)}]"
        return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__

    return f"({', '.join([one(v) for v in args] + [f'{k}={one(v)}' for k, v in kwargs.items()])})"


def _program_example(program: ExportedProgram) -> Any | None:
    args, kwargs = program.example_inputs or ((), {})
    if kwargs:
        return None if args else dict(kwargs)  # a task's example is either positional or by keyword
    return tuple(args) or None


def _program_axes(program: ExportedProgram) -> Mapping[str | int, Mapping[int, str]] | None:
    """No axis, where the program was exported with fixed sizes; None (the batch varies) where any size varies."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
    fixed = all(isinstance(n, int) for value in values for n in getattr(value, "shape", ()))
    return {} if fixed and values else None
