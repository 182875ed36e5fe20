"""Operators that have no ONNX form, told from the exporter's tables alone: nothing is exported."""

from __future__ import annotations

import torch
from torch import fx
from torch.onnx._internal.exporter import _decomp

from penjing.network.graph import sites
from penjing.onnx_files import exporter_table
from penjing.onnx_files import pooling as onnx_pooling
from penjing.onnx_files.translations import translations
from penjing.onnx_files.write import OPSET, quiet


def untranslated(network: fx.GraphModule) -> dict[str, str]:
    """Site → operator that is neither written nor decomposed into what is.

    What is decomposed may still hold one, and what is written may not fit: an export alone tells of these.
    """
    functional = {
        site: node.target
        for site, node in sites(network).items()
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    with quiet():
        registry = exporter_table.table(OPSET)
        own = onnx_pooling.translations() | translations()
        written = set(_decomp.get_onnx_implemented_overloads(registry))
        decomposed = _decomp.create_onnx_friendly_decomposition_table(written)
    return {
        site: str(target)
        for site, target in functional.items()
        if target not in own and target not in written and target not in decomposed and not target._can_decompose()
    }
