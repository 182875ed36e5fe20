"""SiLU unfolded into its sigmoid and its product, for runtimes with integer kernels for these two and none for SiLU.

Elfwing et al., "Sigmoid-weighted linear units for neural network function approximation in reinforcement learning",
2017, equation 5: x·σ(x).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from penjing.network.graph import kind, site, sites, tensor_inputs
from penjing.steps.draft import Edit


def unfold_silus(network: fx.GraphModule, keep: Collection[str] = ()) -> tuple[Edit, ...]:
    """Unfold, in place, every SiLU whose site is not in `keep`; returns the edits."""
    names = [name for name, node in sites(network).items() if kind(network, node) == "silu" and name not in keep]
    for name in names:
        unfold_silu(network, name)
    return tuple({"edit": "unfold_silu", "site": name} for name in names)


def unfold_silu(network: fx.GraphModule, name: str) -> None:
    """Replace one SiLU in place by ``NAME.sigmoid`` and ``NAME.product``."""
    node = sites(network)[name]
    if kind(network, node) != "silu":
        raise TypeError(f"{name} is not a SiLU")
    x = tensor_inputs(node)[0]
    with network.graph.inserting_before(node):
        sigmoid = network.graph.call_function(torch.ops.aten.sigmoid.default, (x,))
        product = network.graph.call_function(torch.ops.aten.mul.Tensor, (x, sigmoid))
    for new, word in ((sigmoid, "sigmoid"), (product, "product")):
        new.meta = {**node.meta, "site": f"{site(node)}.{word}"}
    node.replace_all_uses_with(product)
    network.graph.erase_node(node)
    network.recompile()
