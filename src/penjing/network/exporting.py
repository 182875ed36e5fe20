"""Exporting a module with torch and dynamic axes, both to capture sources and to export captured networks."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import traceback
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import SymBoolArgument, SymFloatArgument, SymIntArgument
from torch.utils import _pytree as pytree

from penjing.errors import ExportError, PenjingError, TaskError
from penjing.modes import in_eval_mode
from penjing.network.first_states import CODE, EXPECTED, REMEDY, fixed_layer
from penjing.network.graph import line
from penjing.network.wrappers import unwrapped

Dynamic = Mapping[str | int, Mapping[int, str]] | None
MAX_BATCH = 4096
UNPROVEN = "Constraints violated|solve_univariate_inequality"  # possibly limitations of torch.export


def export_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, dynamic: Dynamic = None
) -> ExportedProgram:
    """Export in eval mode with a dynamic batch; an example of batch 1 is widened to 2 first.

    Raises:
        ExportError: The export failed; the error names the line of the user's code.
    """
    kwargs = dict(kwargs or {})
    model = unwrapped(model)
    names = input_names(model, args, kwargs)
    axes = _dynamic_axes(names, [*args, *kwargs.values()], dynamic)
    values = [_widen(value, axes[name]) for name, value in zip(names, [*args, *kwargs.values()], strict=True)]
    args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    def attempt(limits: Mapping[str, _Limit], defer: bool = False) -> ExportedProgram:
        dims = {name: _dim(name, limit) for name, limit in limits.items()}
        shapes = [_shape_spec(value, axes[name], dims) for name, value in zip(names, values, strict=True)]
        # Where the package opt_einsum is installed, torch would contract einsums in an order of its own.
        with in_eval_mode(model), torch.no_grad(), torch.backends.opt_einsum.flags(enabled=False):
            return torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=_by_parameter(model, names, shapes),
                prefer_deferred_runtime_asserts_over_guards=defer,
            )

    limits: dict[str, _Limit] = {}
    defer = False
    while True:
        try:
            program = attempt(limits, defer)
            break
        except PenjingError:  # of a network that was read from a file, which names its layer
            raise
        except Exception as error:
            suggested = _narrower_limits(str(error), limits)
            if any(suggested[name][2] > 1 for name in suggested.keys() & {words.get(0) for words in axes.values()}):
                suggested = {}  # single samples are what is measured
            narrower = {name: _both(limit, limits.get(name, limit)) for name, limit in suggested.items()}
            if narrower and limits != limits | narrower:
                # A table of 512 positions does not allow longer sequences, blocks of 2 pixels no odd heights.
                limits |= narrower
            elif re.search(UNPROVEN, str(error)) and not defer:
                defer = True  # sizes that torch can't prove equal, for example after strides and pooling
            else:
                stuck = fixed_layer(model, args, kwargs, axes)
                raise _export_error(model, error, stuck) from error
    _check_outputs(model, program)
    _set_origins(model, program)
    _detach_constants(program)
    return program


def _detach_constants(program: ExportedProgram) -> None:
    """A tensor that was computed from weights before the call is a constant: what it came from is not in the program.

    Without its history it can be copied, which torch refuses otherwise.
    """
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            program.constants[name] = value.detach()


def _set_origins(model: nn.Module, program: ExportedProgram) -> None:
    """Let operators of modules that were read from a file refer to the file, not to the code that runs them."""
    origins = {
        name: part.origin for name, part in model.named_modules() if isinstance(getattr(part, "origin", None), str)
    }
    for node in program.graph.nodes if origins else ():
        stack = [str(entry[0]).split("@")[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
        if stack and stack[-1] in origins:
            node.meta["stack_trace"] = origins[stack[-1]]
        elif not _in_users_code(str(node.meta.get("stack_trace") or "")):
            node.meta["stack_trace"] = next(
                (origins[path] for path in reversed(stack) if path in origins), node.meta.get("stack_trace")
            )


def _in_users_code(trace: str) -> bool:
    """Whether the innermost frame of a stack trace is in a file of the user's."""
    files = re.findall(r'File "(.+)", line', trace)
    return bool(files) and not files[-1].startswith(_FOREIGN) and "site-packages" not in files[-1]


