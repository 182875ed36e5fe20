"""Where a plan's quantization noise comes from: every operator quantized alone, weights and inputs separately.

The noise is measured at the network's outputs, as a signal-to-noise ratio in decibels. Only the operators that depend
on the quantized one are recomputed.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.lockstep import apply, mean_difference, rounded, shifted
from penjing.errors import TaskError
from penjing.network.graph import OUTPUT, compute, flat_inputs, is_tensor, sites
from penjing.steps.plan import Entry, Plan
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Call


@dataclass(frozen=True)
class Noise:
    """Noise power over signal power at the outputs when one operator alone is quantized.

    Attributes:
        weights: From its weights; 0 where they are not quantized.
        activations: From its inputs.
    """

    weights: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Of both: the two are nearly uncorrelated, so their powers add up."""
        return self.weights + self.activations


def decibels(ratio: float) -> float:
    """Noise over signal as a signal-to-noise ratio in dB; infinite where there is no noise."""
    return -10 * math.log10(ratio) if ratio > 0 else math.inf


def signal_to_noise(reference: nn.Module, network: nn.Module, calls: Iterable[Call]) -> float:
    """Signal-to-noise ratio of a network's outputs against another's, in dB, over all calls."""
    signal = noise = 0.0
    with torch.no_grad():
        for args, kwargs in calls:
            reference_outputs, outputs = reference(*args, **kwargs), network(*args, **kwargs)
            signal += _power(reference_outputs)
            noise += _power(_difference(outputs, reference_outputs))
    return decibels(noise / signal) if signal else -math.inf


def agreement(reference: nn.Module, network: nn.Module, calls: Iterable[Call]) -> float:
    """Fraction of the rows of the first output with the same argmax.

    Raises:
        TaskError: The last axis of the first output has one entry, so that every network would agree.
    """
    same = total = 0
    with torch.no_grad():
        for args, kwargs in calls:
            reference_output, output = (flatten_outputs(n(*args, **kwargs))[0][0] for n in (reference, network))
            if reference_output.dim() < 2 or reference_output.shape[-1] < 2:
                raise TaskError(
                    "agreement needs classes",
                    code="no-classes",
                    got=f"a first output of the shape {tuple(reference_output.shape)}",
                    expected="two or more values along its last axis, of which the largest is the class",
                    remedy="limit the noise instead, or the drop of a metric",
                )
            same += int((reference_output.argmax(-1) == output.argmax(-1)).sum())
            total += reference_output.numel() // reference_output.shape[-1]
    return same / max(1, total)


def isolated(
    network: fx.GraphModule,
    plan: Plan,
    calls: Iterable[Call],
    progress: Callable[[int, int], None] | None = None,
    repaired: fx.GraphModule | None = None,
) -> dict[str, Noise]:
    """The noise of every operator of the plan, by its site.

    Args:
        network: A captured network in eval mode, in floating point.
        plan: The quantization plan.
        calls: Chunks of samples; all activations of one chunk are held at a time.
        progress: Called with the number of operators done and the total.
        repaired: The same network with weights that a repair has rounded to their grids; their mean error, which bias
            correction removes, is left out. None rounds the network's own weights to the nearest.
    """
    names = sorted({edge.rpartition(":")[0] for edge in plan.entries} - {OUTPUT})
    nodes = sites(network)
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    names.sort(key=lambda name: order[nodes[name]])
    power = {name: [0.0, 0.0] for name in names}
    signal = 0.0
    chunks = list(calls)
    with torch.no_grad():
        for number, call in enumerate(chunks):
            once = _Once(network, call)
            signal += _power(once.output)
            for position, name in enumerate(names):
                for role, value in enumerate(_alone(once, nodes[name], name, plan, repaired)):
                    if value is not None:
                        power[name][role] += _power(_difference(once.rerun(nodes[name], value), once.output))
                if progress is not None:
                    progress(number * len(names) + position + 1, len(chunks) * len(names))
    signal = max(signal, 1e-30)
    return {name: Noise(weights / signal, inputs / signal) for name, (weights, inputs) in power.items()}


