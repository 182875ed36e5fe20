"""Double precision, and what else is not float32 within a network, computed in float32.

Runtimes on a processor compute in float32 and choose what is less by themselves; few have operators in double
precision. So what comes in is taken as float32 at the door: weights, buffers and constants. Outputs are float32. A
network whose parameters are in half or bfloat16 is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from penjing.errors import SourceError

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
            expected="a network in float32: an artifact computes in it (half precision is for stored weights)",
            remedy="give model.float(), and a task whose inputs are float32",
        )
    dtypes = Counter(tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in OTHERS)
    if not dtypes:
        return module, None
    words = " and ".join(str(dtype).removeprefix("torch.") for dtype, _ in dtypes.most_common())
    note = f"the network's {words} tensors are computed and stored in float32, and its outputs are float32"
    return copy.deepcopy(module).float(), note


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


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in OTHERS else value


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
