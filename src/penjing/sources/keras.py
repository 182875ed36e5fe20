"""Opening a network of Keras: a model in memory, or a ``.keras`` file. No code of a file is run.

A network of Keras 3 on its torch backend consists of operators of torch, so `torch.export` takes it. Here every layer
becomes a module under its own name, which holds the weights in torch's order of axes (see `keras_layers`); the model's
own code, a graph of layers or a subclass, calls these modules in the place of its layers.
"""

from __future__ import annotations

import contextlib
import inspect
import keyword
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from penjing.errors import CheckpointError, MissingDependency, PenjingError, SourceError
from penjing.network.naming import free_name
from penjing.records import reading
from penjing.sources import keras_files
from penjing.sources.keras_layers import part_for
from penjing.sources.keras_parts import Own, Part, Shared
from penjing.sources.keras_recurrent import Stepwise, check_stateless
from penjing.sources.keras_sizes import bounded

_STEPWISE = frozenset(("LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"))
_LARGEST = 1 << 28  # elements of an example


class KerasNetwork(Own):
    """A model of Keras as a module of torch, with its own copy of the weights.

    Attributes:
        channels_last: Tells the capture that permutations surround its layers.
        fixed_axes: Axes in words that the model declares without a size, and that have the example's.
        fixed_because: Why they have, or what lets them vary.
        inputs: Names of parameters of `forward` → names of the model's inputs; empty for a subclassed model that takes
            its tensors one by one.
        structure: How the model's first argument holds its inputs; None if it is a tensor, or the model declares it.
        ports: Names of inputs and outputs; see `penjing.network.exporting.port_names`.
    """

    channels_last = True
    inputs: Mapping[str, str] = {}
    structure: Any = None

    def __init__(self, model: Any, file: str | None = None) -> None:
        super().__init__(model, _own_variables(model))
        self.fixed_axes, self.fixed_because = _fixed_axes(model, list(self.inputs))
        self.ports = {"inputs": dict(self.inputs), "outputs": _output_names(model)}
        self._called: list[tuple[Shared, Part]] = []
        file = file or f"{model.name}.keras"
        self.origin = _origin(model, file, 0, model.name)  # of operators between its layers
        self._add(self, model, file)

    def _add(self, owner: Part, layer: Any, file: str) -> None:
        """Make the layers within a layer parts of its part, each once."""
        known = {id(shared.value) for shared, _ in self._called}
        for child in _layers(layer):
            if id(child) in known or type(child).__name__ == "InputLayer":
                continue
            known.add(id(child))
            _check(child)
            part = part_for(child) or _own(child)
            name = free_name(owner, re.sub(r"[^\w-]", "_", child.name))
            part.path = f"{owner.path}.{name}" if owner.path else name
            self._called.append((Shared(child), part))
            part.origin = _origin(child, file, len(self._called), part.path)
            owner.add_module(name, part)
            if isinstance(part, Own):
                self._add(part, child, file)
                known = {id(shared.value) for shared, _ in self._called}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes, in inference mode."""
        import keras

        parts = [part for part in (self, *(part for _, part in self._called)) if isinstance(part, Own)]
        state = [(variable, getattr(part, name)) for part in parts for variable, name in part.variables]
        device = next((str(tensor.device) for tensor in (*self.parameters(), *self.buffers())), "cpu")
        with self._in_place_of_layers(), keras.device(device), keras.StatelessScope(state):
            if self.inputs:
                args, kwargs = (self._structured(args, kwargs),), {}
            return self.layer(*args, **kwargs, **({"training": False} if _takes_training(self.layer) else {}))

    def _structured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The inputs in the model's own structure: a tensor, a list or a dict."""
        import keras

        bound = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.inputs) or bound.keys() != self.inputs.keys():
            given = f"{len(args)} by position" + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            raise TypeError(f"the network takes the inputs {', '.join(self.inputs)}; it is called with {given}")
        flat = [bound[word] for word in self.inputs]
        structure = self.structure or getattr(self.layer, "_inputs_struct", None)
        return flat[0] if structure is None else keras.tree.pack_sequence_as(structure, flat)

    @contextlib.contextmanager
    def _in_place_of_layers(self) -> Iterator[None]:
        """Let the model call the parts; afterwards its layers are as before."""
        import keras

        filtering = keras.config.is_traceback_filtering_enabled()
        keras.config.disable_traceback_filtering()  # it would put other errors in the place of torch's
        try:
            for shared, part in self._called:
                shared.value.__dict__["call"] = part
            yield
        finally:
            for shared, _ in self._called:
                shared.value.__dict__.pop("call", None)
            if filtering:
                keras.config.enable_traceback_filtering()


def is_model(value: Any) -> bool:
    """Whether a value is a model or a layer of Keras, on whichever backend."""
    kind = getattr(sys.modules.get("keras"), "Layer", None)
    return isinstance(kind, type) and isinstance(value, kind)


