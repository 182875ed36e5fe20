"""Inlining of subgraphs of an exported program: branches of `torch.cond`, gradient and autocast regions.

Every step reads a flat graph. For a condition on values, both branches are computed and one is selected.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram

from penjing.errors import ExportError
from penjing.network.graph import line

_FIRST_OPERAND = {"wrap_with_set_grad_enabled": 2, "wrap_with_autocast": 5}  # behind the region itself


def in_line(program: ExportedProgram) -> ExportedProgram:
    """Inline all subgraphs of a program; returns the program itself if it has none.

    Raises:
    ExportError: There is a loop, or a condition on a size, which can't be inlined.
    """
    if not any(_is_region(node) for node in program.graph.nodes):
        return program
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    program._graph_signature = copy.deepcopy(program.graph_signature)
    while node := next((node for node in program.graph.nodes if _is_region(node)), None):
        renamed = _put_in_line(program.graph_module, node)
        for spec in program._graph_signature.output_specs:
            if getattr(spec.arg, "name", None) in renamed:
                object.__setattr__(spec.arg, "name", renamed[spec.arg.name])
    for node in list(program.graph.nodes):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def _put_in_line(owner: fx.GraphModule, node: fx.Node) -> dict[str, str]:
    name = str(node.target)
    if name == "cond":
        condition, *branches, operands = node.args
        value = condition.meta.get("val") if isinstance(condition, fx.Node) else condition
        if not isinstance(value, torch.Tensor):
            raise _refusal(
                node,
                "condition-on-size",
                "its condition is on a size",
                "branch on the size outside the network, or fix it",
            )
        then_nodes, else_nodes = (_copied(owner, node, branch, operands) for branch in branches)
        results = []
        for one, two in zip(then_nodes, else_nodes, strict=True):
            with owner.graph.inserting_before(node):
                chosen = owner.graph.call_function(torch.ops.aten.where.self, (condition, one, two))
            chosen.meta = {**node.meta, "val": one.meta["val"]}
            results.append(chosen)
    elif name in _FIRST_OPERAND:
        start = _FIRST_OPERAND[name]
        results = _copied(owner, node, node.args[start - 1], node.args[start:])
    else:
        raise _refusal(node, "loop", f"it is a {name}", "unroll the loop, with a fixed number of iterations")
    renamed = {}
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise _refusal(node, "results", "its results are read as one", "return tensors from its branches")
        result = results[int(str(user.args[1]))]
        user.replace_all_uses_with(result)
        renamed[user.name] = result.name
        owner.graph.erase_node(user)
    owner.graph.erase_node(node)
    return renamed


def _copied(owner: fx.GraphModule, node: fx.Node, region: Any, operands: Any) -> list[fx.Node]:
    """Copy the operators of a subgraph in front of `node`, and return its results."""
    graph: Any = owner.get_submodule(str(region.target)).graph
    inputs = [inner for inner in graph.nodes if inner.op == "placeholder"]
    known: dict[fx.Node, fx.Node] = dict(zip(inputs, operands, strict=True))
    for inner in graph.nodes:
        if inner.op == "get_attr":  # a nested subgraph
            name = f"{region.target}_{inner.target}".replace(".", "_")
            setattr(owner, name, getattr(owner.get_submodule(str(region.target)), str(inner.target)))
            with owner.graph.inserting_before(node):
                known[inner] = owner.graph.get_attr(name)
        elif inner.op == "call_function":
            with owner.graph.inserting_before(node):
                known[inner] = owner.graph.node_copy(inner, lambda n: known[n])
        elif inner.op == "output":
            results = inner.args[0] if isinstance(inner.args[0], tuple | list) else (inner.args[0],)
            return [known[result] for result in results]
    raise AssertionError("a subgraph without results")


def _refusal(node: fx.Node, code: str, why: str, remedy: str) -> ExportError:
    return ExportError(
        f"the network holds an operator that runs others: {node.target}{line(node)}",
        code=code,
        got=why,
        expected="a flat graph of operators; of torch.cond on tensor values both branches are computed",
        remedy=remedy,
    )
