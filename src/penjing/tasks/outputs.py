"""A network's outputs as a flat list with a JSON-serializable structure, and a predictor with NumPy interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.errors import CalibrationError, SourceError
from penjing.modes import in_eval_mode

Structure = dict[str, Any]  # {"kind": "tensor" | "tuple" | "dict" | "none" | "constant", ...}
_REGULAR = "?bBhHiIlLqQefdFD"  # NumPy dtype kinds that torch supports


def flatten_outputs(outputs: Any) -> tuple[list[Any], Structure]:
    """Flatten a network's outputs to tensors (or arrays) in order, and the structure to restore them.

    Tuples, named tuples and lists become "tuple"; dicts and Hugging Face's ModelOutput become "dict", where
    entries that are None are dropped. Numbers, strings and booleans are kept in the structure.

    Returns:
        The leaves as they are (any shape), and for example ``{"kind": "tensor"}``,
        ``{"kind": "tuple", "items": [...]}`` or ``{"kind": "dict", "items": {"logits": {"kind": "tensor"}}}``.

    Raises:
        SourceError: An output is neither a tensor nor a container of tensors.

    >>> flatten_outputs({"logits": torch.zeros(2), "loss": None})[1]
    {'kind': 'dict', 'items': {'logits': {'kind': 'tensor'}}}
    """
    leaves: list[Any] = []
    return leaves, _flatten(outputs, leaves, "output")


def _flatten(value: Any, leaves: list[Any], where: str) -> Structure:
    if isinstance(value, torch.Tensor | np.ndarray):
        leaves.append(value)
        return {"kind": "tensor"}
    if value is None:
        return {"kind": "none"}
    if isinstance(value, bool | int | float | str):
        return {"kind": "constant", "value": value}
    if isinstance(value, Mapping):
        items: dict[str, Structure] = {}
        for key, item in value.items():
            if str(key) in items:
                raise SourceError(
                    f"two entries of {where} have one name",
                    code="same-name",
                    got=f"{key!r} beside {str(key)!r}",
                    expected="keys that differ as text: they name the outputs in a file",
                    remedy="rename one of the two keys",
                )
            if item is not None:
                items[str(key)] = _flatten(item, leaves, f"{where}[{key!r}]")
        return {"kind": "dict", "items": items}
    if isinstance(value, tuple | list):
        return {"kind": "tuple", "items": [_flatten(v, leaves, f"{where}[{i}]") for i, v in enumerate(value)]}
    raise SourceError(
        f"{where} of the network is not a tensor",
        code="not-a-tensor",
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        expected="tensors, or tuples, lists or dicts of tensors",
        remedy=_remedy(value),
    )


def _remedy(value: Any) -> str:
    wrap = "wrap the network in a module whose forward returns what is needed: {'logits': self.net(x).logits}"
    if not type(value).__name__.endswith("Cache"):
        return wrap
    return f"set config.use_cache = False; where the network keeps its cache all the same, as T5 does, {wrap}"


def unflatten_outputs(leaves: Sequence[Any], structure: Structure) -> Any:
    """Invert `flatten_outputs`: tensors, tuples and dicts.

    Raises:
        SourceError: The number of leaves does not match the structure.

    >>> unflatten_outputs([1, 2], {"kind": "tuple", "items": [{"kind": "tensor"}, {"kind": "tensor"}]})
    (1, 2)
    """
    expected = len(output_names(structure))
    if len(leaves) != expected:
        raise SourceError(
            "the number of outputs has changed", code="outputs", got=len(leaves), expected=f"{expected} tensors"
        )
    return _unflatten(iter(leaves), structure)


def _unflatten(leaves: Iterator[Any], structure: Structure) -> Any:
    kind = structure["kind"]
    if kind == "tensor":
        return next(leaves)
    if kind == "tuple":
        return tuple(_unflatten(leaves, item) for item in structure["items"])
    if kind == "dict":
        return {key: _unflatten(leaves, item) for key, item in structure["items"].items()}
    return structure.get("value")  # "constant" has a value, "none" does not


def output_names(structure: Structure) -> list[str]:
    """Return a unique name per tensor, in order: "output" alone, "output_0" in a tuple, the keys of a dict.

    >>> output_names({"kind": "dict", "items": {"a": {"kind": "tuple", "items": [{"kind": "tensor"}]}}})
    ['a_0']
    """
    paths = list(_paths(structure))
    names: list[str] = []
    for path in paths:
        name = "_".join(path if path and structure["kind"] == "dict" else ("output", *path))
        while name in names:  # {"a": {"b": x}, "a_b": y} would give both the same name
            name += "_"
        names.append(name)
    return names


def _paths(structure: Structure, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if structure["kind"] == "tensor":
        yield prefix
    elif structure["kind"] == "tuple":
        for i, item in enumerate(structure["items"]):
            yield from _paths(item, (*prefix, str(i)))
    elif structure["kind"] == "dict":
        for key, item in structure["items"].items():
            yield from _paths(item, (*prefix, key))


def first_output(outputs: Any) -> Any:
    """Return the first tensor of a network's outputs, which losses and metrics of built-in tasks use.

    Raises:
        SourceError: There is no tensor.
    """
    leaves, structure = flatten_outputs(outputs)
    if not leaves:
        raise SourceError(
            "the network returned no tensor", code="no-tensor", got=structure, expected="at least one output tensor"
        )
    return leaves[0]


def to_tensor(value: np.ndarray[Any, Any], where: str = "input") -> torch.Tensor:
    """Convert to a tensor of the same shape and dtype; shares memory if NumPy allows it.

    Raises:
        CalibrationError: torch does not support the array's dtype (objects, text, dates).
    """
    if value.dtype.char not in _REGULAR:
        raise CalibrationError(
            f"{where} holds no numbers",
            code="no-numbers",
            got=f"an array of {value.dtype}",
            expected="floating-point, integer or boolean values",
            remedy="convert text to token ids and objects to numbers first",
        )
    plain = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    # torch warns about read-only arrays, such as those of a memory map
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())


def to_numpy(value: torch.Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert to an array of the same shape; bfloat16 becomes float32, which represents it exactly."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu()
    return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())


def numpy_predictor(module: nn.Module, device: str = "cpu") -> Callable[..., Any]:
    """Create `predict`: NumPy inputs (called like the network) to NumPy outputs in the network's structure.

    Runs in eval mode without gradients; the module's modes are restored after each call. The module is
    moved to `device`. A tensor comes back as an array, a tuple or list as a tuple, a dict or ModelOutput as a
    dict without its None entries.

    >>> numpy_predictor(nn.ReLU())(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    module.to(device)

    def place(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = to_tensor(value)
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [place(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value

    def predict(*args: Any, **kwargs: Any) -> Any:
        with in_eval_mode(module), torch.no_grad():
            outputs = module(*place(args), **place(kwargs))
        leaves, structure = flatten_outputs(outputs)
        return unflatten_outputs([to_numpy(leaf) for leaf in leaves], structure)

    return predict
