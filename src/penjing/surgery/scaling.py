"""Scaling the input channels of linear layers: inputs are divided, weights multiplied by a factor per channel.

Xiao et al., "SmoothQuant", ICML 2023, equation 3, for layers whose producer can't absorb the division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.network.graph import sites
from penjing.steps.draft import Edit

DIVIDED = "_divided"


def divide_inputs(network: fx.GraphModule, layers: Sequence[str], factor: torch.Tensor | None = None) -> Edit:
    """Let linear layers that read the same value x (…, in) read x/factor, in place: y = (W·factor)·(x/factor) + b.

    Args:
        network: A captured network.
        layers: Names of linear modules, each called once, without tied weights.
        factor: (in,), positive; None for ones, when the values are loaded later.

    Returns:
        The edit.

    Raises:
        TypeError: A layer is not a linear module, or they read different values.
    """
    nodes = [sites(network)[name] for name in layers]
    modules: list[Any] = [network.get_submodule(name) for name in layers]
    if len({node.args[0] for node in nodes}) != 1 or not all(isinstance(m, nn.Linear) for m in modules):
        raise TypeError(f"{', '.join(layers)} are not linear layers that read one value")
    weight = modules[0].weight
    factor = torch.ones(weight.shape[1], dtype=torch.float64) if factor is None else factor.double()
    factor = factor.to(weight.device)
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(module.weight.double() * factor)
    name = layers[0] + DIVIDED
    owner = nn.Module()
    owner.register_buffer("by", (1 / factor).to(weight.dtype))
    network.add_submodule(name, owner)
    value: Any = nodes[0].args[0]
    with network.graph.inserting_before(min(nodes, key=list(network.graph.nodes).index)):
        by = network.graph.get_attr(f"{name}.by")
        divided = network.graph.call_function(torch.ops.aten.mul.Tensor, (value, by))
    by.meta = {"site": f"{name}.by", "floating": True, "rank": 1}
    divided.meta = {word: value.meta[word] for word in ("rank", "width") if word in value.meta}
    divided.meta |= {"site": name, "floating": True}
    for node in nodes:
        node.args = (divided, *node.args[1:])
    network.recompile()
    return {"edit": "divide_inputs", "layers": list(layers)}
