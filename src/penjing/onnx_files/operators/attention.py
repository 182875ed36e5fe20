"""The ONNX operator of attention (sets 23 and 24)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from penjing.onnx_files.node import Node, Value, tensor
from penjing.onnx_files.operators.elementwise import torch_type


def _heads(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """(batch, length, heads × width) → (batch, heads, length, width); four axes stay as they are."""
    if x.dim() == 4 or count is None:
        return x
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _attention(
    node: Node,
    query: Value,
    key: Value,
    value: Value,
    mask: Value = None,
    past_key: Value = None,
    past_value: Value = None,
    lengths: Value = None,
) -> Any:
    flat = tensor(query).dim() == 3
    q = _heads(tensor(query), node.get("q_num_heads"))
    k, v = (_heads(tensor(part), node.get("kv_num_heads")) for part in (key, value))
    before: Any = 0
    if past_key is not None:
        before = tensor(past_key).shape[2]
        k, v = torch.cat([tensor(past_key), k], 2), torch.cat([tensor(past_value), v], 2)
    present = (k, v)
    if q.shape[1] != k.shape[1]:  # grouped queries share a key
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scale = node.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    precise = torch_type(node, node.get("softmax_precision")) if node.get("softmax_precision") else None
    bias = _bias(node, q, k, mask, lengths, before)
    cap, mode = node.get("softcap", 0.0), node.get("qk_matmul_output_mode", 0)
    shown = len(node.outputs) > 3 and bool(node.outputs[3])
    plain = cap == 0 and not shown and precise is None and lengths is None and mask is None
    if plain and bias is None:
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        scores: Any = None
    else:
        root = math.sqrt(scale)
        products = (q * root) @ (k * root).transpose(-1, -2)
        capped = cap * torch.tanh(products / cap) if cap else products
        biased = capped if bias is None else capped + bias
        weights = F.softmax(biased if precise is None else biased.to(precise), -1)
        hidden = (biased == -math.inf).all(-1, keepdim=True)
        weights = torch.where(hidden, torch.zeros_like(weights), weights).to(q.dtype)
        scores = (products, capped, biased, weights)[mode]
        y = weights @ v
    y = y.transpose(1, 2).flatten(2) if flat else y
    return (y, *present, scores)[: max(len(node.outputs), 1)] if len(node.outputs) > 1 else y


def _bias(node: Node, q: torch.Tensor, k: torch.Tensor, mask: Value, lengths: Value, before: Any) -> Any:
    """What is added to the scores; None where nothing is."""
    bias = None
    if mask is not None:
        given = tensor(mask)
        if given.shape[-1] != k.shape[2]:  # a shorter mask hides what is behind it
            missing = k.shape[2] - given.shape[-1]
            given = (
                F.pad(given.to(torch.uint8), (0, missing)).bool()
                if given.dtype == torch.bool
                else F.pad(given, (0, missing), value=-math.inf)
            )
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(~given, -math.inf)
        bias = given.to(q.dtype)
    rows = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    columns = torch.arange(k.shape[2], device=q.device)
    hidden = None
    if lengths is not None:
        whole = tensor(lengths).long().reshape(-1, 1, 1, 1)
        hidden = columns >= whole
        before = whole - q.shape[2] if node.get("is_causal", 0) or node.get("_window") else before
    if node.get("is_causal", 0):
        future = columns > rows + before
        hidden = future if hidden is None else hidden | future
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    if left >= 0 or right >= 0:
        at = rows + before
        outside = columns < at - left if left >= 0 else torch.zeros_like(columns > rows)
        outside = outside | (columns > at + right) if right >= 0 else outside
        hidden = outside if hidden is None else hidden | outside
    if hidden is None:
        return bias
    filled = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -math.inf)
    return filled if bias is None else bias + filled


OPERATORS: dict[str, Callable[..., Any]] = {"Attention": _attention}

KNOWN_INPUTS: dict[str, tuple[int, ...]] = {}

__all__ = ["KNOWN_INPUTS", "OPERATORS"]
