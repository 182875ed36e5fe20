"""Raising an exported program into a trainable graph of layers: the one form that every step knows.

A raised network is a `torch.fx.GraphModule`. Layers with parameters (convolution, linear, norms, embedding) and
dropout are real `torch.nn` modules under their original names; every other operator is a functional node whose
sizes are literals that can be edited. It trains, evaluates, deep-copies and exports like any module, and in eval
mode it computes the same bits as its source; where torch would take its fused attention kernel instead
(``torch.backends.mha``), the same to rounding.

Where a source keeps a layer's tensors under other names (``in_proj_weight`` of a fused attention projection),
``network.meta["renamed"]`` maps the new key of the state dict (``in_proj.weight``) to the source's.

Every operator has a *site*, a name made of the source's own module paths that survives copies and edits:
``"layer1.0.conv1"`` for a layer, ``"layer1.0.conv1@1"`` for its second call, ``"layer1.0/add#0"`` for the first
addition in the forward of ``layer1.0``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from penjing.errors import ExportError, TaskError

Dynamic = Mapping[str | int, Mapping[int, str]] | None
# Copying a graph module makes torch warn about its own pytree; nobody who uses Penjing can mend that.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
MAX_BATCH = 4096

# How operators are called in plans, costs and records. What is not listed is called as ATen calls it.
_KINDS = {
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "conv_transpose1d": "conv_transpose",
    "conv_transpose2d": "conv_transpose",
    "conv_transpose3d": "conv_transpose",
    "hardtanh": "clip",
    "relu6": "clip",
    "clamp": "clip",
    "adaptive_avg_pool1d": "avg_pool",
    "adaptive_avg_pool2d": "avg_pool",
    "avg_pool1d": "avg_pool",
    "avg_pool2d": "avg_pool",
    "max_pool1d": "max_pool",
    "max_pool2d": "max_pool",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "flatten": "reshape",
    "unflatten": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "permute": "transpose",
    "t": "transpose",
    "concat": "cat",
    "scaled_dot_product_attention": "attention",
    "dropout": "dropout",
    "alias": "identity",
    "contiguous": "identity",
    "clone": "identity",
    "detach_": "identity",
    "bmm": "matmul",
    "mm": "matmul",
    "upsample_nearest2d": "resize",
    "constant_pad_nd": "pad",
}
_MODULE_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv1d, "conv"),
    (nn.Conv2d, "conv"),
    (nn.Conv3d, "conv"),
    (nn.ConvTranspose1d, "conv_transpose"),
    (nn.ConvTranspose2d, "conv_transpose"),
    (nn.ConvTranspose3d, "conv_transpose"),
    (nn.Linear, "linear"),
    (nn.BatchNorm1d, "batch_norm"),
    (nn.BatchNorm2d, "batch_norm"),
    (nn.BatchNorm3d, "batch_norm"),
    (nn.LayerNorm, "layer_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.Embedding, "embedding"),
    (nn.Dropout, "dropout"),
)


def raise_network(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Dynamic = None,
) -> fx.GraphModule:
    """Export `model` once, in eval mode, and raise it. The model itself stays as it was.

    Args:
        model: A module, or an exported program (then the example is not needed).
        args: Positional example inputs, batch first.
        kwargs: Keyword example inputs.
        dynamic: Axes that vary (see `Task.dynamic`); None makes axis 0 of every tensor the batch.

    Returns:
        A graph module in eval mode that shares no memory with `model`.

    Raises:
        ExportError: The network can't be exported; names the line of the user's code.
    """
    program = model if isinstance(model, ExportedProgram) else export_module(model, args, kwargs, dynamic)
    program = _functional(program)
    flat = program.module(check_guards=False)
    state = {**program.state_dict, **program.constants}
    graph_module = _Raiser(flat, state).build()
    raised = copy.deepcopy(graph_module)
    return raised.eval()


def export_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, dynamic: Dynamic = None
) -> ExportedProgram:
    """Export in eval mode with a dynamic batch; an example of batch 1 is widened to 2 first.

    Raises:
        ExportError: With the line of the user's code where the export stopped.
    """
    kwargs = dict(kwargs or {})
    names = input_names(model, args, kwargs)
    axes = _dynamic_axes(names, [*args, *kwargs.values()], dynamic)
    values = [_widen(value, axes[name]) for name, value in zip(names, [*args, *kwargs.values()], strict=True)]
    args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    def attempt(limits: Mapping[str, tuple[int, int]]) -> ExportedProgram:
        dims = {name: Dim(name, min=low, max=high) for name, (low, high) in limits.items()}
        shapes = [_shape_spec(value, axes[name], dims) for name, value in zip(names, values, strict=True)]
        with _in_eval_mode(model), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=_by_parameter(model, names, shapes))

    try:
        try:
            return attempt({})
        except Exception as error:
            narrower = _narrower_limits(str(error))
            if not narrower:
                raise
            return attempt(narrower)  # a table of 512 positions reads no longer sequence
    except Exception as error:
        raise _export_error(model, error) from error


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs in the order args, kwargs; ``x_0, x_1`` for what a ``*x`` parameter collects."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TaskError(
            "the example inputs do not fit the network's forward",
            got=f"{len(args)} positional, keywords {sorted(kwargs)}: {error}",
            expected=f"forward{signature}",
            remedy="give Task(example=...) as a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        ) from None
    names: list[str] = []
    for name in bound.arguments:
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(bound.arguments[name]))]
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in kwargs:
            names.append(name)
    return names + list(kwargs)


def export(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic: Dynamic) -> ExportedProgram:
    """Export a raised (and edited) network again. Weights are made contiguous first.

    In channels-last memory format, pooling decomposes into ``as_strided``, which runtimes misread.
    """
    network = copy.deepcopy(network).eval()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.contiguous()
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.contiguous(), call)
    return export_module(network, args, kwargs, dynamic)


def kind(network: fx.GraphModule, node: fx.Node) -> str:
    """What a node computes, in one word: "conv", "linear", "add", "clip", "avg_pool", "reshape", …"""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        for cls, name in _MODULE_KINDS:
            if isinstance(module, cls):
                return name
        return type(module).__name__.lower()
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
    name = operator_name(node)
    if name == "mean" and _is_spatial_mean(node):
        return "avg_pool"
    return _KINDS.get(name, name)


def operator_name(node: fx.Node) -> str:
    """ATen's name of a functional node without overload and without the trailing underscore of in-place forms."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__).rstrip("_")
    return getattr(target, "__name__", str(target))


