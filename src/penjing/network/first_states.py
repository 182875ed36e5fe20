"""First states of recurrent layers and cells, whose batch has to be that of the layer's input.

Torch's operators do not check it: beside an input of a larger batch they read past the end of the state. Zeros follow
the input, a state of one row is repeated, and any other state of a batch of its own is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from penjing.errors import ExportError
from penjing.modes import in_eval_mode
from penjing.network.graph import arguments, line, operator_name
from penjing.network.recurrent_steps import is_zero
from penjing.network.rewriting import Builder, editable

aten = torch.ops.aten
LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Operators with states (layers × directions, batch, hidden)."""
CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
"""Operators with states (batch, hidden)."""
CODE = "state-batch"
EXPECTED = "a first state with the batch of the layer's input"
REMEDY = (
    "store one row and repeat it in the forward: state.expand(-1, batch, -1), and for a cell state.expand(batch, -1); "
    "or fix the batch to the state's by Task.dynamic: {} fixes all sizes to the example's"
)


def with_the_batch_of_the_input(program: ExportedProgram) -> ExportedProgram:
    """Give first states the batch of their layer's input; returns the program itself if it has no recurrent layer.

    Raises:
        ExportError: A state is of a fixed batch that is not the input's.
    """
    if not any(_reads_states(node) for node in program.graph.nodes):
        return program
    program = editable(program)
    for node in [n for n in program.graph.nodes if _reads_states(n)]:
        a, build = arguments(node), Builder(program, node)
        layer = operator_name(node) in LAYERS
        axis = 0 if not layer or a["batch_first"] else 1
        for state in dict.fromkeys(a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]):
            new = _following(build, state, int(layer), a["input"], axis)
            if new is not None:
                node.replace_input_with(state, new)
    program.graph_module.recompile()
    return program


def fixed_layer(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]
) -> str | None:
    """The name of the recurrent layer that refuses its state in a forward of twice the batch; None if none does.

    Args:
        model: A network that can't be exported because a size that should vary does not.
        args: Its positional example inputs.
        kwargs: Its keyword example inputs.
        axes: Name of an input → its axes that vary, in the order of the inputs.
    """
    if not any(isinstance(part, nn.RNNBase | nn.RNNCellBase) for part in model.modules()):
        return None
    called: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, part in model.named_modules()
    ]
    values = [_doubled(value, axes[name]) for name, value in zip(axes, [*args, *kwargs.values()], strict=True)]
    try:
        with in_eval_mode(model), _Refusing(), torch.no_grad():
            model(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
    except Exception as error:  # of the user's forward, for a size that it may not take
        return (called[-1] or type(model).__name__) if called and "hidden" in str(error) else None
    finally:
        for hook in hooks:
            hook.remove()
    return None


class _Refusing(TorchFunctionMode):
    """Refuses, before it runs, a recurrent operator whose state is of another batch than its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        layer = name in LAYERS
        if (layer or name in CELLS) and args[0].dim() == 2 + layer:  # not of packed sequences
            x, states = args[:2]
            state = states[0] if isinstance(states, list | tuple) else states
            if x.shape[int(layer and not args[-1])] != state.shape[int(layer)]:
                raise RuntimeError(f"hidden state of shape {list(state.shape)} for an input of {list(x.shape)}")
        return func(*args, **(kwargs or {}))


def _doubled(value: Any, axes: Mapping[int, str]) -> Any:
    def double(tensor: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            tensor = torch.cat([tensor, tensor], axis) if axis < tensor.dim() else tensor
        return tensor

    return pytree.tree_map_only(torch.Tensor, double, value)


def _reads_states(node: fx.Node) -> bool:
    """Whether an operator is a recurrent layer or cell with states, and its input no packed sequence."""
    if node.op != "call_function" or operator_name(node) not in LAYERS + CELLS:
        return False
    a = arguments(node)
    return "hx" in a and "input" in a


def _following(build: Builder, state: fx.Node, place: int, x: fx.Node, axis: int) -> fx.Node | None:
    """The state with the batch of the input; None if it varies with the input.

    Args:
        build: In front of the layer.
        state: Its first state.
        place: Axis of the state's batch.
        x: The layer's input.
        axis: Axis of the input's batch.
    """
    shape, batch = list(build.value(state).shape), build.value(x).shape[axis]
    own = shape[place]
    if not isinstance(own, int):
        return None
    if is_zero(state):
        sizes = [*shape[:place], build(aten.sym_size.int, x, axis), *shape[place + 1 :]]
        dtype = build.value(state).dtype
        zeros: fx.Node = build(aten.full.default, sizes, 0.0, dtype=dtype, device=torch.device("cpu"))
        return zeros
    if own != 1 and not (isinstance(batch, int) and batch == own):
        path = list((build.node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0].split("@")[0]
        raise ExportError(
            f"a recurrent layer has a first state of another batch: {path or operator_name(build.node)}"
            f"{line(build.node)}",
            code=CODE,
            got=f"a state of batch {own} beside an input of batch {batch if isinstance(batch, int) else 'any size'}",
            expected=EXPECTED,
            remedy=REMEDY,
        )
    sizes = [-1] * len(shape)
    sizes[place] = build(aten.sym_size.int, x, axis)  # also where it is fixed: torch then refuses any other
    repeated: fx.Node = build(aten.expand.default, state, sizes)
    return repeated
