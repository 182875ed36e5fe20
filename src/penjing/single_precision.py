"""Double precision, and what else is not float32 within a network, computed in float32.

Runtimes on a processor compute in float32 and choose what is less by themselves; few have operators in double
precision. So what comes in is taken as float32 at the door: weights, buffers, constants, and the task's inputs. Outputs
are float32. A network whose parameters are in half or bfloat16 is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from penjing.call import as_call, map_leaves
from penjing.errors import SourceError
from penjing.task import Task

OTHERS = (torch.float16, torch.bfloat16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


def single_module(module: nn.Module) -> tuple[nn.Module, str | None]:
    """A copy of a module in float32, and one line that says so; the module itself and None where it is already.

    Raises:
        SourceError: Its parameters are in half or bfloat16: it rounds after every layer, and an artifact, which
            computes in float32, can't be compared with what it answers.
    """
    halves = {name: p.dtype for name, p in module.named_parameters() if p.dtype in OTHERS[:2]}
    if halves:
        name, dtype = next(iter(halves.items()))
        raise SourceError(
            f"the network is in {str(dtype).removeprefix('torch.')}",
            got=f"{name} and {len(halves) - 1} more parameters",
            expected="a network in float32: an artifact computes in it, and stores weights in half where that is asked",
            remedy="give model.float(), and a task whose inputs are float32",
        )
    found = Counter(tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in OTHERS)
    if not found:
        return module, None
    words = " and ".join(str(dtype).removeprefix("torch.") for dtype, _ in found.most_common())
    told = f"the network's {words} tensors are computed and stored in float32, and its outputs are float32"
    return copy.deepcopy(module).float(), told


def single_program(program: ExportedProgram) -> ExportedProgram:
    """A program whose tensors are float32 where they were in another precision; itself where none is."""
    stored = [*program.state_dict.values(), *program.constants.values()]
    values = [value for node in program.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))]
    if not any(isinstance(value, torch.Tensor) and value.dtype in OTHERS for value in (*stored, *values)):
        return program
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    program._state_dict = {name: _stored(value) for name, value in program.state_dict.items()}
    program._constants = {name: _stored(value) for name, value in program.constants.items()}
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(_argument, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_single, node.meta["val"])
    program.graph_module.recompile()
    return program


def single_task(task: Task) -> Task:
    """A task whose data is float32 wherever it is of another precision, `predict`'s inputs too.

    The task itself where its example is float32 already.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(as_call(task.example)) if isinstance(leaf, torch.Tensor | np.ndarray)]
    if all(_single(leaf) is leaf for leaf in inputs):
        return task

    def metric(evaluate: Callable[..., float] | None) -> Callable[..., float] | None:
        if evaluate is None:
            return None

        @functools.wraps(evaluate)
        def evaluated(predict: Callable[..., Any]) -> float:
            return evaluate(lambda *args, **kwargs: predict(*map_leaves(_single, args), **map_leaves(_single, kwargs)))

        return evaluated

    return dataclasses.replace(
        task,
        example=map_leaves(_single, task.example),
        calibration=None if task.calibration is None else _Data(task.calibration),
        train=None if task.train is None else _Data(task.train),
        evaluate=metric(task.evaluate),
        select=metric(task.select),
    )


class _Data:
    """Batches in float32, of data that is all else by itself."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (map_leaves(_single, batch) for batch in self.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)


def _single(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in OTHERS else value
    if isinstance(value, np.ndarray):
        other = value.dtype.kind == "f" and value.dtype != np.float32
        return value.astype(np.float32) if other or value.dtype.name == "bfloat16" else value
    return value


def _stored(value: Any) -> Any:
    single = _single(value)
    if isinstance(value, nn.Parameter) and single is not value:
        return nn.Parameter(single.detach(), requires_grad=value.requires_grad)
    return single


def _argument(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in OTHERS else value
    if isinstance(value, float) and abs(value) > _LARGEST and abs(value) != float("inf"):
        return max(-_LARGEST, min(_LARGEST, value))  # the smallest number of double precision, as masks have it
    return value
