"""Where the samples of a call lie: in axis 0 of most inputs, in axis 1 of the states of recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from penjing.tasks.calibration import Dynamic
from penjing.tasks.call import Call, leaves, map_leaves


def size_of(call: Call) -> int:
    """The number of samples in a call: the first axis of its first tensor; 1 where no tensor has an axis."""
    tensors = (leaf for _, _, leaf in leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((int(t.shape[0]) for t in tensors), 1)


def along_samples(call: Call, dynamic: Dynamic, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Call:
    """The call with every tensor that holds samples changed along their axis.

    Args:
        call: The first tensor that has its samples in axis 0 tells how many there are: where `dynamic` says nothing,
            the first one.
        dynamic: Axes that vary (see `Task.dynamic`): an axis of the name of that axis holds the samples, and an input
            of whose axes none varies holds none. Without, an axis 0 of the same size does, or an axis 1 of it in a
            state of recurrent layers, (layers, batch, hidden).
        change: Called with a tensor and the axis.
    """
    axes = axes_of(call, dynamic)

    def changed(value: Any) -> Any:
        axis = next(axes)
        return value if axis is None else change(value, axis)

    return tuple(map_leaves(changed, arg) for arg in call[0]), {k: map_leaves(changed, v) for k, v in call[1].items()}


def axes_of(call: Call, dynamic: Dynamic) -> Iterator[int | None]:
    """The axis of the samples of each leaf of a call, as `along_samples` takes it; None where it holds none."""
    size, batch = size_of(call), None
    for key, _, value in leaves(call):
        declared = _declared(dynamic, key, call)
        if declared is not None and 0 in declared and isinstance(value, torch.Tensor) and value.dim():
            size, batch = int(value.shape[0]), declared[0]  # a state that comes before has its samples elsewhere
            break
    for key, _, value in leaves(call):
        if not isinstance(value, torch.Tensor) or not value.dim():
            yield None
            continue
        declared = _declared(dynamic, key, call)
        if declared is None:
            yield _by_size(value, size)
        else:
            named = [axis for axis, name in declared.items() if name == batch and axis < value.dim()]
            yield named[0] if named else 0 if 0 in declared and value.shape[0] == size else None


def _declared(dynamic: Dynamic, key: str | int, call: Call) -> Mapping[int, str] | None:
    """The axes of an input that vary; None where that is not said."""
    if dynamic is None or key in dynamic:
        return None if dynamic is None else dynamic[key]
    args, kwargs = call
    if isinstance(key, str):
        return dynamic.get(len(args) + list(kwargs).index(key), {})
    # A positional input may be named by the forward's parameter, which is not known here.
    return None if any(isinstance(name, str) and name not in kwargs for name in dynamic) else {}


def _by_size(value: torch.Tensor, size: int) -> int | None:
    if value.shape[0] == size:
        return 0
    return 1 if value.dim() == 3 and value.shape[1] == size else None
