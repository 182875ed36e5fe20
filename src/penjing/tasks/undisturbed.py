"""Preserving the user's state: buffers and attributes of a module that is run, and settings of the process."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from penjing.allocator import reused_memory
from penjing.randomness import preserve_rng_state

_CONTAINERS = (list, dict, set, deque)
_KNOWN = frozenset(vars(nn.Module()))  # torch's own hooks and flags
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


class ModuleState:
    """A snapshot of the buffers, plain attributes and hooks of a module, to compare with and restore later.

    Parameters are not copied, because a forward normally does not change them; one that does is detected and named.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take a snapshot of `module`; its buffers and tensors are copied."""
        parts = [] if _unfinished(module) else list(module.named_modules())
        self._parts = [
            (name, part, _attributes(part), dict(part._buffers))
            for name, part in parts
            if not isinstance(part, torch.jit.ScriptModule)
        ]
        # A forward that installs hooks once, as transformers does, keeps a flag of it: both go back, or neither.
        self._hooks = [(part, {name: dict(vars(part)[name]) for name in _HOOKS}) for _, part, _, _ in self._parts]
        self._contents: dict[int, tuple[Any, Any]] = {}
        for _, _, attributes, buffers in self._parts:
            for value in (*attributes.values(), *buffers.values()):
                if isinstance(value, torch.Tensor):
                    self._contents[id(value)] = (value, value.detach().clone())
                elif isinstance(value, _CONTAINERS):
                    self._contents[id(value)] = (value, copy.copy(value))
        self._versions = [(name, p, _version(p)) for name, p in module.named_parameters() if parts]

    def changed(self) -> list[str]:
        """Return the names of the buffers, attributes and parameters that have changed."""
        names = []
        for prefix, part, attributes, buffers in self._parts:
            for before, now in ((buffers, part._buffers), (attributes, _attributes(part))):
                for key in {**before, **now}:
                    if key not in before or key not in now or not self._same(before[key], now[key]):
                        names.append(f"{prefix}.{key}" if prefix else key)
        return names + [name for name, p, version in self._versions if _version(p) != version]

    def restore(self) -> None:
        """Restore buffers, attributes and hooks: the same objects, with the same contents."""
        for part, hooks in self._hooks:
            for name, before in hooks.items():
                now = vars(part)[name]
                if now.keys() != before.keys():
                    now.clear()
                    now.update(before)
        for _, part, attributes, buffers in self._parts:
            now = _attributes(part)
            for key in now:
                if key not in attributes:
                    del part.__dict__[key]
            part.__dict__.update({k: v for k, v in attributes.items() if k not in now or now[k] is not v})
            for key in [k for k in part._buffers if k not in buffers]:
                del part._buffers[key]
            part._buffers.update(buffers)
        for value, before in self._contents.values():
            if self._same(value, value):
                continue
            if isinstance(value, torch.Tensor):
                with torch.no_grad():
                    value.data = before
            elif isinstance(value, list | deque):
                value.clear()
                value.extend(before)
            else:
                value.clear()
                value.update(before)

    def _same(self, before: Any, now: Any) -> bool:
        """Whether an attribute is still the same object with the same contents."""
        _, contents = self._contents.get(id(before), (None, before))
        if isinstance(now, torch.Tensor) and isinstance(contents, torch.Tensor):
            return bool(
                now.shape == contents.shape
                and now.dtype == contents.dtype
                and now.device == contents.device
                and (now.is_meta or torch.equal(now.nan_to_num(), contents.nan_to_num()))
            )
        if isinstance(contents, dict) and isinstance(now, dict):
            return contents.keys() == now.keys() and all(contents[k] is now[k] for k in contents)
        if isinstance(contents, list | deque) and isinstance(now, list | deque):
            return len(contents) == len(now) and all(a is b for a, b in zip(contents, now, strict=True))
        return contents is now or (type(contents) is type(now) and _equal(contents, now))


def _unfinished(module: nn.Module) -> bool:
    """Whether some of its tensors are created by its first forward, which must not be undone."""
    return any(is_lazy(t) for t in [*module.parameters(), *module.buffers()])


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(part).items() if key not in _KNOWN}


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _equal(before: Any, now: Any) -> bool:
    try:
        return bool(before == now)
    except Exception:  # arrays and others compare elementwise
        return False


@contextlib.contextmanager
def same_state(module: nn.Module) -> Iterator[ModuleState]:
    """Restore the module's buffers and plain attributes after the block."""
    state = ModuleState(module)
    try:
        yield state
    finally:
        state.restore()


@contextlib.contextmanager
def same_process() -> Iterator[None]:
    """Restore torch's threads and grad mode, the global generators and the warning filters after the block.

    Inside it, freed memory is kept for the next tensors.
    """
    threads, gradients, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    with warnings.catch_warnings(), preserve_rng_state(), reused_memory():
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