def in_bfloat16(network: fx.GraphModule, names: Iterable[str], calls: Iterable[Call]) -> dict[str, float]:
    """Noise power over signal power at the outputs when one operator alone reads bfloat16, by its site.

    Inputs and weights are rounded to bfloat16; products are accumulated in float32, as processors do.

    Args:
        network: A captured network in eval mode, in floating point.
        names: Sites.
        calls: Chunks of samples.
    """
    return _alone_each(network, names, calls, lambda once, name, node: _halved(once, node))


def of_weights(network: fx.GraphModule, weights: Mapping[str, torch.Tensor], calls: Iterable[Call]) -> dict[str, float]:
    """Noise power over signal power at the outputs when one layer alone has another weight, by its name.

    Args:
        network: A captured network in eval mode.
        weights: Convolution or linear layer that is called once → a weight of the same shape.
        calls: Chunks of samples; all activations of one chunk are held at a time.
    """

    def changed(once: _Once, name: str, node: fx.Node) -> torch.Tensor:
        module, producer = network.get_submodule(name), node.args[0]
        assert isinstance(producer, fx.Node)
        return apply(module, once.values[producer], weights[name], getattr(module, "bias", None))

    return _alone_each(network, weights, calls, changed)


def _alone_each(
    network: fx.GraphModule, names: Iterable[str], calls: Iterable[Call], value: Callable[[_Once, str, fx.Node], Any]
) -> dict[str, float]:
    """Noise power over signal power at the outputs when one operator alone gives another value, by its site."""
    nodes = sites(network)
    power = dict.fromkeys(names, 0.0)
    signal = 0.0
    with torch.no_grad():
        for call in calls:
            once = _Once(network, call)
            signal += _power(once.output)
            for name in power:
                outputs = once.rerun(nodes[name], value(once, name, nodes[name]))
                power[name] += _power(_difference(outputs, once.output))
    signal = max(signal, 1e-30)
    return {name: noise / signal for name, noise in power.items()}


def in_columns(network: fx.GraphModule, entries: Mapping[str, Entry], calls: Iterable[Call]) -> dict[str, float]:
    """Signal-to-noise ratio of the worst column of any output when one value alone is rounded, in dB, by its node.

    Columns lie along axis 1 and along the last axis; one that is always 0 is left out, as are integer outputs.

    Args:
        network: A captured network in eval mode, in floating point.
        entries: Name of a node → the grid that its values are rounded to.
        calls: Chunks of samples.
    """
    nodes = [node for node in network.graph.nodes if node.name in entries]
    signals: dict[tuple[int, int], torch.Tensor] = {}
    noises: dict[tuple[str, int, int], torch.Tensor] = {}
    with torch.no_grad():
        for call in calls:
            once = _Once(network, call)
            floats = [t.is_floating_point() for t in flatten_outputs(once.output)[0]]
            _add_columns(signals, (), [t for t, f in zip(flatten_outputs(once.output)[0], floats, strict=True) if f])
            for node in nodes:
                outputs = once.rerun(node, rounded(once.values[node], entries[node.name]))
                _add_columns(noises, (node.name,), _difference(outputs, once.output))
    worst = {}
    for node in nodes:
        ratios = [
            float((noises[node.name, *key][signal > 0] / signal[signal > 0]).max())
            for key, signal in signals.items()
            if bool((signal > 0).any()) and noises[node.name, *key].shape == signal.shape
        ]
        worst[node.name] = decibels(max(ratios, default=0.0))
    return worst


def _add_columns(sums: dict[Any, torch.Tensor], name: tuple[str, ...], values: Iterable[torch.Tensor]) -> None:
    """Add the sums of squares of the columns of every tensor; those of an axis that varies are dropped."""
    for port, value in enumerate(values):
        for axis in {1, value.dim() - 1} if value.dim() > 1 else ():
            square = torch.where(value.isfinite(), value, 0).double().square()
            total = square.sum([a for a in range(value.dim()) if a != axis])
            before = sums.get((*name, port, axis), torch.zeros_like(total))
            sums[(*name, port, axis)] = before + total if before.shape == total.shape else total.new_zeros(0)


