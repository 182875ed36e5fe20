"""One batch for several workers: each input is cut along the axis that its samples lie in."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from penjing.errors import TaskError
from penjing.network.exporting import input_names
from penjing.tasks.calibration import Dynamic
from penjing.tasks.call import Call, leaves
from penjing.tasks.sample_axes import along_samples, axes_of


def by_argument(dynamic: Dynamic, network: nn.Module, call: Call) -> Dynamic:
    """The axes that vary, by position or keyword of a call: `Task.dynamic` may name positional inputs.

    Raises:
        TaskError: The call does not fit the network.
    """
    if dynamic is None:
        return None
    args, kwargs = call
    keys = [*range(len(args)), *kwargs]
    named = zip(keys, input_names(network, args, kwargs), strict=True)
    return {key: dynamic.get(name, dynamic.get(i, {})) for i, (key, name) in enumerate(named)}


def part(call: Call, target: Any, dynamic: Dynamic, rank: int, size: int) -> tuple[Call, Any, float]:
    """A worker's samples of a batch, and their fraction of the batch; it may have none.

    Args:
        call: The inputs; what holds no samples, such as a mask (length, length), is every worker's whole.
        target: Its first axis are the samples.
        dynamic: Axes of the inputs that vary (see `Task.dynamic`), which tell where the samples lie.
        rank: Number of the worker.
        size: How many workers there are.

    Raises:
        TaskError: The samples can't be counted, or can't be cut.
    """
    if dynamic is not None and not any(0 in axes for axes in dynamic.values()):
        dynamic = None  # where every size is fixed, nothing is said of the samples
    samples = _samples(call, target, dynamic)
    start, end = (samples * i // size for i in (rank, rank + 1))
    mine = along_samples(call, dynamic, lambda value, axis: value.narrow(axis, start, end - start))
    targets = pytree.tree_map(lambda x: x[start:end] if _has_axes(x) else x, target)
    return mine, targets, (end - start) / samples


def _has_axes(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0


def _samples(call: Call, target: Any, dynamic: Dynamic) -> int:
    """The number of samples of a batch.

    Raises:
        TaskError: It can't be cut: there are several numbers, or something may hold samples that nobody finds.
    """
    placed = list(zip((leaf for _, _, leaf in leaves(call)), axes_of(call, dynamic), strict=True))
    lengths = {len(x) for x in pytree.tree_leaves(target) if _has_axes(x)}
    lengths |= {int(x.shape[axis]) for x, axis in placed if axis is not None}
    whole = [tuple(x.shape) for x, axis in placed if axis is None and _has_axes(x)]
    if len(lengths) != 1:
        raise _unshareable(f"arrays of {', '.join(map(str, sorted(lengths))) or 'no'} samples", "")
    if whole and dynamic is None:
        raise _unshareable(
            f"an input of shape {whole[0]} in a batch of {min(lengths)}, and nothing that says where its samples lie",
            "say it in Task.dynamic, for example {'state': {1: 'batch'}}; an input that it leaves out holds none",
        )
    if len(pytree.tree_leaves(call)) > len(placed):
        raise _unshareable("an input of a class of its own", "give tensors, in tuples and dicts")
    (samples,) = lengths
    entries = pytree.tree_leaves((call, target), is_leaf=lambda x: isinstance(x, list) and len(x) == samples)
    if any(isinstance(x, list) and not any(hasattr(y, "shape") for y in pytree.tree_leaves(x)) for x in entries):
        raise _unshareable(f"a list of {samples}, an entry a sample", "make it a tensor")
    if not samples:
        raise TaskError(
            "the training data has a batch without samples", code="no-sample", got="(0, …)", expected="(samples, …)"
        )
    return samples


def _unshareable(got: str, remedy: str) -> TaskError:
    return TaskError(
        "a batch can't be shared by several workers",
        code="unshareable",
        got=got,
        expected="inputs whose samples lie as Task.dynamic says, else in their first axis, as those of targets do",
        remedy=f"{remedy}, or train with workers=1" if remedy else "train with workers=1",
    )


__all__ = ["by_argument", "part"]
