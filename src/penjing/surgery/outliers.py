"""Splitting a linear layer in two, so that its few input channels with outliers stay in floating point.

Dettmers et al., "LLM.int8()", NeurIPS 2022, section 3.2 (mixed-precision decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import sites
from penjing.steps.draft import Edit

FLOAT = "its input channels carry outliers"
BRANCH = "_outliers"


def split_outliers(network: fx.GraphModule, layers: Sequence[str], channels: Sequence[int]) -> Edit:
    """Split, in place, linear layers that read the same value (…, in): y = W·(x·mask) + b + W[:, channels]·x[channels].

    A layer keeps its shape, and its columns of `channels` become 0. The new layers are called ``NAME_outliers``.

    Args:
        network: A captured network.
        layers: Names of linear modules, each called once, without tied weights.
        channels: Input channels with outliers.

    Returns:
        The edit.

    Raises:
        TypeError: A layer is not a linear module, or they read different values.
    """
    nodes = [sites(network)[name] for name in layers]
    modules: list[Any] = [network.get_submodule(name) for name in layers]
    if len({node.args[0] for node in nodes}) != 1 or not all(isinstance(m, nn.Linear) for m in modules):
        raise TypeError(f"{', '.join(layers)} are not linear layers that read one value")
    picked = torch.tensor(sorted(channels))
    first = layers[0] + BRANCH
    for name, module in zip(layers, modules, strict=True):
        branch = nn.Linear(len(picked), module.out_features, bias=False)
        with torch.no_grad():
            branch.weight.copy_(module.weight[:, picked])
            module.weight[:, picked] = 0
        branch.weight.requires_grad_(module.weight.requires_grad)
        network.add_submodule(name + BRANCH, branch.to(module.weight).train(network.training))
    owner: Any = network.get_submodule(first)
    weight = modules[0].weight
    mask = torch.ones(modules[0].in_features, device=weight.device, dtype=weight.dtype)
    mask[picked] = 0
    owner.register_buffer("mask", mask)
    owner.register_buffer("channels", picked.to(weight.device))

    value: Any = nodes[0].args[0]
    earliest = min(nodes, key=list(network.graph.nodes).index)
    with network.graph.inserting_before(earliest):
        constants = [network.graph.get_attr(f"{first}.{name}") for name in ("mask", "channels")]
        dense = network.graph.call_function(torch.ops.aten.mul.Tensor, (value, constants[0]))
        few = network.graph.call_function(torch.ops.aten.index_select.default, (value, -1, constants[1]))
    for node, word in ((constants[0], "mask"), (constants[1], "channels"), (dense, "dense"), (few, "few")):
        floating = word != "channels"
        node.meta = {"site": f"{first}.{word}", "floating": floating, "rank": value.meta.get("rank"), "float": FLOAT}
    for node, name in zip(nodes, layers, strict=True):
        node.args = (dense, *node.args[1:])
        with network.graph.inserting_after(node):
            more = network.graph.call_module(name + BRANCH, (few,))
        with network.graph.inserting_after(more):
            both = network.graph.call_function(torch.ops.aten.add.Tensor, (node, more))
        for user in [u for u in node.users if u is not both]:
            user.replace_input_with(node, both)
        more.meta = node.meta | {"site": name + BRANCH, "float": FLOAT}
        both.meta = node.meta | {"site": f"{name}{BRANCH}.sum", "float": FLOAT}
    network.recompile()
    return {"edit": "split_outliers", "layers": list(layers), "channels": picked.tolist()}