def _halved(once: _Once, node: fx.Node) -> Any:
    def half(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.bfloat16().float() if floats else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: half(once.values[n]))
    if node.op != "call_module":
        return compute(once.network, node, args, kwargs)
    module = once.network.get_submodule(str(node.target))
    weights = {name: half(tensor) for name, tensor in module.named_parameters()}
    return torch.func.functional_call(module, weights, args, kwargs)


def clipped(x: torch.Tensor, entry: Entry) -> float:
    """Fraction of the values of x that lie outside the range of `entry` by more than half a step."""
    low, high = entry.spec.limits
    scale, zero = entry.scale[0], entry.zero_point[0]
    outside = (x < (low - zero - 0.5) * scale) | (x > (high - zero + 0.5) * scale)
    return float(outside.double().mean())


class _Once:
    """One forward pass of the network, with every activation stored."""

    def __init__(self, network: fx.GraphModule, call: Call) -> None:
        self.network = network
        self.values: dict[fx.Node, Any] = {}
        inputs = iter(flat_inputs(network, call))
        for node in network.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(inputs)
            elif node.op == "output":
                self.end = node
            else:
                self.values[node] = self.compute(node, self.values)
        self.output = fx.node.map_arg(self.end.args[0], lambda n: self.values[n])

    def compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        return compute(self.network, node, *fx.node.map_arg((node.args, node.kwargs), lambda n: values[n]))

    def rerun(self, changed: fx.Node, value: Any) -> Any:
        """The network's outputs when the node `changed` has this value."""
        fresh: dict[fx.Node, Any] = {changed: value}
        node = changed.next
        while node.op != "output":
            if any(read in fresh for read in node.all_input_nodes):
                fresh[node] = self.compute(node, ChainMap(fresh, self.values))
            node = node.next
        return fx.node.map_arg(node.args[0], lambda n: fresh.get(n, self.values[n]))


def _alone(once: _Once, node: fx.Node, name: str, plan: Plan, repaired: fx.GraphModule | None) -> tuple[Any, Any]:
    """The operator's output with quantized weights, and with quantized inputs; None where the plan has no entry."""
    weights = inputs = None
    entry = plan.entries.get(f"{name}:weight")
    if entry is not None:
        module: Any = once.network.get_submodule(str(node.target))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        theirs: Any = repaired.get_submodule(str(node.target)) if repaired is not None else module
        weights = apply(module, once.values[source], rounded(theirs.weight, entry), getattr(module, "bias", None))
        if repaired is not None and not isinstance(module, nn.Embedding):
            axis = -1 if isinstance(module, nn.Linear) else 1
            weights = shifted([weights], mean_difference([once.values[node]], [weights], axis), axis)[0]
    port, changed = -1, False

    def value(n: fx.Node) -> Any:
        nonlocal port, changed
        port += is_tensor(n)
        entry = plan.entries.get(f"{name}:in{port}") if is_tensor(n) else None
        changed = changed or entry is not None
        return once.values[n] if entry is None else rounded(once.values[n], entry)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if changed:
        inputs = compute(once.network, node, args, kwargs)
    return weights, inputs


def energy(values: torch.Tensor) -> float:
    """Sum of squares over the finite values: scores masked with −inf in both networks are left out."""
    return float(torch.where(values.isfinite(), values, 0).double().square().sum())


def _power(output: Any) -> float:
    return sum(energy(t) for t in flatten_outputs(output)[0] if t.is_floating_point())


def _difference(outputs: Any, references: Any) -> list[torch.Tensor]:
    pairs = zip(flatten_outputs(outputs)[0], flatten_outputs(references)[0], strict=True)
    return [a - b for a, b in pairs if a.is_floating_point()]