def _check_outputs(model: nn.Module, program: ExportedProgram) -> None:
    """Raise ExportError if an output is a number that depends on input sizes, because a file returns only tensors."""
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, SymIntArgument | SymFloatArgument | SymBoolArgument) and spec.arg.name is not None:
            number = next(n for n in program.graph.nodes if n.name == spec.arg.name)
            raise ExportError(
                f"an output of the network is a number that changes with the sizes of its inputs{line(number)}",
                code="number",
                got=str(number.meta.get("val", number)),
                expected="tensors, and numbers that are constant",
                remedy="leave it out and compute it from the inputs, or return a tensor: x.new_full((1,), x.shape[0])",
            )


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs in the order args, kwargs; ``x_0, x_1`` for a ``*x`` parameter."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TaskError(
            "the example inputs do not fit the network's forward",
            code="misfit",
            got=f"{len(args)} positional, keywords {sorted(kwargs)}: {error}",
            expected=f"forward{signature}",
            remedy="give Task(example=...) as a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        ) from None
    names: list[str] = []
    for name in bound.arguments:
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            collected = [f"{name}_{i}" for i in range(len(bound.arguments[name]))]
            both = [word for word in collected if word in signature.parameters or word in kwargs]
            if both:
                raise ExportError(
                    f"two inputs of the network would be called {both[0]!r}",
                    code="same-name",
                    got=f"forward{signature}: torch gives this name to the input that *{name} collects",
                    expected="one name for each input",
                    remedy=f"rename the parameter {both[0]} of forward",
                )
            names += collected
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in kwargs:
            names.append(name)
    return names + list(kwargs)


def port_names(network: fx.GraphModule, inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """Names of inputs and outputs in an artifact: those of the file that the network was read from, if any.

    Args:
        network: A captured network; ``meta["ports"]`` maps "inputs" to {parameter: name} and "outputs" to names.
        inputs: Names of the parameters of its forward.
        outputs: Names derived from the structure of its outputs.
    """
    ports: Mapping[str, Any] = network.meta.get("ports", {"inputs": {}, "outputs": ()})
    named = list(ports["outputs"]) if len(ports["outputs"]) == len(outputs) else outputs
    return [ports["inputs"].get(name, name) for name in inputs], named


def export(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Dynamic) -> ExportedProgram:
    """Export a captured (and edited) network again. Weights are made contiguous first.

    In channels-last memory format, pooling decomposes into ``as_strided``, which runtimes misread.
    """
    network = copy.deepcopy(network).eval()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.contiguous()
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.contiguous(), call)
    return export_module(network, args, kwargs, dynamic)


