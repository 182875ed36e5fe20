"""What belongs to the user stays as it was: the state of a module that is run, and the settings of the process."""

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

from penjing.randomness import preserve_rng_state

_CONTAINERS = (list, dict, set, deque)
_KNOWN = frozenset(vars(nn.Module()))  # hooks and flags of torch's own


class ModuleState:
    """The buffers and plain attributes of a module, to be compared with later and put back.

    Parameters are not copied, for no forward of a network in use changes them: one that does is seen, and named.
    """

    def __init__(self, module: nn.Module) -> None:
        """Look at `module`; what it holds of buffers and tensors is copied."""
        parts = [] if _unfinished(module) else list(module.named_modules())
        self._parts = [
            (name, part, _attributes(part), dict(part._buffers))
            for name, part in parts
            if not isinstance(part, torch.jit.ScriptModule)
        ]
        self._contents: dict[int, tuple[Any, Any]] = {}
        for _, _, attributes, buffers in self._parts:
            for value in (*attributes.values(), *buffers.values()):
                if isinstance(value, torch.Tensor):
                    self._contents[id(value)] = (value, value.detach().clone())
                elif isinstance(value, _CONTAINERS):
                    self._contents[id(value)] = (value, copy.copy(value))
        self._versions = [(name, p, _version(p)) for name, p in module.named_parameters() if parts]

    def changed(self) -> list[str]:
        """Names of the buffers, attributes and parameters that are not what they were."""
        names = []
        for prefix, part, attributes, buffers in self._parts:
            for before, now in ((buffers, part._buffers), (attributes, _attributes(part))):
                for key in {**before, **now}:
                    if key not in before or key not in now or not self._same(before[key], now[key]):
                        names.append(f"{prefix}.{key}" if prefix else key)
        return names + [name for name, p, version in self._versions if _version(p) != version]

    def restore(self) -> None:
        """Put buffers and attributes back: the same objects, with the same contents."""
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
        """Whether an attribute is still the object that it was, with the contents that it had."""
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
    """Whether its first forward has to make some of its tensors, which nobody wants to be taken back."""
    return any(is_lazy(t) for t in [*module.parameters(), *module.buffers()])


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(part).items() if key not in _KNOWN}


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _equal(before: Any, now: Any) -> bool:
    try:
        return bool(before == now)
    except Exception:  # arrays and others have no one answer
        return False


@contextlib.contextmanager
def same_state(module: nn.Module) -> Iterator[ModuleState]:
    """The module's buffers and plain attributes after the block are what they were before it."""
    state = ModuleState(module)
    try:
        yield state
    finally:
        state.restore()


@contextlib.contextmanager
def same_process() -> Iterator[None]:
    """Torch's threads and grad mode, the global generators and the filters of warnings stand as they did before."""
    threads, gradients, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    with warnings.catch_warnings(), preserve_rng_state():
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
