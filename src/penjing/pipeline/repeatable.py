"""Repeatability: a network has to give the same outputs for the same inputs, in torch and once captured.

An artifact has no state between two calls, and a runtime's random numbers are not torch's. A network that draws some,
or remembers what it was shown, would come out as another network, whose figures are those of one draw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from penjing.errors import ExportError, SourceError
from penjing.modes import in_eval_mode
from penjing.network.capture import capture_network
from penjing.pipeline import evidence
from penjing.randomness import preserve_rng_state
from penjing.sources.source import Source, forward
from penjing.tasks.call import Call
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from penjing.tasks.undisturbed import ModuleState, same_state
from penjing.tasks.usercode import line_in

ANSWERS_DB = 60.0
"""Two answers to the same inputs agree to this, as a floating-point artifact has to agree with its source. Kernels
that add in another order differ by 1e-6 (120 dB); a noise that is meant to be one is far above 1e-3."""
HALF_DB = {torch.float16: 40.0, torch.bfloat16: 20.0}  # where the source itself rounds to 11 or 8 bits
SAMPLES = 8  # on which the captured network is compared with the module


def capture_repeatable(source: Source, task: Task) -> fx.GraphModule:
    """Raise a source that answers the same when it is asked twice, and check that the captured network answers alike.

    The source is run in eval mode as it was given; its buffers and attributes and the global generators are put back.

    Args:
        source: The user's network.
        task: Its example, and its calibration data where there are some.

    Raises:
        SourceError: It answers differently, and why as far as it can be told; it answers NaN; a weight is NaN.
        ExportError: It can't be exported, or what was exported answers otherwise than the network itself.
    """
    module = source.module
    if isinstance(module, ExportedProgram):
        module = module.module(check_guards=False)
    with same_state(module) as state, preserve_rng_state(), _plain_attention():
        _check_twice(source.name, module, task, state)
        network = capture_network(source.module, *task.call(), task.dynamic)
        _check_weights(network)
        state.restore()
        _check_captured(source.name, module, network, task)
    return network


def _check_twice(name: str, module: nn.Module, task: Task, state: ModuleState) -> None:
    call, _ = _inputs(task, 0)
    before = _generators()
    first = _answers(module, call, name)
    moved = {kind for kind, now in _generators().items() if now != before[kind]}
    second = _answers(module, call, name)
    changed = state.changed()
    place, decibels = _worst(first, second, ANSWERS_DB)
    if place is None:
        return
    drawn = _random_operators(module, call)
    causes = [f"{what} draws random numbers" for what in drawn]
    causes += [f"the forward draws random numbers from {kind}" for kind in sorted(moved - {"torch"})]
    causes += [f"the forward changes {what}" for what in changed]
    remedies = []
    if drawn or moved:
        remedies.append(
            "leave the random numbers out in eval mode (F.dropout(x, training=self.training)), or make them an input"
        )
    if changed:
        state_names = ", ".join(what.rpartition(".")[2] for what in changed[:3])
        remedies.append(f"make {state_names} an input and an output: forward(x, state) -> (y, state)")
    raise SourceError(
        f"{name} answers differently when it is asked twice, in eval mode and with the same inputs",
        code="unrepeatable",
        got=f"{place} differs by {decibels:.1f} dB; " + ("; ".join(causes[:5]) or "the cause was not found"),
        expected=f"the same answer twice ({ANSWERS_DB:.0f} dB): an artifact has no random numbers and no state",
        remedy="; ".join(remedies) or "look for random numbers, and for state that one call leaves to the next",
    )


def _check_captured(name: str, module: nn.Module, network: fx.GraphModule, task: Task) -> None:
    """The captured network agrees with itself and with the module, on another number of samples than the example."""
    call, genuine = _inputs(task, SAMPLES)
    expected = _answers(module, call, name)
    if genuine:
        _check_finite(expected, name)
    with same_state(network):
        first, second = (_answers(network, call, f"{name}, captured,") for _ in range(2))
    place, decibels = _worst(first, second, ANSWERS_DB)
    if place is not None:
        drawn = _random_operators(network, call)
        raise ExportError(
            f"{name} answers differently when it is asked twice, once it is exported",
            code="unrepeatable",
            got=f"{place} differs by {decibels:.1f} dB; " + ("; ".join(drawn) or "the cause was not found"),
            expected=f"the same answer twice ({ANSWERS_DB:.0f} dB)",
            remedy="leave random numbers out of the forward, or make them an input",
        )
    least = _least(module, call)
    place, decibels = _worst(expected, first, least)
    if place is not None:
        layer = _first_difference(module, network, call, least)
        where = f"; the first layer that differs is {layer}" if layer else ""
        raise ExportError(
            f"the exported {name} does not compute what the module computes",
            code="another-network",
            got=f"{place} differs by {decibels:.1f} dB{where}",
            expected=f"the module's own answers ({least:.0f} dB)",
            remedy="torch.export lost something: look at what the forward does before that layer, "
            "and write it with plain operators",
        )


def _inputs(task: Task, samples: int) -> tuple[Call, bool]:
    """Inputs to ask with, and whether they are of the user's own data.

    They come from the calibration data, or from the example where there is none (or where reading it once would use
    it up). An example of zeros says little, for dropout and state may leave zeros as they are: it is filled.
    """
    calibration = task.calibration
    if isinstance(calibration, Iterator):
        task, calibration = dataclasses.replace(task, calibration=None), None
    first = next((t for t in pytree.tree_leaves(task.call()) if isinstance(t, torch.Tensor) and t.dim()), None)
    if first is None:
        return task.call(), True
    call = evidence.one_call(task, samples or int(first.shape[0]))
    generator = torch.Generator().manual_seed(0)
    blank = calibration is None

    def fill(x: Any) -> Any:
        if not (isinstance(x, torch.Tensor) and x.is_floating_point() and not x.count_nonzero()):
            return x
        return torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)

    filled = pytree.tree_map(fill, call) if blank else call
    same = all(a is b for a, b in zip(pytree.tree_leaves(call), pytree.tree_leaves(filled), strict=True))
    return filled, same


def _answers(module: nn.Module, call: Call, name: str) -> list[torch.Tensor]:
    """All outputs for a copy of the inputs, which a forward may write into."""
    outputs = forward(module, pytree.tree_map_only(torch.Tensor, torch.clone, call), name)
    return [t.detach().clone() for t in flatten_outputs(outputs)[0]]


def _worst(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], least: float) -> tuple[str | None, float]:
    """The output that differs most, in words, where one is below `least` decibels; and its decibels."""
    if len(reference) != len(other):
        return f"the number of outputs ({len(reference)} and {len(other)})", -math.inf
    worst: tuple[str | None, float] = (None, math.inf)
    for i, (a, b) in enumerate(zip(reference, other, strict=True)):
        decibels = _decibels(a, b)
        if decibels < least and decibels < worst[1]:
            worst = (f"output {i}" if len(reference) > 1 else "the output", decibels)
    return worst


def _decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Signal to noise where both are finite; what is not has to stand at the same places."""
    if a.shape != b.shape:
        return -math.inf
    if not (a.is_floating_point() or a.is_complex()):
        return math.inf if torch.equal(a, b) else -math.inf
    kind = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(kind), b.to(kind)
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return -math.inf
    noise = float((x - y)[finite].abs().square().sum())
    signal = float(x[finite].abs().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _least(module: nn.Module, call: Call) -> float:
    """Decibels to which the captured network has to agree: fewer where the module computes in half precision."""
    tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(call)]
    kinds = {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    return min([ANSWERS_DB, *(db for kind, db in HALF_DB.items() if kind in kinds)])


def _check_weights(network: fx.GraphModule) -> None:
    """Raise SourceError where a weight that the network uses is NaN or infinite, or a buffer is NaN."""
    weights = {name: ~t.isfinite() for name, t in network.named_parameters() if t.is_floating_point()}
    buffers = {name: t.isnan() for name, t in network.named_buffers() if t.is_floating_point()}
    for name, bad in {**weights, **buffers}.items():
        if count := int(bad.sum()):
            raise SourceError(
                f"the weight {name} holds values that are not finite",
                code="weight-not-finite",
                got=f"{count} of {bad.numel()} values are NaN or infinite",
                expected="finite weights",
                remedy="the training diverged or the file is damaged: take an earlier checkpoint",
            )


def _check_finite(answers: Sequence[torch.Tensor], name: str) -> None:
    """Raise SourceError where an answer is NaN, or infinite upwards: minus infinity is what a mask leaves."""
    for i, answer in enumerate(answers):
        if answer.is_floating_point() and (count := int((answer.isnan() | answer.isposinf()).sum())):
            raise SourceError(
                f"{name} answers values that are not finite",
                code="answer-not-finite",
                got=f"{count} of {answer.numel()} values of output {i} are NaN or infinite",
                expected="finite outputs (minus infinity is taken for a mask)",
                remedy="look at what the network answers to the task's first calibration batch; "
                "a row whose keys are all masked gives NaN in a softmax",
            )


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fast path, whose answers at padded places are those of no exported form."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


def _random_operators(module: nn.Module, call: Call) -> list[str]:
    """The operators that draw random numbers: name, layer, and the line of the user's code."""
    watch = _Watch(module)
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    with contextlib.suppress(Exception), in_eval_mode(module), torch.no_grad(), watch.layers(), watch:
        module(*copied[0], **copied[1])
    return list(dict.fromkeys(watch.drawing))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator after which a generator stands elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawing: list[str] = []
        self._module = module
        self._stack: list[str] = []

    @contextlib.contextmanager
    def layers(self) -> Iterator[None]:
        """Follow which layer is at work."""
        hooks = []
        for name, part in self._module.named_modules():
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)))
            hooks.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        own = kwargs.get("generator") is not None and torch.Tag.nondeterministic_seeded in func.tags
        if own or not torch.equal(before, torch.get_rng_state()):
            layer = f" in {self._stack[-1]}" if self._stack and self._stack[-1] else ""
            line = line_in(traceback.extract_stack()) if not isinstance(self._module, fx.GraphModule) else None
            self.drawing.append(f"{func.overloadpacket.__name__}{layer}" + (f" ({line})" if line else ""))
        return result


def _first_difference(module: nn.Module, network: fx.GraphModule, call: Call, least: float) -> str | None:
    """The first layer, in the order in which the captured network runs, whose output is not that of the module."""
    names = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    theirs, ours = (_outputs_of(part, names, call) for part in (module, network))
    for name in dict.fromkeys(names):
        if name in theirs and name in ours and _decibels(theirs[name], ours[name]) < least:
            return name
    return None


def _outputs_of(module: nn.Module, names: Sequence[str], call: Call) -> dict[str, torch.Tensor]:
    """The output of the last call of each named layer that gives a tensor."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = output.detach().clone()

    parts = dict(module.named_modules())
    hooks = [
        parts[name].register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
        if name in parts
    ]
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    try:
        with contextlib.suppress(Exception), in_eval_mode(module), torch.no_grad(), same_state(module):
            module(*copied[0], **copied[1])
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
