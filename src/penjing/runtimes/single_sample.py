"""A network as an exported program for one sample, for runtimes whose files have fixed sizes.

The artifact is called sample by sample; the number of samples stays an axis without a size in its manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from penjing.errors import ExportError
from penjing.network.exporting import export, input_names, port_names, with_plain_outputs
from penjing.records.manifest import Port
from penjing.tasks.outputs import flatten_outputs

_ROUNDING = 0.01  # of the power of an output; a network below it is judged by the parity of its artifact


def exported(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: Mapping[str | int, Mapping[int, str]] | None,
    outputs: list[str],
    runtime: str,
    prepare: Callable[[fx.GraphModule], fx.GraphModule] = lambda network: network,
    types: Mapping[str, str] | None = None,
) -> tuple[ExportedProgram, tuple[Port, ...], tuple[Port, ...]]:
    """The program of one sample, and the ports of inputs and outputs.

    Args:
        network: A frozen network.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        outputs: Names of the flat outputs.
        runtime: What the runtime is called in errors.
        prepare: What is done to a network before it is exported.
        types: Type → the type that the runtime has in its place, of ports.

    Returns:
        The program, and ports in which the axis of the samples has its name in the place of its size.

    Raises:
        ExportError: More than the number of samples varies, or the samples of a batch affect each other.
    """
    inputs = input_names(network, *call)
    given, answers, single = ports(network, call, dynamic, *port_names(network, inputs, outputs), runtime, types)
    program = export(with_plain_outputs(prepare(network)), single, {})
    for node in program.graph.nodes:  # addresses in this process's memory, and paths of this machine
        node.meta.pop("from_node", None)
        node.meta.pop("stack_trace", None)
    return program, given, answers


def ports(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: Mapping[str | int, Mapping[int, str]] | None,
    inputs: Sequence[str],
    outputs: Sequence[str],
    runtime: str,
    types: Mapping[str, str] | None = None,
) -> tuple[tuple[Port, ...], tuple[Port, ...], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The ports of inputs and outputs, as `exported` gives them, and the first sample of the call.

    Args:
        network: A frozen network.
        call: Example inputs (args, kwargs).
        dynamic: See `Task.dynamic`.
        inputs: Names of the inputs in the artifact.
        outputs: Names of the outputs in the artifact.
        runtime: What the runtime is called in errors.
        types: Type → the type that the runtime has in its place.

    Raises:
        ExportError: More than the number of samples varies, or the samples of a batch affect each other.
    """
    axes = _sample_axes(input_names(network, *call), dynamic, runtime)
    single = _slice(call, axes, 0)
    with torch.no_grad():
        alone, _ = flatten_outputs(network(*single[0], **single[1]))
    varies = any(axis is not None for axis, _ in axes)
    places = _output_axes(network, call, axes, alone, runtime) if varies else [None] * len(alone)
    word = next((name for axis, name in axes if axis is not None), "batch")
    values, types = [*single[0], *single[1].values()], types or {}
    return (
        tuple(_port(n, v, axis, word, types) for n, v, (axis, _) in zip(inputs, values, axes, strict=True)),
        tuple(_port(n or "output", v, axis, word, types) for n, v, axis in zip(outputs, alone, places, strict=True)),
        single,
    )


def _sample_axes(
    names: list[str], dynamic: Mapping[str | int, Mapping[int, str]] | None, runtime: str
) -> list[tuple[Any, str]]:
    """The axis of each input that holds its samples, or None, and its name."""
    if dynamic is None:
        return [(0, "batch")] * len(names)
    varying = [dynamic.get(name, dynamic.get(i, {})) for i, name in enumerate(names)]
    words = list(dict.fromkeys(word for axes in varying for word in axes.values()))
    if len(words) > 1 or any(len(axes) > 1 for axes in varying):
        raise ExportError(
            f"{runtime} runs a network with the sizes that it was converted for",
            code="varying-sizes",
            got=f"inputs whose axes {', '.join(words)} vary",
            expected="inputs of which the number of samples alone varies",
            remedy="fix the other sizes to the example's, Task(dynamic={'x': {0: 'batch'}}), and pad shorter inputs",
        )
    return [next(iter(axes.items()), (None, "")) for axes in varying]


def _slice(
    call: tuple[tuple[Any, ...], dict[str, Any]], axes: list[tuple[Any, str]], start: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One sample of the example inputs."""
    args, kwargs = call
    values = [
        value if axis is None else value.narrow(axis, min(start, value.shape[axis] - 1), 1).contiguous()
        for value, (axis, _) in zip([*args, *kwargs.values()], axes, strict=True)
    ]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _output_axes(
    network: fx.GraphModule,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    axes: list[tuple[Any, str]],
    alone: list[torch.Tensor],
    runtime: str,
) -> list[int | None]:
    """The axis of each output that holds its samples; None where it is the same for any number of samples."""

    def two(one: Any, other: Any, axis: Any) -> Any:
        return one if axis is None else torch.cat([one, other], axis)

    first, second = (_slice(call, axes, start) for start in (0, 1))
    leaves = [[*args, *kwargs.values()] for args, kwargs in (first, second)]
    values = [two(a, b, axis) for a, b, (axis, _) in zip(*leaves, axes, strict=True)]
    count = len(first[0])
    with torch.no_grad():
        pair, _ = flatten_outputs(network(*values[:count], **dict(zip(first[1], values[count:], strict=True))))
        other, _ = flatten_outputs(network(*second[0], **second[1]))
    places = []
    for number, (both, a, b) in enumerate(zip(pair, alone, other, strict=True)):
        longer = [i for i, (n, m) in enumerate(zip(both.shape, a.shape, strict=True)) if n != m]
        place = longer[0] if len(longer) == 1 and both.shape[longer[0]] == 2 * a.shape[longer[0]] else None
        expected = torch.cat([a, b], place) if place is not None else a
        if expected.shape != both.shape or not alike(expected, both) or (place is None and not alike(a, b)):
            raise together(runtime, number)
        places.append(place)
    return places


def together(runtime: str, number: int) -> ExportError:
    """The error of a network whose answer to a sample depends on the others of its batch; `number` is the output's."""
    return ExportError(
        f"{runtime} runs a network sample by sample, and the samples of a batch affect each other here",
        code="samples-together",
        got=f"output {number} of several samples differs from the outputs of each",
        expected="a network whose answer to a sample does not depend on the others of its batch",
        remedy="fix the batch, Task(dynamic={}), or choose another runtime",
    )


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs are equal but for what another order of sums does, with quantizers behind them."""
    if not a.is_floating_point():  # for example ranks, which nearly equal values swap
        return not a.numel() or bool((a != b).double().mean() <= 0.1)
    finite = torch.isfinite(a) & torch.isfinite(b)
    x, y = a[finite].double(), b[finite].double()
    return float((x - y).square().sum()) <= float(x.square().sum()) * _ROUNDING + 1e-12


def _port(name: str, value: torch.Tensor, axis: int | None, word: str, types: Mapping[str, str]) -> Port:
    dtype = str(value.dtype).removeprefix("torch.")
    shape = tuple(word if i == axis else size for i, size in enumerate(value.shape))
    return Port(name=name, dtype=types.get(dtype, dtype), shape=shape)