def with_plain_outputs(network: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose output is a plain tuple of tensors.

    A library's output class could not be read without the library; numbers and None among the outputs can't be stored
    in a file, and are part of the outputs' structure.
    """
    network = copy.deepcopy(network)
    codegen = network.graph._codegen
    if hasattr(codegen, "pytree_info"):
        end = network.graph.output_node()
        tensors = tuple(value for value in end.args[0] if isinstance(value, fx.Node))  # type: ignore[union-attr]
        end.args = (tensors,)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(tensors))
        network.recompile()
    return network


def _dynamic_axes(names: list[str], values: list[Any], dynamic: Dynamic) -> dict[str, Mapping[int, str]]:
    if dynamic is None:
        return {name: {0: "batch"} for name in names}
    known = {*names, *range(len(names))}
    for key in dynamic:
        if key not in known:
            raise TaskError(
                "Task.dynamic names an input that the network does not have",
                code="unknown-input",
                got=repr(key),
                expected=f"one of {names} or a position below {len(names)}",
            )
    return {name: dynamic.get(name, dynamic.get(i, {})) for i, name in enumerate(names)}


def _widen(value: Any, axes: Mapping[int, str]) -> Any:
    # The exporter would silently treat a size of 1 as a constant.
    def widen(tensor: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            if axis < tensor.dim() and tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
        return tensor

    return pytree.tree_map_only(torch.Tensor, widen, value)


def _shape_spec(value: Any, axes: Mapping[int, str], dims: dict[str, Dim]) -> Any:
    def spec(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return None
        for name in axes.values():
            dims.setdefault(name, Dim(name, min=1, max=MAX_BATCH))
        return {axis: dims[name] for axis, name in axes.items() if axis < tensor.dim()} or None

    return pytree.tree_map(spec, value)


_Limit = tuple[int, int, int]
"""Smallest and largest size of an axis, and the number that it is a multiple of."""


def _dim(name: str, limit: _Limit) -> Any:
    low, high, step = limit
    if step == 1:
        return Dim(name, min=low, max=high)
    return step * Dim(f"_{name}", min=-(-low // step), max=high // step)


def _narrower_limits(message: str, before: Mapping[str, _Limit]) -> dict[str, _Limit]:
    """Size limits of the axes, if narrower ranges and multiples are all that the exporter asks for.

    Args:
        message: Of the exporter.
        before: The limits that it was given: of an axis that is a multiple it limits the factor, which `_dim` names.
    """
    fixes = [line.strip() for line in message.partition("Suggested fixes:")[2].strip().split("\n\n")[0].splitlines()]
    ranges = [re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", fix) for fix in fixes]
    limits = {m[1]: (max(1, int(m[2] or 1)), min(MAX_BATCH, int(m[3] or MAX_BATCH)), 1) for m in ranges if m}
    for name, (_, _, step) in before.items():
        if step > 1 and f"_{name}" in limits:
            low, high, _ = limits.pop(f"_{name}")
            limits[name] = (step * low, step * high, step)
    multiples = [m for fix in fixes if (m := re.fullmatch(r"(\w+) = (\d+)\*(\w+)", fix)) is not None]
    for multiple in multiples:
        low, high, _ = limits.pop(multiple[3], (1, MAX_BATCH, 1))
        step = int(multiple[2])
        limits[multiple[1]] = (step * low, min(MAX_BATCH, step * high), step)
    return limits if sum(map(bool, ranges)) + len(multiples) == len(fixes) else {}


def _both(one: _Limit, other: _Limit) -> _Limit:
    """What both limits allow."""
    return max(one[0], other[0]), min(one[1], other[1]), math.lcm(one[2], other[2])


def _by_parameter(model: nn.Module, names: list[str], shapes: list[Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    by_name = dict(zip(names, shapes, strict=True))
    starred = [name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    collected = tuple(shape for name, shape in by_name.items() if name not in parameters)
    if collected and not starred:
        return tuple(shapes)
    specs = {name: collected if name in starred else by_name.get(name) for name in parameters}
    return {name: spec for name, spec in specs.items() if name in by_name or (name in starred and collected)}


def _export_error(model: nn.Module, error: Exception, stuck: str | None = None) -> ExportError:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if not f.filename.startswith(("<", *_FOREIGN))]
    where = f"{inside[-1].filename}:{inside[-1].lineno}: {inside[-1].line}" if inside else type(model).__name__
    message = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {error}"
    code, expected, remedy = next(advice for symptom, advice in _ADVICE.items() if re.search(symptom, text))
    if stuck is not None:
        where, code, expected, remedy = f"the first state of the layer {stuck}", CODE, EXPECTED, REMEDY
    elif "Constraints violated" in text and any(isinstance(layer, nn.RNNBase) for layer in model.modules()):
        code, expected, remedy = _RECURRENT
    elif any(frame.name == "_detect_is_causal_mask" for frame in frames):
        code, expected, remedy = _CAUSAL
    elif "solve_univariate_inequality" in text or set(re.findall(r"solving the guards generated for (\w+) =", text)) - {
        "batch"
    }:
        code, expected, remedy = _WINDOW
    return ExportError(
        f"the network can't be exported: {where}",
        code=code,
        got=f"{type(error).__name__}: {' '.join(message[:3])[:500]}",
        expected=expected,
        remedy=remedy.replace("'x':", f"{next(iter(inspect.signature(model.forward).parameters), 'x')!r}:"),
    )


_FOREIGN = tuple(
    os.path.dirname(str(spec.origin)) + os.sep for name in ("torch", "sympy", "penjing") if (spec := find_spec(name))
)
"""Folders of what is not the user's code, which may lie in a folder of any name."""
_RECURRENT = (
    "recurrent-length",
    "recurrent layers of fixed length: torch.export unrolls every step; the batch may vary",
    "fix the length to the example's, Task(dynamic={'x': {0: 'batch'}}), and pad shorter sequences to it",
)
_CAUSAL = (
    "causal-mask",
    "a transformer that is told whether its mask is causal: torch compares the mask's values otherwise",
    "call the encoder with is_causal=True beside a causal mask and with is_causal=False beside another: "
    "self.encoder(x, mask=mask, is_causal=True)",
)
_WINDOW = (
    "window",
    "a forward that takes every size of the axes that vary",
    "pool a whole axis by x.mean((2, 3)) or F.adaptive_avg_pool2d(x, 1): the window of F.avg_pool2d(x, x.shape[2:]) is "
    "a number; write other sizes as x.shape[2] or -1; or fix it: Task(dynamic={'x': {0: 'batch'}}) lets the batch "
    "alone vary",
)
_ADVICE = {  # pattern of a torch.export error → the code, what was expected, and the remedy
    r"structure of `inputs` and `dynamic_shapes`": (
        "unnamed-inputs",
        "a forward that names its inputs",
        "wrap the network in a module that names them: def forward(self, a, b): return self.net(a=a, b=b)",
    ),
    r"GuardOnDataDependent|[Dd]ata-dependent|[Dd]ynamic control flow": (
        "control-flow",
        "a forward without control flow that depends on the values of tensors",
        "choose with torch.where(condition, a, b) or torch.cond(condition, branch_a, branch_b, inputs) on that line",
    ),
    r"Constraints violated|specialized|is invalid for input of size|must match|size mismatch|shapes cannot be"
    r"|[Ss]izes of tensors|broadcast": (
        "fixed-size",
        "a forward that takes every size of the axes that vary; without Task.dynamic that is the batch, axis 0",
        "write sizes as x.shape[0] or -1 where that line has a number (x.flatten(1) keeps the batch); or fix what "
        "can't vary: Task(dynamic={}) fixes all sizes to the example's, Task(dynamic={'x': {0: 'batch'}}) all but one",
    ),
    "": (
        "untraceable",
        "a forward that torch.export takes",
        "torch.export.export(model.eval(), example) in a Python shell shows the same; write that line with operators "
        "of torch alone",
    ),
}
