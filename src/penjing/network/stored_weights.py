"""Constant folding of weights that a forward computes only from stored tensors.

Parametrizations (weight norm, spectral norm, a user's own), transposed or reshaped parameters, and slices of a fused
one are constant in eval mode, and a layer needs a plain weight to be pruned and quantized.

Tied weights stay tied: a tensor that is read in several ways is folded only if these share no element.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import is_tensor, operator_name

# Operators that read weights, and by which arguments.
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_READERS: dict[str, dict[int, str]] = {
    **{name: {1: "weight", 2: "bias"} for name in ("linear", *_CONVOLUTIONS)},
    "layer_norm": {2: "weight", 3: "bias"},
    "group_norm": {2: "weight", 3: "bias"},
    "batch_norm": {1: "weight", 2: "bias"},
    "embedding": {0: "weight"},
    "embedding_bag": {0: "weight"},
    "matmul": {0: "weight", 1: "weight"},
    **{name: {2: "weight", 3: "weight"} for name in ("lstm", "gru")},
}
# Operators whose result contains elements of their first input, each once.
_MOVES = frozenset(
    {
        *(
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "t",
            "transpose",
            "permute",
        ),
        *("numpy_T", "mT", "movedim", "swapaxes", "swapdims", "slice", "select", "narrow", "split", "split_with_sizes"),
        *("chunk", "unbind", "getitem", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "adjoint", "mH"),
        *("tensor_split", "unsafe_chunk", "unsafe_split", "view_as", "flip", "roll", "matrix_H", "numpy_H"),
    }
)
_ORIGINALS = re.compile(r"(?:\.parametrizations\.(?P<name>\w+)\.original\d*|_(?:g|v|orig))$")


@dataclass(frozen=True)
class Folded:
    """The result of folding.

    Attributes:
        tensors: New name → the tensor; a parameter if one of its sources is.
        sources: New name → names of the parameters (or, if there are none, buffers) that it was computed from.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the constant nodes: stored tensors, and what is computed only from them."""
    changed = {n.args[0] for n in graph.nodes if _changes(n)}
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if node not in changed:
                nodes.add(node)
        elif node.op == "call_function" and is_tensor(node) and not _is_random(node) and node not in changed:
            inputs = node.all_input_nodes
            if all(n in nodes for n in inputs) and (inputs or isinstance(node.meta.get("val"), torch.Tensor)):
                nodes.add(node)
    return nodes


def _changes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_random(node: fx.Node) -> bool:
    target = node.target
    if operator_name(node) == "dropout" and node.args[2] is False:
        return False
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def fold(graph: fx.Graph, stored: Mapping[str, Any], path_of: Any) -> Folded:
    """Fold, in place, the weights that the graph computes only from stored tensors.

    Args:
        graph: Graph of an exported program; get_attr nodes read `stored`.
        stored: Every stored tensor by its name.
        path_of: Node → path of the module that computes it.
    """
    return _Folder(graph, stored, path_of).run()


class _Folder:
    def __init__(self, graph: fx.Graph, stored: Mapping[str, Any], path_of: Any) -> None:
        self.graph, self.stored, self.path_of = graph, stored, path_of
        self.constant = constants(graph)
        self.numbers: dict[str, int] = {}
        self.keys: dict[fx.Node, int] = {}
        self.first: dict[Any, str] = {}  # a tensor with several names goes by the first
        for name, tensor in stored.items():
            self.first.setdefault(_memory(tensor), name)
        self.values: dict[tuple[fx.Node, bool], Any] = {}
        self.folded = Folded()
        self.names: dict[int, str] = {}

    def run(self) -> Folded:
        ways: dict[str, dict[int, fx.Node]] = defaultdict(dict)  # name of a tensor → the ways in which it is read
        for node in self.constant:
            if any(user not in self.constant for user in node.users):
                for name in self._leaves(node):
                    ways[name].setdefault(self._key(node), node)
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node in self.constant:
                continue
            roles = _READERS.get(operator_name(node), {})
            for position, argument in enumerate(node.args):
                if role := roles.get(position):
                    self._replace(node, argument, role, ways)
        return self.folded

    def _replace(self, reader: fx.Node, argument: Any, role: str, ways: Mapping[str, Mapping[int, fx.Node]]) -> None:
        for weight in argument if isinstance(argument, list | tuple) else [argument]:
            if not isinstance(weight, fx.Node) or weight.op != "call_function" or weight not in self.constant:
                continue
            leaves = self._leaves(weight)
            if len(leaves) == 1 and self._is_whole(weight, leaves[0]):
                name = leaves[0]  # transposed twice: the stored tensor itself
            elif all(self._is_alone(weight, ways[leaf], leaf) for leaf in leaves):
                name = self._store(weight, leaves, reader, role, ways)
            else:
                continue
            with self.graph.inserting_before(reader):
                read = self.graph.create_node("get_attr", name)  # its tensor is not in the module yet
            read.meta = {key: weight.meta[key] for key in ("val", "nn_module_stack") if key in weight.meta}
            reader.replace_input_with(weight, read)

    def _leaves(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the parameters that a constant depends on, or of the buffers if it depends on no parameter."""
        names: dict[str, None] = {}
        waiting = [node]
        seen: set[fx.Node] = set()
        while waiting:
            here = waiting.pop()
            if here in seen:
                continue
            seen.add(here)
            if here.op == "get_attr":
                names[self.first[_memory(self.stored[str(here.target)])]] = None
            waiting += here.all_input_nodes
        parameters = tuple(name for name in names if isinstance(self.stored[name], nn.Parameter))
        return tuple(sorted(parameters or names))

    def _key(self, node: fx.Node) -> int:
        """A hash, equal for two nodes that compute the same from the same tensors."""
        if node not in self.keys:
            if node.op == "get_attr":
                text = repr(_memory(self.stored[str(node.target)]))
            elif self._only_moves(node):  # equal for a transposed tensor, whichever operator transposes it
                (leaf,) = self._leaves(node)
                positions = self._positions(node)
                order = hashlib.sha256(positions.contiguous().numpy().tobytes()).hexdigest()
                text = f"{leaf} {tuple(positions.shape)} {order}"
            else:
                parts = fx.node.map_arg((node.args, node.kwargs), lambda n: f"number {self._key(n)}")
                text = f"{node.target} {parts!r}"
            self.keys[node] = self.numbers.setdefault(text, len(self.numbers))
        return self.keys[node]

    def _is_whole(self, node: fx.Node, leaf: str) -> bool:
        tensor = self.stored[leaf]
        if not self._only_moves(node) or tuple(node.meta["val"].shape) != tuple(tensor.shape):
            return False
        return torch.equal(self._positions(node), _numbered(tensor))

    def _is_alone(self, node: fx.Node, ways: Mapping[int, fx.Node], leaf: str) -> bool:
        """Whether nothing else reads the elements of `leaf` that this node reads."""
        others = [other for key, other in ways.items() if key != self._key(node)]
        if not others or not isinstance(self.stored[leaf], nn.Parameter):
            return True
        if not all(self._only_moves(n) for n in (node, *others)):
            return False
        read_here = torch.zeros(self.stored[leaf].numel(), dtype=torch.bool)
        read_here[self._positions(node).flatten().long()] = True
        return not any(bool(read_here[self._positions(other).flatten().long()].any()) for other in others)

    def _only_moves(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return True
        inputs = node.all_input_nodes
        return operator_name(node) in _MOVES and len(inputs) == 1 and self._only_moves(inputs[0])

    def _positions(self, node: fx.Node) -> torch.Tensor:
        """The index into the only stored tensor of each element of a node: the node's shape, int32."""
        positions: torch.Tensor = self._value(node, numbered=True)
        return positions

    def _value(self, node: fx.Node, numbered: bool = False) -> Any:
        key = (node, numbered)
        if key not in self.values:
            if node.op == "get_attr":
                tensor = self.stored[str(node.target)]
                return _numbered(tensor) if numbered else tensor.detach()
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, numbered))
            assert callable(node.target)
            with torch.no_grad():
                self.values[key] = node.target(*args, **kwargs)
        return self.values[key]

    def _store(
        self,
        weight: fx.Node,
        leaves: tuple[str, ...],
        reader: fx.Node,
        role: str,
        ways: Mapping[str, Mapping[int, fx.Node]],
    ) -> str:
        key = self._key(weight)
        if key not in self.names:
            shared = any(len(ways[leaf]) > 1 for leaf in leaves)
            name = self._name(leaves, self.path_of(reader), role, shared)
            value = self._value(weight).detach()
            sources = [self.stored[leaf] for leaf in leaves]
            if any(isinstance(source, nn.Parameter) for source in sources):
                value = nn.Parameter(value, requires_grad=any(source.requires_grad for source in sources))
            self.names[key] = name
            self.folded.tensors[name] = value
            self.folded.sources[name] = leaves
        return self.names[key]

    def _name(self, leaves: tuple[str, ...], path: str, role: str, shared: bool) -> str:
        """The name of the only source, the name that a parametrization replaces, or otherwise the reader's own."""
        plain = {re.sub(_ORIGINALS, lambda m: f".{m['name']}" if m["name"] else "", leaf) for leaf in leaves}
        if len(plain) == 1:
            name = plain.pop().removeprefix(".")
        else:
            name = f"{path}.{role}" if path else role
        if not shared and (name in leaves or name not in self.stored) and name not in self.folded.tensors:
            return name
        base, dot, last = name.rpartition(".")
        stem, ending = next(((last.removesuffix(e), e) for e in ("_weight", "_bias") if last.endswith(e)), (last, ""))
        if last in ("weight", "bias") and base:
            base, dot, stem, ending = "", "", base, f".{last}"
        n = 0
        while (numbered := f"{base}{dot}{stem}_{n}{ending}") in self.stored or numbered in self.folded.tensors:
            n += 1
        return numbered


def _numbered(tensor: torch.Tensor) -> torch.Tensor:
    return torch.arange(tensor.numel(), dtype=torch.int32).reshape(tensor.shape)


def _memory(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