def site(node: fx.Node) -> str:
    """The stable name of an operator, see the module's docstring; inputs are called by their own name."""
    return str(node.meta.get("site", node.name))


def sites(network: fx.GraphModule) -> dict[str, fx.Node]:
    """Every operator of the network by its site, in the order of execution."""
    return {site(n): n for n in network.graph.nodes if n.op in ("call_module", "call_function")}


def is_tensor(node: Any) -> bool:
    """Whether a node yields tensors: sizes (`sym_size`) and arithmetic on them do not."""
    if not isinstance(node, fx.Node):
        return False
    if node.op != "call_function":
        return node.op != "output"
    if node.target is operator.getitem:  # one of several results
        return is_tensor(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and operator_name(node) not in ("sym_size", "item")


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator reads, in the order of its ports; what a layer module owns is not among them."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) if is_tensor(n) else None)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen node by the names of its schema, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def shapes(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Node name → fake tensor (shape and dtype, no data) for one forward in eval mode; tuples are left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                found[n.name] = result
            return result

    # In eval mode, because in training mode batch norm counts its batches on the real buffer.
    with _in_eval_mode(network), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, call)
        Recorder(network).run(*flat_inputs(network, fake))
    return found


def flat_inputs(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """The inputs of a call in the order of the graph's placeholders."""
    codegen = network.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        return list(network.graph.process_inputs(*_ordered_call(network, call)))
    return [*call[0], *call[1].values()]


def _ordered_call(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    args, kwargs = call
    if not kwargs:
        return list(args)
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    return [*bound.args, *bound.kwargs.values()]


# --- dynamic shapes -------------------------------------------------------------------------------------------


def _dynamic_axes(names: list[str], values: list[Any], dynamic: Dynamic) -> dict[str, Mapping[int, str]]:
    if dynamic is None:
        return {name: {0: "batch"} for name in names}
    known = {*names, *range(len(names))}
    for key in dynamic:
        if key not in known:
            raise TaskError(
                "Task.dynamic names an input that the network does not have",
                got=repr(key),
                expected=f"one of {names} or a position below {len(names)}",
            )
    return {name: dynamic.get(name, dynamic.get(i, {})) for i, name in enumerate(names)}


def _widen(value: Any, axes: Mapping[int, str]) -> Any:
    # A size of 1 would be taken for a constant by the export, silently.
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


def _narrower_limits(message: str) -> dict[str, tuple[int, int]]:
    """Smallest and largest size of the axes for which the exporter asks for a narrower range, and for nothing else."""
    fixes = [line.strip() for line in message.partition("Suggested fixes:")[2].strip().split("\n\n")[0].splitlines()]
    found = [re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", fix) for fix in fixes]
    limits = {m[1]: (max(1, int(m[2] or 1)), min(MAX_BATCH, int(m[3] or MAX_BATCH))) for m in found if m}
    return limits if len(limits) == len(fixes) else {}


def _by_parameter(model: nn.Module, names: list[str], shapes: list[Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    if all(name in parameters for name in names):
        return dict(zip(names, shapes, strict=True))
    starred = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return (tuple(shapes),) if starred and len(parameters) == 1 else tuple(shapes)


def _export_error(model: nn.Module, error: Exception) -> ExportError:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [
        f for f in frames if "torch" not in f.filename.replace("\\", "/").split("/") and "penjing" not in f.filename
    ]
    where = f"{inside[-1].filename}:{inside[-1].lineno}: {inside[-1].line}" if inside else type(model).__name__
    message = str(error).strip().splitlines()
    return ExportError(
        f"the network can't be exported: {where}",
        got=f"{type(error).__name__}: {' '.join(message[:3])[:500]}",
        expected="a forward without control flow that depends on the values of tensors",
        remedy="rewrite that line with torch.where or torch.cond; if a size can't vary, "
        "fix it with Task(dynamic={}) or name the axes that do vary",
    )


# --- in-place operators -----------------------------------------------------------------------------------------


def _functional(program: ExportedProgram) -> ExportedProgram:
    """In-place operators replaced by functional ones; layers stay whole."""
    mutating = [n for n in program.graph.nodes if _mutates(n)]
    if not mutating:
        return program
    if not all(_safe_to_replace(n) for n in mutating):
        return _restore_layers(program, program.run_decompositions({}))  # functionalizes views too
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in [n for n in program.graph.nodes if _mutates(n)]:
        packet = getattr(torch.ops.aten, operator_name(node))
        node.target = getattr(packet, node.target._overloadname)
        mutated = node.args[0]
        for user in list(mutated.users):
            if order[user] > order[node]:
                user.replace_input_with(mutated, node)
    program.graph_module.recompile()
    return program


def _restore_layers(source: ExportedProgram, program: ExportedProgram) -> ExportedProgram:
    """Decomposing keeps most layers whole, but not batch norm, nor dropout, which is a copy in eval mode."""
    rates = {n.name: arguments(n)["p"] for n in source.graph.nodes if n.target is torch.ops.aten.dropout.default}
    for node in list(program.graph.nodes):
        origin = node.meta.get("from_node") or ()
        if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            *tensors, momentum, eps = node.args
            users = list(node.users)
            if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
                continue  # something reads the statistics, which the layer does not give
            node.target = torch.ops.aten.batch_norm.default
            node.args = (*tensors, False, momentum, eps, False)
            for user in users:
                node.meta["val"] = user.meta["val"]
                user.replace_all_uses_with(node)
                program.graph.erase_node(user)
        elif node.target is torch.ops.aten.clone.default and origin and origin[-1].name in rates:
            node.target, node.kwargs = torch.ops.aten.dropout.default, {}
            node.args = (node.args[0], rates[origin[-1].name], False)
    program.graph_module.recompile()
    return program


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _safe_to_replace(node: fx.Node) -> bool:
    target, mutated = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    name = target.overloadpacket.__name__
    if not name.endswith("_") or not isinstance(mutated, fx.Node):
        return False
    functional = getattr(torch.ops.aten, name.rstrip("_"), None)
    if functional is None or target._overloadname not in functional.overloads():
        return False
    if mutated.op == "placeholder" and mutated.name.startswith(("p_", "b_", "c_")):
        return False
    return not _aliases(mutated) and not any(_aliases(user) for user in mutated.users if user is not node)


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its input (views, and reshape, contiguous, dropout)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"  # getitem of a split: a view
    if target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns) or operator_name(node) in (
        "reshape",
        "contiguous",
        "flatten",
        "to",
        "dropout",
        "expand_as",
        "view_as",
        "chunk",
    )


# --- raising ----------------------------------------------------------------------------------------------------


class _Raiser:
    """Turns one flat exported graph into modules and functional nodes."""

    def __init__(self, flat: fx.GraphModule, state: Mapping[str, Any]) -> None:
        self.flat = flat
        self.state = state
        self.modules: dict[str, nn.Module] = {}
        self.calls: Counter[str] = Counter()
        self.ordinals: Counter[tuple[str, str]] = Counter()
        self.renamed: dict[str, str] = {}
        # One Parameter object per tensor, so that tied weights stay tied.
        self.tensors: dict[str, Any] = dict(flat.named_parameters(remove_duplicate=False))
        self.tensors.update(flat.named_buffers(remove_duplicate=False))
        self.tensors = {**state, **self.tensors}  # numbers that a forward wrote as tensors are in the state alone

    def build(self) -> fx.GraphModule:
        graph = self.flat.graph
        for node in list(graph.nodes):
            if node.op == "call_module" or _is_assertion(node) or _writes_input(node):
                if node.op == "call_module" and node.users:
                    raise ExportError(
                        f"the network holds a higher-order operator that can't be raised: {node.target}",
                        expected="a plain graph of operators",
                        remedy="leave torch.cond and wrapped regions out of the network",
                    )
                graph.erase_node(node)
        for node in graph.nodes:
            if node.op == "call_function":
                self._raise(node)
        for node in graph.nodes:
            if node.target is torch.ops.aten.copy.default:  # left by functionalization; has no derivative
                node.target, node.args = torch.ops.aten.expand_as.default, (node.args[1], node.args[0])
        for node in reversed(list(graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not _mutates(node):
                graph.erase_node(node)
        attributes: dict[str, Any] = dict(self.modules)
        for node in graph.nodes:
            if node.op == "get_attr":
                attributes[str(node.target)] = self._tensor(node)
        raised = fx.GraphModule(attributes, graph, class_name="Network")
        for node in raised.graph.nodes:
            value = node.meta.get("val")
            node.meta = {key: node.meta[key] for key in ("site", "stack_trace") if key in node.meta}
            if isinstance(value, torch.Tensor):
                node.meta["rank"] = value.dim()
                node.meta["floating"] = value.is_floating_point()
        raised.meta["renamed"] = self.renamed
        raised.recompile()
        return raised

    def _raise(self, node: fx.Node) -> None:
        path = _module_path(node)
        name = operator_name(node)
        builder = _BUILDERS.get(name)
        built = builder(self, node) if builder and isinstance(node.target, torch._ops.OpOverload) else None
        if built is None:
            ordinal = self.ordinals[path, name]
            self.ordinals[path, name] += 1
            node.meta["site"] = f"{path}/{name}#{ordinal}"
            return
        module, inputs, suffixes = built
        target = self._register(module, path, suffixes)
        self._note_renamed(target, suffixes)
        node.op, node.target, node.args, node.kwargs = "call_module", target, inputs, {}
        count = self.calls[target]
        self.calls[target] += 1
        node.meta["site"] = target if count == 0 else f"{target}@{count}"

    def _register(self, module: nn.Module, path: str, parameters: dict[str, str]) -> str:
        """Store the module under its original name; the same layer called twice is one module."""
        name = self._name(module, path, parameters)
        base, n = name, 1
        while name in self.modules and not _same_layer(self.modules[name], module):
            name, n = f"{base}_{n}", n + 1
        self.modules.setdefault(name, module)
        return name

    def _note_renamed(self, layer: str, tensors: dict[str, str]) -> None:
        for role, fqn in tensors.items():
            key = f"{layer}.{role}"
            if key not in self.state:
                self.renamed[key] = fqn
            counter = fqn.removesuffix("running_mean") + "num_batches_tracked"
            if role == "running_mean" and f"{layer}.num_batches_tracked" not in self.state and counter in self.state:
                self.renamed[f"{layer}.num_batches_tracked"] = counter

    def _name(self, module: nn.Module, path: str, parameters: dict[str, str]) -> str:
        if not parameters:
            return path or type(module).__name__.lower()
        if path and all(self._is_tensor(f"{path}.{role}", fqn) for role, fqn in parameters.items()):
            return path
        fqn = parameters.get("weight") or next(iter(parameters.values()))
        for ending in (".weight", "_weight", ".bias", "_bias"):
            if fqn.endswith(ending):
                return fqn.removesuffix(ending)
        return f"{fqn}_layer"

    def _is_tensor(self, key: str, fqn: str) -> bool:
        if key == fqn:
            return True
        here, there = self.state.get(key), self.state.get(fqn)
        return here is not None and there is not None and here.data_ptr() == there.data_ptr()

    def _tensor(self, node: Any) -> Any:
        return self.tensors[str(node.target)]


def _is_assertion(node: fx.Node) -> bool:
    name = operator_name(node) if node.op == "call_function" else ""
    return name.startswith(("_assert", "sym_constrain", "assert"))


def _writes_input(node: fx.Node) -> bool:
    """Functionalization ends with writing the inputs back that a forward changed: nothing that a caller wants."""
    written = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(written, fx.Node) and written.op == "placeholder" and not node.users


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path.split("@")[0]


def _same_layer(a: nn.Module, b: nn.Module) -> bool:
    if type(a) is not type(b) or a.extra_repr() != b.extra_repr():
        return False
    mine = {**dict(a.named_parameters(recurse=False)), **dict(a.named_buffers(recurse=False))}
    other = {**dict(b.named_parameters(recurse=False)), **dict(b.named_buffers(recurse=False))}
    shared = [k for k in mine if k != "num_batches_tracked"]
    return all(k in other and mine[k].data_ptr() == other[k].data_ptr() for k in shared)


_Built = tuple[nn.Module, tuple[Any, ...], dict[str, str]] | None


def _assign(raiser: _Raiser, module: nn.Module, values: Mapping[str, Any]) -> dict[str, str] | None:
    """Put the exported tensors into `module`; None when one of them is computed and not stored."""
    names: dict[str, str] = {}
    for role, node in values.items():
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor = raiser._tensor(node)
        if role in module._buffers:
            module._buffers[role] = tensor
        else:
            module._parameters[role] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
        names[role] = str(node.target)
    return names


def _weight(raiser: _Raiser, node: Any) -> torch.Tensor | None:
    return raiser._tensor(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _conv(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    weight = _weight(raiser, a["weight"])
    name = operator_name(node)
    transposed = name.startswith("conv_transpose")
    if weight is None:
        return None
    n = int(name[-2])
    cls: Any = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    groups = a["groups"]
    inner, outer = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    spread = {k: _tuple(a[k], n) for k in ("stride", "dilation")}
    padding = a["padding"] if isinstance(a["padding"], str) else _tuple(a["padding"], n)
    more = {"output_padding": _tuple(a["output_padding"], n)} if transposed else {}
    module = cls(
        inner,
        outer,
        tuple(weight.shape[2:]),
        padding=padding,
        groups=groups,
        bias=a["bias"] is not None,
        device="meta",
        **spread,
        **more,
    )
    names = _assign(raiser, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _linear(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    weight = _weight(raiser, a["weight"])
    if weight is None or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=a["bias"] is not None, device="meta")
    names = _assign(raiser, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _batch_norm(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    if a["running_mean"] is None or a["training"]:
        return None
    mean = _weight(raiser, a["running_mean"])
    value = node.meta.get("val")
    if mean is None or value is None:
        return None
    cls: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.dim()]
    module = cls(mean.shape[0], eps=a["eps"], momentum=a["momentum"], affine=a["weight"] is not None, device="meta")
    roles = {role: a[role] for role in ("weight", "bias", "running_mean", "running_var")}
    names = _assign(raiser, module, roles)
    if names is None:
        return None
    tracked = raiser.state.get(names["running_mean"].removesuffix("running_mean") + "num_batches_tracked")
    module.num_batches_tracked = torch.tensor(0) if tracked is None else tracked.clone()
    return module, (a["input"],), names


def _layer_norm(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    if a["weight"] is None:
        return None
    module = nn.LayerNorm(tuple(a["normalized_shape"]), eps=a["eps"], bias=a["bias"] is not None, device="meta")
    names = _assign(raiser, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _group_norm(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    weight = _weight(raiser, a["weight"])
    if weight is None:
        return None
    module = nn.GroupNorm(a["num_groups"], weight.shape[0], eps=a["eps"], device="meta")
    names = _assign(raiser, module, {"weight": a["weight"], "bias": a["bias"]})
    return None if names is None else (module, (a["input"],), names)


def _embedding(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    weight = _weight(raiser, a["weight"])
    if weight is None:
        return None
    padding = a["padding_idx"] if a["padding_idx"] is not None and a["padding_idx"] >= 0 else None
    module = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, device="meta")
    names = _assign(raiser, module, {"weight": a["weight"]})
    return None if names is None else (module, (a["indices"],), names)


def _dropout(raiser: _Raiser, node: fx.Node) -> _Built:
    a = arguments(node)
    return nn.Dropout(a["p"]), (a["input"],), {}


_BUILDERS = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _conv,
    "conv_transpose2d": _conv,
    "conv_transpose3d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "dropout": _dropout,
}


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, Iterable) else [value]
    return tuple(values * n) if len(values) == 1 else tuple(values)


def _is_spatial_mean(node: fx.Node) -> bool:
    a = arguments(node)
    dims = a.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
