"""Attention unfolded into its operators, so that its two matrix products can be quantized.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1: softmax(Q·Kᵀ·scale + mask)·V.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, is_tensor, kind, site, sites, tensor_inputs
from penjing.steps.draft import Edit

HIDDEN = -1e30  # added at masked positions: its exp is 0, and sums with it stay finite


def unfold_attentions(network: fx.GraphModule, keep: Collection[str] = ()) -> tuple[Edit, ...]:
    """Unfold, in place, every attention whose site is not in `keep`; returns the edits."""
    names = [
        name
        for name, node in sites(network).items()
        if kind(network, node) == "attention" and name not in keep and _is_plain(node)
    ]
    for name in names:
        unfold_attention(network, name)
    return tuple({"edit": "unfold_attention", "site": name} for name in names)


def unfold_attention(network: fx.GraphModule, name: str) -> None:
    """Replace one attention in place by its operators, among them ``NAME.scores``, ``NAME.softmax``, ``NAME.values``.

    As in torch, a fully masked row returns zeros.
    """
    node = sites(network)[name]
    if kind(network, node) != "attention" or not _is_plain(node):
        raise TypeError(f"{name} is not an attention that can be unfolded")
    given = arguments(node)
    query, key, value, mask = (given[word] for word in ("query", "key", "value", "attn_mask"))

    def call(operator: Any, *args: Any, word: str | None = None) -> fx.Node:
        new: fx.Node = network.graph.call_function(operator, args)
        new.meta = {"site": f"{name}.{word or new.name}", "floating": word is not None, "rank": node.meta.get("rank")}
        return new

    aten = torch.ops.aten
    with network.graph.inserting_before(node):
        scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(query.meta["width"])
        turned = call(aten.transpose.int, key, -2, -1, word="key")
        scores = call(aten.matmul.default, query, turned, word="scores")
        scores = call(aten.mul.Tensor, scores, scale, word="scaled")
        if given["is_causal"]:
            sizes = [call(aten.sym_size.int, x, -2) for x in (query, key)]
            ones = call(aten.new_ones.default, query, sizes)
            seen = call(aten.gt.Scalar, call(aten.tril.default, ones), 0)
            scores = call(aten.where.ScalarOther, seen, scores, HIDDEN, word="causal")
        rows = None
        if isinstance(mask, fx.Node) and not mask.meta.get("floating", True):
            scores = call(aten.where.ScalarOther, mask, scores, HIDDEN, word="masked")
            rows = call(aten.any.dim, mask, -1, True)
        elif isinstance(mask, fx.Node):
            scores = call(aten.add.Tensor, scores, call(aten.clamp.default, mask, HIDDEN), word="masked")
            rows = call(aten.any.dim, call(aten.gt.Scalar, mask, -math.inf), -1, True)
        weights = call(aten.softmax.int, scores, -1, word="softmax")
        result = call(aten.matmul.default, weights, value, word="values")
        if rows is not None:
            result = call(aten.mul.Tensor, result, rows, word="seen")
    node.replace_all_uses_with(result)
    network.graph.erase_node(node)
    network.recompile()


def zero_hidden_rows(network: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in which fully masked rows of attentions return zeros explicitly; the network itself without masks.

    Torch's kernel returns zeros for them. The ONNX operators that it is exported as return the mean of all values for a
    boolean mask, and NaN for a mask of −inf. Masks that do not depend on an input are left unchanged.
    """
    if not _masked(network):
        return network
    network = copy.deepcopy(network)
    aten = torch.ops.aten
    rows: dict[fx.Node, fx.Node] = {}

    def call(site: str, like: fx.Node, operator: Any, *args: Any) -> fx.Node:
        new: fx.Node = network.graph.call_function(operator, args)
        new.meta = {"site": site, "floating": True, "rank": like.meta.get("rank")}
        return new

    for node in _masked(network):
        name, mask = site(node), arguments(node)["attn_mask"]
        with network.graph.inserting_before(node):
            if mask not in rows:
                shown = mask if _is_boolean(mask) else call(f"{name}.shown", mask, aten.gt.Scalar, mask, -math.inf)
                rows[mask] = call(f"{name}.rows", mask, aten.any.dim, shown, -1, True)
            if not _is_boolean(mask):
                node.replace_input_with(mask, call(f"{name}.mask", mask, aten.clamp.default, mask, HIDDEN))
        users = list(node.users)
        with network.graph.inserting_after(node):
            result = call(f"{name}.seen", node, aten.mul.Tensor, node, rows[mask])
        for user in users:
            user.replace_input_with(node, result)
    network.recompile()
    return network


def _masked(network: fx.GraphModule) -> list[fx.Node]:
    """The attentions whose mask is computed from an input of the network."""
    varying: set[fx.Node] = set()
    attentions = []
    for node in network.graph.nodes:
        if node.op == "placeholder" or (is_tensor(node) and varying.intersection(tensor_inputs(node))):
            varying.add(node)
        if (
            node.target is torch.ops.aten.scaled_dot_product_attention.default
            and arguments(node)["attn_mask"] in varying
        ):
            attentions.append(node)
    return attentions


def _is_boolean(mask: fx.Node) -> bool:
    return not mask.meta.get("floating", True)


def _is_plain(node: fx.Node) -> bool:
    """Whether it is the attention of the equation: without dropout, without grouped queries, with a known scale."""
    given = arguments(node)
    scaled = given["scale"] is not None or given["query"].meta.get("width") is not None
    return scaled and not given["dropout_p"] and not given["enable_gqa"]
