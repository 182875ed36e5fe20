"""Names, types and sizes of what an artifact of ncnn takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from penjing.records.manifest import Port
from penjing.runtimes.single_sample import alike, together
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.sample_axes import along_samples

BATCH = "batch"


def resized(call: Any, dynamic: Any, samples: int) -> Any:
    """A call with so many samples: the first ones, repeated where there are fewer."""

    def resize(value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.index_select(axis, torch.arange(samples) % value.shape[axis])

    return along_samples(call, dynamic, resize)


def ports(
    network: Any, call: Any, dynamic: Any, words: list[str], inputs: list[str], outputs: list[str]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The ports of a network: axes that differ between calls of two and three samples are called as the batch.

    Args:
        network: A captured network.
        call: Example inputs.
        dynamic: See `Task.dynamic`.
        words: Names of the inputs in the network's forward.
        inputs: Names of the inputs in the artifact.
        outputs: Names of the outputs in the artifact.

    Raises:
        ExportError: The samples of a batch affect each other: ncnn is called for one after the other.
    """
    answers = []
    with torch.no_grad():
        for samples in (2, 3):
            args, kwargs = resized(call, dynamic, samples)
            answers.append(([*args, *kwargs.values()], flatten_outputs(network(*args, **kwargs))[0]))
    (few, given), (more, again) = answers
    for number, (a, b) in enumerate(zip(given, again, strict=True)):
        axis = next((i for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m), None)
        first = b if axis is None else b.narrow(axis, 0, min(a.shape[axis], b.shape[axis]))
        if first.shape != a.shape or not alike(a, first):
            raise together("ncnn", number)
    batch = _batch_name(dynamic)
    declared = [_declared(dynamic, word, i) for i, word in enumerate(words)]
    taken = tuple(_port(n, a, b, batch, axes) for n, a, b, axes in zip(inputs, few, more, declared, strict=True))
    return taken, tuple(_port(n, a, b, batch, {}) for n, a, b in zip(outputs, given, again, strict=True))


def _batch_name(dynamic: Any) -> str:
    for axes in (dynamic or {}).values():
        if 0 in axes:
            return str(axes[0])
    return BATCH


def _declared(dynamic: Any, name: str, position: int) -> Any:
    return {} if dynamic is None else dynamic.get(name, dynamic.get(position, {}))


def _port(name: str, one: torch.Tensor, other: torch.Tensor, batch: str, axes: Any) -> Port:
    sizes = zip(one.shape, other.shape, strict=True)
    shape = tuple(axes.get(i, batch if a != b else a) for i, (a, b) in enumerate(sizes))
    return Port(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape)


def shapes(call: Any, dynamic: Any, words: list[str]) -> list[list[str]]:
    """Options of pnnx that say which sizes its inputs have, the best first.

    Where axes other than the batch vary, a second set of sizes tells it so: twice those of the example, or else half
    of them, for a table may not reach further; without, it takes them for constants.
    """
    batch, axes = _batch_name(dynamic), [_declared(dynamic, word, i) for i, word in enumerate(words)]
    values = [*call[0], *call[1].values()]
    once = f"inputshape={_sizes(values, axes, batch, lambda size: size)}"
    if all(name == batch for varying in axes for name in varying.values()):
        return [[once]]
    twice, half = (_sizes(values, axes, batch, other) for other in (lambda size: 2 * size, lambda size: size // 2))
    return [[once, f"inputshape2={twice}"], [once, f"inputshape2={half}"], [once]]


def _sizes(values: list[torch.Tensor], axes: list[Any], batch: str, other: Callable[[int], int]) -> str:
    """Sizes and types as pnnx reads them: ``[1,3,8,8]f32,[1,4]i64``."""
    parts = []
    for value, varying in zip(values, axes, strict=True):
        sizes = [other(n) if varying.get(i, batch) != batch else n for i, n in enumerate(value.shape)]
        parts.append(f"[{','.join(map(str, sizes))}]{_TYPES.get(value.dtype, 'f32')}")
    return ",".join(parts)


_TYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
