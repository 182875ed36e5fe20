"""Functionalization of an exported program, so that edits may move or repeat any operator."""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx
from torch.export import ExportedProgram

from penjing.network.graph import arguments, operator_name


def functional(program: ExportedProgram) -> ExportedProgram:
    """Replace in-place operators by functional ones, without decomposing layers."""
    mutating = [n for n in program.graph.nodes if mutates(n)]
    if not mutating:
        return program
    if not all(_safe_to_replace(n) for n in mutating):
        return _restore_layers(program, program.run_decompositions({}))  # functionalizes views too
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in [n for n in program.graph.nodes if mutates(n)]:
        packet = getattr(torch.ops.aten, operator_name(node))
        node.target = getattr(packet, node.target._overloadname)
        mutated = node.args[0]
        for user in list(mutated.users):
            if order[user] > order[node]:
                user.replace_input_with(mutated, node)
    program.graph_module.recompile()
    return program


def _restore_layers(source: ExportedProgram, program: ExportedProgram) -> ExportedProgram:
    """Restore batch norm and dropout, which functionalization decomposes, unlike other layers."""
    rates = {n.name: arguments(n)["p"] for n in source.graph.nodes if n.target is torch.ops.aten.dropout.default}
    for node in list(program.graph.nodes):
        origin = node.meta.get("from_node") or ()
        if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            *tensors, momentum, eps = node.args
            users = list(node.users)
            if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
                continue  # the statistics are used, which the layer does not return
            node.target = torch.ops.aten.batch_norm.default
            node.args = (*tensors, False, momentum, eps, False)
            for user in users:
                node.meta["val"] = user.meta["val"]
                user.replace_all_uses_with(node)
                program.graph.erase_node(user)
        elif node.target is torch.ops.aten.clone.default and origin and origin[-1].name in rates:
            node.target, node.kwargs = torch.ops.aten.dropout.default, {}
            node.args = (node.args[0], rates[origin[-1].name], False)
    program.graph_module.recompile()
    return program


def mutates(node: fx.Node) -> bool:
    """Whether an operator modifies one of its inputs."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _safe_to_replace(node: fx.Node) -> bool:
    target, mutated = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    name = target.overloadpacket.__name__
    if not name.endswith("_") or not isinstance(mutated, fx.Node):
        return False
    functional = getattr(torch.ops.aten, name.rstrip("_"), None)
    if functional is None or target._overloadname not in functional.overloads():
        return False
    if mutated.op == "placeholder" and mutated.name.startswith(("p_", "b_", "c_")):
        return False
    return not _aliases(mutated) and not any(_aliases(user) for user in mutated.users if user is not node)


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its input (views, and reshape, contiguous, dropout)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"  # getitem of a split: a view
    if target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns) or operator_name(node) in (
        "reshape",
        "contiguous",
        "flatten",
        "to",
        "dropout",
        "expand_as",
        "view_as",
        "chunk",
    )