def open_model(model: Any, file: str | None = None) -> KerasNetwork:
    """A model of Keras as a module of torch. The model itself is not modified.

    Args:
        model: A built `keras.Model`, or a layer.
        file: The name of the file that it was read from, for messages.

    Raises:
        SourceError: Keras runs on another backend; the model has no weights yet, computes in half precision, keeps
            states or is quantized.
    """
    keras = _keras()
    if not model.built:
        raise SourceError(
            "the Keras model has no weights yet",
            code="not-built",
            got=f"{type(model).__name__} {model.name!r}, not built",
            expected="a model whose layers know the shapes of their inputs",
            remedy="call it once on an example, or start it with keras.Input(shape)",
        )
    _check(model)
    tensors = list(getattr(model, "inputs", None) or []) if _has_graph(model) else []
    structure = None if _has_graph(model) else _structure(model)
    names = [str(tensor.name) for tensor in tensors] or ([] if structure is None else keras.tree.flatten(structure))
    inputs = _words(names)
    signature = _signature(model, list(inputs))

    def forward(self: KerasNetwork, *args: Any, **kwargs: Any) -> Any:
        return KerasNetwork.forward(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {"inputs": inputs, "structure": structure, "forward": forward}
    kind: type[KerasNetwork] = type("KerasNetwork", (KerasNetwork,), members)
    return kind(model, file).eval()


def open_file(path: Path) -> tuple[KerasNetwork, tuple[torch.Tensor, ...] | None]:
    """The network of a ``.keras`` file, and example inputs of zeros where the file says their sizes.

    Raises:
        CheckpointError: The file is damaged, needs code that it does not hold, or claims more than it stores.
        SourceError: As `open_model`.
        MissingDependency: Keras is not installed.
    """
    stored = keras_files.check(path)
    keras = _keras()
    try:
        with bounded(path, stored):
            model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except PenjingError:
        raise
    except Exception as error:  # of zip, HDF5, and each layer's from_config
        raise keras_files.unread(path, error) from error
    if not is_model(model):
        raise CheckpointError(
            "the Keras file holds no network",
            code="no-network",
            got=type(model).__name__,
            expected="a model",
            remedy="write it with model.save(...)",
        )
    for layer in [model, *model._flatten_layers(include_self=False)]:
        if str(layer.dtype_policy.name).startswith("mixed_"):
            layer.dtype_policy = "float32"  # its weights are; a runtime chooses its own precision
    network = open_model(model, path.name)
    return network, _example(model)


def _keras() -> Any:
    """Keras on its torch backend.

    Raises:
        MissingDependency: It is not installed.
        SourceError: It runs on another backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras
    except ImportError:
        raise MissingDependency(
            "networks of Keras are read with the package keras",
            code="not-installed",
            got="it is not installed",
            expected="keras 3, with h5py",
            remedy="pip install 'penjing[keras]'",
        ) from None
    backend = keras.backend.backend()
    if backend != "torch":
        raise SourceError(
            "Keras runs on another backend than torch",
            code="backend",
            got=f"backend {backend!r}, keras {keras.__version__}",
            expected="backend 'torch', of keras 3",
            remedy="set the environment variable KERAS_BACKEND=torch before keras is imported; a .keras file that was "
            "saved with another backend opens on this one",
        )
    return keras


def _check(layer: Any) -> None:
    """Refuse what no artifact computes as Keras does."""
    check_stateless(layer)
    if getattr(layer, "quantization_mode", None) is not None:
        raise SourceError(
            f"the Keras layer {layer.name!r} is quantized already",
            code="quantized",
            got=f"{type(layer).__name__}, {layer.quantization_mode}",
            expected="a network in floating point, which can be trained and quantized for each runtime",
            remedy="give the model as it was before model.quantize(...)",
        )
    if layer.compute_dtype in ("float16", "bfloat16", "float64"):
        raise SourceError(
            f"the Keras layer {layer.name!r} computes in {layer.compute_dtype}",
            code="half",
            got=f"dtype policy {layer.dtype_policy.name!r}",
            expected="float32: an artifact computes in it, or in what its runtime chooses",
            remedy="model.save('net.keras') and give the file; or keras.config.set_dtype_policy('float32') before the "
            "model is built",
        )


def _own(layer: Any) -> Own:
    kind = Stepwise if type(layer).__name__ in _STEPWISE else Own
    return kind(layer, _own_variables(layer))


def _origin(layer: Any, file: str, number: int, path: str) -> str:
    """Where a layer stands, as a frame of a stack trace says it: in a file of Keras, or in the user's own code.

    Args:
        layer: The layer, or the model.
        file: The name of the file of Keras.
        number: Which layer of it; that is its line.
        path: Its name in the network.
    """
    kind = type(layer)
    if not kind.__module__.startswith("keras."):
        try:  # the class itself may be made anew, by a decorator for example
            code = inspect.unwrap(kind.call).__code__
            if "site-packages" not in code.co_filename:
                return f'File "{code.co_filename}", line {code.co_firstlineno}, in {kind.__name__}.call\n    {path}'
        except (AttributeError, TypeError, ValueError):  # not a function written in Python
            pass
    return f'File "{file}", line {number}, in {kind.__name__}\n    {path}'


def _layers(layer: Any) -> list[Any]:
    """The layers directly within a layer, in the order of its graph or code."""
    import keras

    below = layer.layers if isinstance(layer, keras.Model) else layer._flatten_layers(False, False)
    return list(below)


def _own_variables(layer: Any) -> list[Any]:
    """The variables of a layer itself, without those of the layers within, of metrics and of random generators."""
    below = {id(variable) for child in _layers(layer) for variable in child.weights}
    return [variable for variable in layer.weights if id(variable) not in below]


def _has_graph(model: Any) -> bool:
    """Whether a model declares its inputs: a functional or a sequential one."""
    return hasattr(model, "_inputs_struct") or getattr(model, "_functional", None) is not None


def _takes_training(layer: Any) -> bool:
    return bool(getattr(layer, "_call_has_training_arg", False))


def _words(names: list[str]) -> dict[str, str]:
    """Names of parameters → names of inputs."""
    words: dict[str, str] = {}
    for name in names:
        word = re.sub(r"\W", "_", name) or "input"
        word = f"_{word}" if word[0].isdigit() else f"{word}_" if keyword.iskeyword(word) or word == "self" else word
        while word in words:
            word += "_"
        words[word] = name
    return words


def _structure(model: Any) -> Any:
    """The dict or list that a subclassed model was built with as its only argument, with names; None if a tensor.

    Keras passes several inputs as one argument. An input of a dict is called after its key, one of a list after the
    argument and its place.
    """
    shape = (model.get_build_config() or {}).get("input_shape")
    needed = [p for p in _parameters(model) if p.default is p.empty]
    if shape is None or len(needed) != 1 or _is_shape(shape):
        return None
    return _named(shape, needed[0].name, "")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(size is None or isinstance(size, int) for size in value)


def _named(shapes: Any, argument: str, path: str) -> Any:
    if isinstance(shapes, Mapping):
        return {key: _named(value, argument, f"{path}_{key}" if path else str(key)) for key, value in shapes.items()}
    if shapes is None or _is_shape(shapes):
        return path
    return [_named(value, argument, f"{path or argument}_{i}") for i, value in enumerate(shapes)]


def _parameters(model: Any) -> list[inspect.Parameter]:
    """What a subclassed model's call takes, itself first left out."""
    given = list(inspect.signature(type(model).call).parameters.values())[1:]
    return [parameter for parameter in given if parameter.name not in ("training", "mask")]


def _signature(model: Any, inputs: list[str]) -> inspect.Signature:
    """Of the network's forward: the names of the inputs, or what a subclassed model's call takes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if inputs:
        return inspect.Signature([inspect.Parameter(word, kind) for word in ("self", *inputs)])
    return inspect.Signature([inspect.Parameter("self", kind), *_parameters(model)])


def _output_names(model: Any) -> tuple[str, ...]:
    """Names of the layers that give the outputs; none where the outputs have keys or the model is subclassed."""
    if not _has_graph(model):
        return ()
    names = getattr(model, "output_names", None) or [model.layers[-1].name]
    if isinstance(getattr(model, "_outputs_struct", None), Mapping):
        return ()
    unique: dict[str, None] = {}
    for name in names:
        word, n = str(name), 1
        while word in unique:
            word, n = f"{name}_{n}", n + 1
        unique[word] = None
    return tuple(unique)


def _fixed_axes(model: Any, inputs: list[str]) -> tuple[tuple[str, ...], str]:
    """Axes besides the batch without a declared size, and what is to be said of them."""
    tensors = model.inputs if _has_graph(model) else []
    axes = {
        word: [axis for axis, size in enumerate(tensor.shape) if axis and size is None]
        for word, tensor in zip(inputs, tensors, strict=False)
    }
    words = tuple(f"the axis {axis} of {word}" for word, positions in axes.items() for axis in positions)
    if any(type(layer).__name__ in _STEPWISE for layer in model._flatten_layers()):
        return words, "the steps of recurrent layers are written out when a network is captured"
    names = {word: {0: "batch"} | {axis: f"{word}_{axis}" for axis in positions} for word, positions in axes.items()}
    return words, f"Task(dynamic={names}) lets {'it' if len(words) == 1 else 'them'} vary"


def _example(model: Any) -> tuple[torch.Tensor, ...] | None:
    """Zeros for the declared inputs; None where a size besides the batch is not declared."""
    values = []
    for tensor in (model.inputs if _has_graph(model) else None) or []:
        shape = [1, *tensor.shape[1:]]
        dtype = getattr(torch, str(tensor.dtype), None)
        known = isinstance(dtype, torch.dtype) and not any(size is None for size in shape)
        if not known or not reading.fits(shape, _LARGEST):
            return None
        values.append(torch.zeros(shape, dtype=dtype))
    return tuple(values) or None


__all__ = ["KerasNetwork", "is_model", "open_file", "open_model"]
