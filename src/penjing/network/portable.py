"""A captured network in picklable form, to rebuild it in another process.

Pickling a graph module retraces it, which loses the names of its operators and turns sizes into constants; here every
node is recorded as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

NOTES = ("site", "floating", "rank", "width", "float", "chosen", "stack_trace")


@dataclass(frozen=True)
class _Node:
    """A reference to a node by its position."""

    position: int


@dataclass(frozen=True)
class _Operator:
    """A torch operator by its name."""

    name: str


@dataclass(frozen=True)
class Portable:
    """A captured network that can be pickled; `network` rebuilds it."""

    layers: nn.Module
    nodes: tuple[tuple[str, Any, Any, Any, str, dict[str, Any]], ...]
    codegen: Any

    @classmethod
    def of(cls, network: fx.GraphModule) -> Portable:
        """Convert a network; the result shares its layers."""
        positions = {node: i for i, node in enumerate(network.graph.nodes)}

        def plain(value: Any) -> Any:
            return fx.node.map_arg(value, lambda node: _Node(positions[node]))  # type: ignore[arg-type, return-value]

        nodes = tuple(
            (n.op, _named(n.target), plain(n.args), plain(n.kwargs), n.name, _plain(n.meta))
            for n in network.graph.nodes
        )
        layers = nn.Module()
        for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(layers, store, copy.copy(getattr(network, store)))
        return cls(layers, nodes, network.graph._codegen)

    def network(self) -> fx.GraphModule:
        """Rebuild the network, in eval mode: same names, same sites, same values."""
        graph = fx.Graph()
        built: list[fx.Node] = []

        def read(value: Any) -> Any:
            if isinstance(value, _Node):
                return built[value.position]
            if isinstance(value, tuple):
                return tuple(map(read, value))
            if isinstance(value, list):
                return [read(v) for v in value]
            if isinstance(value, dict):
                return {k: read(v) for k, v in value.items()}
            if isinstance(value, slice):
                return slice(read(value.start), read(value.stop), read(value.step))
            return value

        for op, target, args, kwargs, name, meta in self.nodes:
            node = graph.create_node(op, _operator(target), read(args), read(kwargs), name)
            node.meta = dict(meta)
            built.append(node)
        graph.set_codegen(self.codegen)
        network = fx.GraphModule(self.layers, graph)
        for name, layer in self.layers.named_children():  # outside the graph, as of a hook
            if name not in network._modules:
                network.add_module(name, layer)
        return network.eval()


def _named(target: Any) -> Any:
    return _Operator(str(target)) if isinstance(target, torch._ops.OpOverload) else target


def _operator(target: Any) -> Any:
    if not isinstance(target, _Operator):
        return target
    space, packet, overload = target.name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Penjing's own metadata of a node, without torch's."""
    return {word: meta[word] for word in NOTES if word in meta}


__all__ = ["Portable"]
