"""A network's weights as one word, to tell whether two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import fx, nn


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes | memoryview, /) -> None: ...  # noqa: D102


def add_tensor(digest: Digest, header: str, tensor: torch.Tensor) -> None:
    """Add a header, which tells the tensor's name and format, and the tensor's bytes, wherever and however it lies."""
    digest.update(header.encode())
    # NumPy knows no bfloat16, but every type has bytes.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of all parameters and buffers, in the order of the module's own."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # else a module's own extra state
            add_tensor(digest, f"{name}:{tensor.dtype}{list(tensor.shape)}", tensor)
    return digest.hexdigest()


def fingerprint_by_name(networks: Iterable[nn.Module]) -> str:
    """The same of several networks together, each in the order of its names, whatever order a module made them in.

    Stored answers of teachers are known by it.
    """
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            add_tensor(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor)
    return digest.hexdigest()


def fingerprint_with_graph(network: fx.GraphModule) -> str:
    """Of a captured network's operators too, by the names that values are known by."""
    digest = hashlib.sha256(fingerprint(network).encode())
    for node in network.graph.nodes:
        digest.update(repr((node.op, node.name, str(node.target), node.args, node.kwargs)).encode())
    return digest.hexdigest()
