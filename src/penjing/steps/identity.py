"""The identity of a setting as plain data: a run or a training is resumed only with the same settings.

It describes how an object was constructed, not the state it has accumulated: a hook that counts is the same hook. An
object that no rule here covers is identified by its type alone; one with settings can return them from `to_data()`.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.network.weights import fingerprint


def identity(value: Any) -> Any:
    """Return JSON-compatible plain data, equal for equal settings in every process.

    | value | its identity |
    |---|---|
    | numbers, words, None; lists, tuples, mappings, sets of them | itself |
    | an object with `to_data()` | its type and what that returns |
    | an instance of a frozen dataclass | its type and fields |
    | a function or a class | its module and name; without a name of its own also a hash of its code |
    | a network | its type and a hash of its weights |
    | a tensor or an array | its type and a hash of its values |
    | anything else | its type |

    >>> identity((1, len, {"path": PurePath("a")}))
    [1, 'builtins.len', {'path': 'a'}]
    """
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, np.generic):
        return identity(value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, bytes | complex):
        return repr(value)
    if isinstance(value, list | tuple):
        return [identity(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((identity(one) for one in value), key=_text)
    if isinstance(value, Mapping):
        return {str(key): identity(one) for key, one in value.items()}
    if isinstance(value, functools.partial):
        return {"functools.partial": identity((value.func, value.args, value.keywords))}
    if isinstance(value, type | ModuleType) or inspect.isroutine(value):
        return _of_function(value)
    return _of_object(value)


def _of_object(value: Any) -> Any:
    kind = _name(type(value))
    if callable(getattr(value, "to_data", None)):
        return {kind: identity(value.to_data())}
    if dataclasses.is_dataclass(value) and getattr(type(value), "__dataclass_params__").frozen:  # noqa: B009
        return {kind: {f.name: identity(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}}
    if isinstance(value, nn.Module):
        return {kind: fingerprint(value)}
    if isinstance(value, torch.Tensor):
        holder = nn.Module()
        holder.register_buffer("value", value.detach())
        return {kind: fingerprint(holder)}
    if isinstance(value, np.ndarray):
        return {kind: _hash(f"{value.dtype}{value.shape}", value.tobytes().hex())}
    return kind


def _of_function(value: Any) -> Any:
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, FunctionType) or (function.__closure__ is None and "<" not in function.__qualname__):
        name = _name(value)
    else:
        name = f"{_name(function)} {_hash(_behaviour(function, ()))[:16]}"
    owner = getattr(value, "__self__", None)  # of a method
    if owner is None or isinstance(owner, type | ModuleType):
        return name
    return {name: _of_object(owner)}


def _behaviour(function: FunctionType, outer: tuple[CodeType, ...]) -> Any:
    """The behaviour of a function: its code, its defaults, and captured values that it does not modify itself."""
    code = function.__code__
    if code in outer:
        return "itself"
    changed = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    cells = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = "changed" if name in changed else _held(cell.cell_contents, (*outer, code))
        except ValueError:  # not assigned yet
            cells[name] = "empty"
    defaults = [_held(one, (*outer, code)) for one in function.__defaults__ or ()]
    named = {name: _held(one, (*outer, code)) for name, one in (function.__kwdefaults__ or {}).items()}
    return [_of_code(code), cells, defaults, named]


def _held(value: Any, outer: tuple[CodeType, ...]) -> Any:
    """The identity of a captured value: one that can change during calls is identified by its type."""
    if isinstance(value, FunctionType):
        return [_name(value), _behaviour(value, outer)] if "<" in value.__qualname__ else _name(value)
    if isinstance(value, tuple):
        return [_held(one, outer) for one in value]
    if isinstance(value, list | set | Mapping | nn.Module | torch.Tensor | np.ndarray):
        return _name(type(value))
    return identity(value)


def _of_code(code: CodeType) -> Any:
    constants = [
        _of_code(one) if isinstance(one, CodeType) else [type(one).__name__, repr(identity(one))]
        for one in code.co_consts
    ]
    return [code.co_code.hex(), constants, code.co_names, code.co_freevars]


def _name(value: Any) -> str:
    """The qualified name of a function, a class or a module."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if module else str(name)


def _text(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True)


def _hash(*plain: Any) -> str:
    return hashlib.sha256(_text(plain).encode()).hexdigest()
