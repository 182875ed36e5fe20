"""Activation functions x·g(x) unfolded into gate and product, for runtimes with integer kernels for these two alone.

SiLU, x·σ(x): Elfwing et al., "Sigmoid-weighted linear units for neural network function approximation in reinforcement
learning", 2017, equation 5. Hard swish, x·min(max(x + 3, 0), 6)/6: Howard et al., "Searching for MobileNetV3", ICCV
2019, section 5.2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from penjing.network.graph import kind, site, sites, tensor_inputs
from penjing.steps.draft import Edit

GATES: dict[str, Any] = {
    "silu": torch.ops.aten.sigmoid.default,
    "hardswish": torch.ops.aten.hardsigmoid.default,
}
"""Kind of a function → its gate."""


def unfold_self_gates(
    network: fx.GraphModule, integer: Collection[str], keep: Collection[str] = ()
) -> tuple[Edit, ...]:
    """Unfold, in place, every function whose gate is of a kind in `integer` and whose site is not in `keep`.

    Returns the edits.
    """
    edits: list[Edit] = []
    for name, node in sites(network).items():
        what = kind(network, node)
        if what in GATES and word(what) in integer and name not in keep:
            unfold_self_gate(network, name, what)
            edits.append({"edit": f"unfold_{what}", "site": name})
    return tuple(edits)


def unfold_self_gate(network: fx.GraphModule, name: str, what: str) -> None:
    """Replace one function of kind `what` in place by ``NAME.GATE`` and ``NAME.product``."""
    node = sites(network)[name]
    if kind(network, node) != what:
        raise TypeError(f"{name} is not a {what}")
    x = tensor_inputs(node)[0]
    with network.graph.inserting_before(node):
        gate = network.graph.call_function(GATES[what], (x,))
        product = network.graph.call_function(torch.ops.aten.mul.Tensor, (x, gate))
    for new, part in ((gate, word(what)), (product, "product")):
        new.meta = {**node.meta, "site": f"{site(node)}.{part}"}
    node.replace_all_uses_with(product)
    network.graph.erase_node(node)
    network.recompile()


def word(what: str) -> str:
    """The kind of the gate of a function of kind `what`."""
    name: str = GATES[what]._opname
    return name


__all__ = ["GATES", "unfold_self_gate", "unfold_self_gates", "word"]
