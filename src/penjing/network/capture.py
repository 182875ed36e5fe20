"""Capturing a network: an exported program as a trainable graph of layers, the form that all steps work on.

A captured network is a `torch.fx.GraphModule`. Layers with parameters (convolution, linear, norms, embedding) and
dropout are real `torch.nn` modules under their original names; every other operator is a functional node whose
sizes are editable literals. It trains, evaluates, deep-copies and exports like any module, and in eval mode it computes
the same bits as its source, or up to rounding where torch would use its fused attention kernel
(``torch.backends.mha``).

If a source is a file that names its inputs and outputs, ``network.meta["ports"]`` holds these names (see
`penjing.network.exporting.port_names`). If it has a layer's tensors under other names (``in_proj_weight`` of a fused
attention projection), ``network.meta["renamed"]`` maps the new key of the state dict (``in_proj.weight``) to the
source's. A product with a stored weight becomes a linear layer whichever operator expresses it, and a weight computed
only from stored tensors (a parametrization, a transposed weight, a slice of a fused one) is folded:
``network.meta["folded"]`` maps its key to the source's keys that it was computed from.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from penjing.network.biases import as_bias
from penjing.network.complex_pairs import complex_as_pairs
from penjing.network.decompositions import decomposed
from penjing.network.exporting import Dynamic, export_module
from penjing.network.first_states import with_the_batch_of_the_input
from penjing.network.functional import functional, mutates
from penjing.network.graph import is_tensor, operator_name
from penjing.network.higher_order import in_line
from penjing.network.layers import BUILDERS, Tensors
from penjing.network.layouts import channels_first
from penjing.network.naming import safe_names
from penjing.network.products import as_linear
from penjing.network.single_precision import single_program
from penjing.network.size_readers import read_behind
from penjing.network.stored_weights import fold

CHOSEN = "its rows are selected by values: the calibration data may not reach it"
CHOOSES = "its result decides which rows are selected: a small error selects others"


def capture_network(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Dynamic = None,
) -> fx.GraphModule:
    """Export `model` once, in eval mode, and capture it. The model itself is not modified.

    Args:
        model: A module, or an exported program (then the example is not needed).
        args: Positional example inputs, batch first.
        kwargs: Keyword example inputs.
        dynamic: Dynamic axes (see `Task.dynamic`); None makes axis 0 of every tensor the batch.

    Returns:
        A graph module in eval mode that shares no memory with `model`.

    Raises:
        ExportError: The network can't be exported; the error names the line of the user's code.
    """
    program = model if isinstance(model, ExportedProgram) else export_module(model, args, kwargs, dynamic)
    program, owned = safe_names(single_program(program))
    program = with_the_batch_of_the_input(in_line(program))
    program = complex_as_pairs(functional(decomposed(program)))
    flat = program.module(check_guards=False)
    state = {**program.state_dict, **program.constants}
    capture = _Capture(flat, state, operators=bool(getattr(model, "of_operators", False)))
    graph_module = capture.build(channels_last=bool(getattr(model, "channels_last", False)))
    captured = copy.deepcopy(graph_module)
    names = captured.meta["renamed"]
    if isinstance(ports := getattr(model, "ports", None), Mapping):
        captured.meta["ports"] = ports
    names |= {key: owned.get(names.get(key, key), names.get(key, key)) for key in {**owned, **names}}
    return captured.eval()


def layer_of(node: fx.Node, tensors: Mapping[str, Any]) -> tuple[nn.Module, fx.Node] | None:
    """Return the layer equivalent to a functional operator whose parameters are stored tensors, and the layer's inputs.

    Args:
        node: An operator of a captured network.
        tensors: The tensors that the get_attr nodes among its arguments read.

    Returns:
        A layer with the tensors themselves; None if no layer is equivalent to the operator.
    """
    builder = BUILDERS.get(operator_name(node)) if isinstance(node.target, torch._ops.OpOverload) else None
    built = builder(Tensors(tensors, tensors), node) if builder else None
    return None if built is None else (built[0], built[1][0])


class _Capture(Tensors):
    """Converts a flat exported graph to modules and functional nodes.

    Args:
        flat: The graph.
        state: Stored tensors.
        operators: Whether every module of the source is an operator of a file, whose name tells the layer's.
    """

    def __init__(self, flat: fx.GraphModule, state: Mapping[str, Any], operators: bool = False) -> None:
        # One Parameter object per tensor, so that tied weights stay tied.
        tensors = dict(flat.named_parameters(remove_duplicate=False)) | dict(flat.named_buffers(remove_duplicate=False))
        # Constants that a forward creates as tensors are only in the state.
        super().__init__({**state, **tensors}, state)
        self.flat, self.operators = flat, operators
        self.scopes: dict[str, str] = {}  # name of a weight → that of the operator that reads it first
        self.modules: dict[str, nn.Module] = {}
        self.calls: Counter[str] = Counter()
        self.ordinals: Counter[tuple[str, str]] = Counter()
        self.renamed: dict[str, str] = {}
        self.folded: dict[str, tuple[str, ...]] = {}
        self.sources: dict[str, tuple[str, ...]] = {}

    def build(self, channels_last: bool = False) -> fx.GraphModule:
        graph = self.flat.graph
        for node in list(graph.nodes):
            if node.op == "call_module" or _is_assertion(node) or _writes_input(node):
                graph.erase_node(node)
        gained = _Gained(graph)
        _drop_conversions(graph)
        _drop_copies_of_constants(graph)
        gained("conversions and copies removed")
        if channels_last:
            channels_first(graph, self.tensors)
            gained("permutations removed by one layout")
        as_linear(graph, self.tensors)
        as_bias(graph, self.tensors)
        gained("products and sums made layers")
        _sweep(graph)  # unused operators must not keep weights alive
        gained("dead branches removed")
        read_behind(graph)
        folded = fold(graph, self.tensors, _module_path)
        self.tensors = {**self.tensors, **folded.tensors}
        self.sources = folded.sources
        for node in graph.nodes:
            if node.op == "call_function":
                self._raise(node)
        for node in graph.nodes:
            if node.target is torch.ops.aten.copy.default:  # left by functionalization; not differentiable
                node.target, node.args = torch.ops.aten.expand_as.default, (node.args[1], node.args[0])
            elif node.target is torch.ops.aten.view.default:  # the same values, in every memory format
                node.target = torch.ops.aten.reshape.default
        _sweep(graph)
        gained("constants folded")
        attributes: dict[str, Any] = dict(self.modules)
        for node in graph.nodes:
            if node.op == "get_attr":
                attributes[str(node.target)] = self._tensor(node)
        for node in _choosing(graph):
            node.meta["float"] = CHOOSES
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_module" and isinstance(value, torch.Tensor) and free_unbacked_symbols(value):
                node.meta["float"], node.meta["chosen"] = CHOSEN, True
        captured = fx.GraphModule(attributes, graph, class_name="Network")
        for node in captured.graph.nodes:
            value = node.meta.get("val")
            node.meta = {key: node.meta[key] for key in ("site", "stack_trace", "float", "chosen") if key in node.meta}
            if isinstance(value, torch.Tensor):
                node.meta["rank"] = value.dim()
                node.meta["floating"] = value.is_floating_point()
                if value.dim() and isinstance(value.shape[-1], int):
                    node.meta["width"] = value.shape[-1]
        captured.meta["renamed"], captured.meta["folded"] = self.renamed, self.folded
        captured.meta["gained"] = tuple(gained.rows)
        captured.recompile()
        return captured

    def _raise(self, node: fx.Node) -> None:
        path = _module_path(node)
        name = operator_name(node)
        builder = BUILDERS.get(name)
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
            if fqn in self.sources:
                self.folded[key] = self.sources[fqn]
            if key not in self.state and len(self.sources.get(fqn, (fqn,))) == 1:
                (self.renamed[key],) = self.sources.get(fqn, (fqn,))
            counter = fqn.removesuffix("running_mean") + "num_batches_tracked"
            if role == "running_mean" and f"{layer}.num_batches_tracked" not in self.state and counter in self.state:
                self.renamed[f"{layer}.num_batches_tracked"] = counter

    def _name(self, module: nn.Module, path: str, parameters: dict[str, str]) -> str:
        if not parameters:
            return path or type(module).__name__.lower()
        whole = path and all(self._is_tensor(f"{path}.{role}", fqn) for role, fqn in parameters.items())
        fqn = parameters.get("weight") or next(iter(parameters.values()))
        # An exporter that transposes a weight gives it a name of its own; the bias has the layer's.
        if "weight" not in fqn and parameters.get("bias", "").endswith(".bias"):
            fqn = parameters["bias"]
        endings = [e for e in (".weight", "_weight", ".bias", "_bias") if fqn.endswith(e)]
        name = path if whole else fqn.removesuffix(endings[0]) if endings else ""
        # A layer without a bias must not take a name under which an operator reads one.
        hides = any(f"{name}.{role}" in self.state for role, own in module._parameters.items() if own is None)
        if name and not hides:
            return name
        scope = self._scope(path, fqn) if self.operators else ""
        own = {*module._parameters, *module._buffers}
        taken = any((key := f"{scope}.{role}") in self.state and parameters.get(role) != key for role in own)
        return scope if scope and not taken else f"{fqn}_layer"

    def _scope(self, path: str, fqn: str) -> str:
        """The layer that an operator is called after: of ``stage1.conv.Conv`` it is ``stage1.conv``."""
        parent, _, word = path.rpartition(".")
        return self.scopes.setdefault(fqn, parent if parent and re.fullmatch("([A-Z][a-z]*)+", word) else path)

    def _is_tensor(self, key: str, fqn: str) -> bool:
        if key == fqn:
            return True
        here, there = self.state.get(key), self.state.get(fqn)
        return here is not None and there is not None and here.data_ptr() == there.data_ptr()


class _Gained:
    """How many operators each optimization removed from a graph; fewer than 0 where it added some."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.rows: list[tuple[str, int]] = []
        self.left = self._count()

    def __call__(self, name: str) -> None:
        before, self.left = self.left, self._count()
        self.rows.append((name, before - self.left))

    def _count(self) -> int:
        # By the operator's kind: a layer is one as it was before, and what a stored tensor is read by is none.
        return sum(node.op in ("call_function", "call_module") and is_tensor(node) for node in self.graph.nodes)


