"""The inputs of a forward pass as positional and keyword arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from penjing.tasks.outputs import to_tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward pass


def as_call(inputs: Any) -> Call:
    """Convert inputs in any accepted form to (args, kwargs).

    >>> as_call({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def as_inputs(call: Call) -> Any:
    """Invert `as_call`: a dict of keyword inputs, or a tuple of positional ones."""
    args, kwargs = call
    return kwargs if kwargs else args


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply `change` to everything in `value` that is not a dict, tuple or list."""
    if isinstance(value, Mapping):
        return {key: map_leaves(change, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_leaves(change, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return change(value)


def leaves(call: Call) -> Iterator[tuple[str | int, str, Any]]:
    """Yield every leaf of the inputs: its input (position or name), its path in words, and its value."""
    args, kwargs = call
    for i, value in enumerate(args):
        for path, leaf in _walk(value):
            yield i, f"input {i}{path}", leaf
    for name, value in kwargs.items():
        for path, leaf in _walk(value):
            yield name, f"input {name!r}{path}", leaf


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _walk(item, f"{path}[{i}]")
    else:
        yield path, value


def to_tensors(call: Call) -> Call:
    """Convert the NumPy arrays among the inputs to tensors.

    Raises:
        CalibrationError: An array is not numeric.
    """

    def change(value: Any) -> Any:
        return to_tensor(value) if isinstance(value, np.ndarray) else value

    args, kwargs = call
    return tuple(map_leaves(change, arg) for arg in args), {k: map_leaves(change, v) for k, v in kwargs.items()}


def fingerprint(calls: Iterable[Call]) -> str:
    """Return the SHA-256 of the path, dtype, shape and bytes of every input of every call, in order.

    It depends on the division into batches, but not on devices, strides, or machines of the same byte order.
    """
    digest = hashlib.sha256()
    for call in calls:
        digest.update(b"call")
        args, kwargs = to_tensors(call)
        for _, where, leaf in leaves((args, dict(sorted(kwargs.items())))):
            if isinstance(leaf, torch.Tensor):
                digest.update(f"|{where}:{leaf.dtype}{list(leaf.shape)}".encode())
                flat = leaf.detach().cpu().contiguous().reshape(-1)
                # As in penjing.network.weights, which can't be imported here: NumPy has no bfloat16, but every dtype
                # has bytes.
                if flat.numel():
                    digest.update(flat.view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"|{where}={leaf!r}".encode())
    return digest.hexdigest()
