"""Bypassing parts of a network: their readers read their input instead, and unused tensors are removed."""

from __future__ import annotations

from torch import fx, nn

from penjing.network.graph import site, sites
from penjing.steps.draft import Edit


def skip(network: fx.GraphModule, last: str, by: str) -> Edit:
    """Replace the value of one operator by another's, in place; returns the edit.

    Args:
        network: A captured network.
        last: Site of the operator whose value is replaced: the addition at the end of a residual block, the last
            operator of a layer.
        by: Site of the operator, or name of the input, whose value replaces it; of the same shape.

    Raises:
        KeyError: One of them does not exist.
    """
    operators = {site(n): n for n in network.graph.nodes if n.op == "placeholder"} | sites(network)
    operators[last].replace_all_uses_with(operators[by])
    # torch keeps attentions, as they may draw dropout; the operators of a captured network have no side effects
    network.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    network.delete_all_unused_submodules()
    _drop_unread(network)
    network.graph.lint()
    network.recompile()
    return {"edit": "skip", "last": last, "by": by}


def _drop_unread(network: fx.GraphModule) -> None:
    """Remove tensors that neither the graph nor a layer reads; `delete_all_unused_submodules` does not."""
    called = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
    for path, module in network.named_modules():
        if any(path == name or path.startswith(f"{name}.") for name in called):
            continue
        for store in (module._parameters, module._buffers):
            for role, value in list(store.items()):
                if value is not None and (f"{path}.{role}" if path else role) not in read:
                    _drop(module, role)


def _drop(module: nn.Module, role: str) -> None:
    module._parameters.pop(role, None)
    module._buffers.pop(role, None)
    module._non_persistent_buffers_set.discard(role)


__all__ = ["skip"]
