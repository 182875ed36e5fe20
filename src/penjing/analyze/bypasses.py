"""Parts of a network that can be removed as a whole, because their input and output have the same shape.

A *block* is the residual branch of a residual addition (He et al., "Deep Residual Learning", CVPR 2016): without it the
addition passes on its shortcut. A *layer* is a convolution or linear layer with the norm and activation that follow.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from penjing.network.graph import kind, shapes, site, tensor_inputs

LAYERS = ("conv", "linear")
NORMS = ("batch_norm", "layer_norm", "group_norm")
ACTIVATIONS = ("relu", "clip", "silu", "gelu", "hardswish", "leaky_relu", "elu", "selu", "sigmoid", "tanh", "prelu")


@dataclass(frozen=True)
class Bypass:
    """One part that can be removed.

    Attributes:
        name: The module path that its operators share.
        kind: "block" or "layer".
        last: Site of the operator whose value is replaced.
        by: Site of the operator whose value replaces it.
        layers: Its layers with parameters, in execution order.
    """

    name: str
    kind: str
    last: str
    by: str
    layers: tuple[str, ...]


def bypasses(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Bypass, ...]:
    """All blocks and layers that can be removed, in execution order.

    Args:
        network: A captured network.
        call: Example inputs (args, kwargs).
    """
    sizes = {name: tuple(int(n) for n in t.shape) for name, t in shapes(network, call).items()}
    parts: list[Bypass] = []
    for node in network.graph.nodes:
        what = kind(network, node)
        if what == "add" and len(inputs := tensor_inputs(node)) == 2:
            for shortcut, branch in (inputs, inputs[::-1]):
                part = _between(shortcut, branch)
                if part and sizes.get(shortcut.name) == sizes.get(node.name):
                    parts += _named(network, "block", node, shortcut, part)
                    break
        elif what in LAYERS and node.op == "call_module":
            last, part = _chain(network, node)
            before = tensor_inputs(node)[0]
            if len(part) > 1 and sizes.get(before.name) == sizes.get(last.name):
                parts += _named(network, "layer", last, before, part)
    return tuple(parts)


def _between(shortcut: fx.Node, branch: fx.Node) -> list[fx.Node]:
    """The operators on every path from the shortcut to the end of the branch; empty without a path between them."""
    reached = {shortcut}
    part: list[fx.Node] = []
    node = shortcut.next
    while node is not branch.next and node.op != "root":
        if any(x in reached for x in node.all_input_nodes):
            reached.add(node)
            part.append(node)
        node = node.next
    needed = {branch}
    for node in reversed(part):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in part if node in needed] if branch in reached and branch is not shortcut else []


def _chain(network: fx.GraphModule, layer: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The last operator of a layer with its norms and activations, and all operators of that chain."""
    part = [layer]
    while len(users := list(part[-1].users)) == 1:
        after = users[0]
        if kind(network, after) not in (*NORMS, *ACTIVATIONS, "dropout") or len(tensor_inputs(after)) != 1:
            break
        part.append(after)
    return part[-1], part


def _named(
    network: fx.GraphModule, what: str, last: fx.Node, by: fx.Node, part: Iterable[fx.Node]
) -> tuple[Bypass, ...]:
    calls = [str(n.target) for n in part if n.op == "call_module"]
    layers = tuple(name for name in dict.fromkeys(calls) if any(True for _ in network.get_submodule(name).parameters()))
    if not layers:
        return ()
    shared = os.path.commonprefix([name.split(".") for name in layers])
    return (Bypass(".".join(shared) or layers[0], what, site(last), site(by), layers),)


__all__ = ["Bypass", "bypasses"]
