"""Gates: products of a value with a sigmoid, as in SiLU, hard swish, squeeze-and-excitation and gated linear units.

Elfwing et al., "Sigmoid-weighted linear units", 2017; Hu et al., "Squeeze-and-excitation networks", CVPR 2018. A
sigmoid lies between 0 and 1, so its rounding costs the product less than that of the product itself. Other products
keep floating point: what they multiply may be of any size.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from penjing.network.graph import kind, tensor_inputs

REASON = "it is not a gate between integer kernels: a sigmoid and the product with it"
SIGMOIDS = frozenset({"sigmoid", "hardsigmoid"})
KINDS = SIGMOIDS | {"mul"}


def gate(
    network: fx.GraphModule, product: fx.Node, written: Collection[fx.Node], moves: Collection[str]
) -> tuple[fx.Node, ...]:
    """Return the sigmoids, also hard ones, by which a product multiplies, if integer kernels write all that it reads.

    Args:
        network: A captured network.
        product: Any node before which all of `written` is known.
        written: The operators whose integer kernels write integers.
        moves: Kinds that only move values, or that runtimes fuse into the operator before them.
    """
    factors = tensor_inputs(product)
    if kind(network, product) != "mul" or len(factors) != 2:
        return ()
    sigmoids = tuple(x for x in factors if kind(network, x) in SIGMOIDS)
    read = [x for x in factors if x not in sigmoids] + [x for s in sigmoids for x in tensor_inputs(s)]
    return sigmoids if all(writer(network, x, moves) in written for x in read) else ()


def writer(network: fx.GraphModule, node: fx.Node, moves: Collection[str]) -> fx.Node:
    """Return the operator whose values a node gives, behind those of the kinds `moves`."""
    while kind(network, node) in moves and len(tensor_inputs(node)) == 1:
        node = tensor_inputs(node)[0]
    return node


__all__ = ["KINDS", "REASON", "SIGMOIDS", "gate", "writer"]