def _sweep(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not mutates(node):
            graph.erase_node(node)


def _drop_conversions(graph: fx.Graph) -> None:
    """Remove conversions to the type that a value has: they would hide a pooling from the layer that reads it."""
    for node in list(graph.nodes):
        if node.op != "call_function" or operator_name(node) != "to" or not isinstance(node.args[0], fx.Node):
            continue
        before, after = (n.meta.get("val") for n in (node.args[0], node))
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        if (before.dtype, before.device) == (after.dtype, after.device):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _choosing(graph: fx.Graph) -> set[fx.Node]:
    """The layers whose values decide which rows are selected, such as a router of experts."""
    layers: set[fx.Node] = set()
    waiting = [mask for node in graph.nodes for mask in _masks(node)]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module":
            layers.add(node)
        else:
            waiting += node.all_input_nodes
    return layers


def _masks(node: fx.Node) -> list[fx.Node]:
    """The inputs by which an operator decides how many rows it returns."""
    name = operator_name(node) if node.op == "call_function" else ""
    if name == "nonzero" or (name == "where" and len(node.args) == 1) or name == "masked_select":
        return [part for part in node.args[-1:] if isinstance(part, fx.Node)]
    if name not in ("index", "index_put"):
        return []
    indices = [part for part in node.args[1] if isinstance(part, fx.Node)]  # type: ignore[union-attr]
    return [part for part in indices if getattr(part.meta.get("val"), "dtype", None) == torch.bool]


def _is_assertion(node: fx.Node) -> bool:
    name = operator_name(node) if node.op == "call_function" else ""
    return name.startswith(("_assert", "sym_constrain", "assert"))


def _drop_copies_of_constants(graph: fx.Graph) -> None:
    """Remove the copies of constants that a forward creates with ``torch.tensor``, so that they are read as stored.

    Nothing writes in place any more, so they need no copy; and a copy would be taken for a value of the network.
    """
    copies: set[fx.Node] = set()
    for node in list(graph.nodes):
        name = operator_name(node) if node.op == "call_function" else ""
        read = node.args[0] if name in ("lift_fresh_copy", "detach", "detach_") else None
        if isinstance(read, fx.Node) and read.op == "get_attr" and (name == "lift_fresh_copy" or read in copies):
            copies.add(read)
            node.replace_all_uses_with(read)
            graph.erase_node(node)


def _writes_input(node: fx.Node) -> bool:
    """Whether a node is functionalization's final copy back to an input, which no caller needs."""
    written = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(written, fx.Node) and written.op == "placeholder" and not node.users


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path.split("@")[0]


def _same_layer(a: nn.Module, b: nn.Module) -> bool:
    if type(a) is not type(b) or a.extra_repr() != b.extra_repr():
        return False
    tensors = {**dict(a.named_parameters(recurse=False)), **dict(a.named_buffers(recurse=False))}
    other = {**dict(b.named_parameters(recurse=False)), **dict(b.named_buffers(recurse=False))}
    shared = [k for k in tensors if k != "num_batches_tracked"]
    return all(k in other and tensors[k].data_ptr() == other[k].data_ptr() for k in shared)
