"""A cache of exported ONNX files: one network becomes several artifacts, and exporting takes seconds.

A file is found by what the network is, never by which object it is: edits in place make another network of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.network.graph import compute
from penjing.network.weights import add_tensor

LIMIT = 2**29  # bytes of all cached files

_files: OrderedDict[str, bytes] = OrderedDict()


def recall(key: str | None) -> bytes | None:
    """The cached file of a key, if it is still there."""
    if key is None or key not in _files:
        return None
    _files.move_to_end(key)
    return _files[key]


def store(key: str | None, data: bytes) -> None:
    """Cache a file, and evict the least recently used."""
    if key is None or len(data) > LIMIT:
        return
    _files[key] = data
    while sum(map(len, _files.values())) > LIMIT:
        _files.popitem(last=False)


def fingerprint(network: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], *others: Any) -> str | None:
    """What the file is made from, as a hash: operators, their settings, names and values, and the shapes of the inputs.

    None for a network with a layer that torch did not write: its representation need not tell all of it.
    """
    told = hashlib.blake2b()

    def tell(*values: Any) -> None:
        told.update(repr(values).encode())

    for name, module in network.named_modules():
        if name and type(module).__module__.partition(".")[0] != "torch":
            return None
        if not isinstance(module, fx.GraphModule):
            tell(name, type(module).__qualname__, module.extra_repr(), _numbers(module))
    tensors: list[tuple[str, Any]] = [*network.named_parameters(), *network.named_buffers()]
    tell(getattr(network.graph._codegen, "pytree_info", None))  # the names of the inputs
    for node in network.graph.nodes:
        tell(node.op, node.name, str(node.target), node.args, node.kwargs, node.meta.get("site"))
        if node.op == "get_attr":  # a constant need not be a buffer
            tensors.append((node.name, compute(network, node, (), {})))
    for name, tensor in tensors:
        add_tensor(told, repr((name, tensor.dtype, tuple(tensor.shape))), tensor)
    flat, structure = pytree.tree_flatten(call)
    tell(structure, [(v.dtype, tuple(v.shape)) if isinstance(v, torch.Tensor) else v for v in flat], others)
    return told.hexdigest()


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain attributes of a layer, whether its representation shows them or not."""
    plain = (bool, int, float, str, tuple, type(None))
    return sorted((name, value) for name, value in vars(module).items() if isinstance(value, plain))
