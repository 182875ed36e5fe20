"""Conversion of networks in double precision, or with other non-float32 tensors, to float32.

Runtimes on a CPU compute in float32 and choose lower precisions themselves; few have operators in double precision. So
weights, buffers and constants are converted to float32 at capture, and outputs are float32. A network with parameters
in half or bfloat16 is refused.
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
    """Return a copy of a module in float32 with a note for the user; the module itself and None if it already is.

    Raises:
        SourceError: Its parameters are in half or bfloat16: it rounds after every layer, so its outputs are not
            comparable with those of an artifact, which computes in float32.
    """
    halves = {name: p.dtype for name, p in module.named_parameters() if p.dtype in OTHERS[:2]}
    if halves:
        name, dtype = next(iter(halves.items()))
        raise SourceError(
            f"the network is in {str(dtype).removeprefix('torch.')}",
            code="half",
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
    """Convert the floating-point tensors of a program to float32; returns the program itself if all already are."""
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
        return max(-_LARGEST, min(_LARGEST, value))  # the lowest number of double precision, as used in masks
    return value
