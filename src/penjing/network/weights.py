"""Fingerprints of a network's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import fx, nn


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> None: ...  # noqa: D102


def add_tensor(digest: Digest, header: str, tensor: torch.Tensor) -> None:
    """Add a header with the tensor's name and format, and its bytes, independent of device and memory layout."""
    digest.update(header.encode())
    # NumPy has no bfloat16, but every dtype has bytes.
    if tensor.numel():  # a tensor without elements has no bytes, and its strides may forbid the view
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes and bytes of all parameters and buffers, in the module's order."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # otherwise it is a module's extra state
            add_tensor(digest, f"{name}:{tensor.dtype}{list(tensor.shape)}", tensor)
    return digest.hexdigest()


def fingerprint_by_name(networks: Iterable[nn.Module]) -> str:
    """Return the fingerprint of several networks, each in sorted order of names.

    It identifies the teacher of a `TeacherCache`.
    """
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            add_tensor(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor)
    return digest.hexdigest()


def fingerprint_with_graph(network: fx.GraphModule) -> str:
    """Return the fingerprint of a captured network including its operators and the names of its values."""
    digest = hashlib.sha256(fingerprint(network).encode())
    for node in network.graph.nodes:
        digest.update(repr((node.op, node.name, str(node.target), node.args, node.kwargs)).encode())
    return digest.hexdigest()
