"""Preparing an ONNX model that others wrote: its functions in line, and one name for one value."""

from __future__ import annotations

from typing import Any

from penjing.errors import SourceError
from penjing.onnx_files.operators import OPERATORS

MOST_NODES = 100_000
DEEPEST = 50
"""Levels of functions that call functions."""


def prepared(model: Any) -> Any:
    """A model without local functions, and with operators that the standard defines by others written out.

    Args:
        model: An ``onnx.ModelProto``; it is not changed.
    """
    import onnx
    import onnx.inliner

    _check_count(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = _with_unique_names(model)
    while True:
        unknown = {
            (node.domain, node.op_type)
            for node in model.graph.node
            if node.op_type not in OPERATORS and node.domain in ("", "ai.onnx") and _has_body(node, model)
        }
        if not unknown:
            return model
        model = onnx.inliner.inline_selected_functions(model, sorted(unknown), inline_schema_functions=True)


def _check_count(model: Any) -> None:
    """Refuse a model that has too many nodes, those of its functions counted wherever they are called."""
    functions = {(function.domain, function.name): function for function in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def of(nodes: Any, callers: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += 1
            for attribute in node.attribute:
                for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                    total += of(graph.node, callers)
            if key in functions:
                if key in callers or len(callers) > DEEPEST:
                    raise _too_large(f"function {node.op_type!r} calls itself, or {len(callers):,} are nested")
                if key not in counts:
                    counts[key] = of(functions[key].node, (*callers, key))
                total += counts[key]
        return total

    if (total := of(model.graph.node, ())) > MOST_NODES:
        raise _too_large(f"{total:,} nodes, those of its functions counted at every call")


def _too_large(got: str) -> SourceError:
    return SourceError(
        "the ONNX file has more nodes than are read",
        code="too-large",
        got=got,
        expected=f"at most {MOST_NODES:,} nodes, and functions nested {DEEPEST} deep",
        remedy="export a part of the network, such as one of its repeated blocks",
    )


def _with_unique_names(model: Any) -> Any:
    """A model whose inner graphs define no name that another graph defines."""
    import onnx

    if not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        return model
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    used = {""} | _defined(copied.graph) | {value.name for value in copied.graph.input}

    def rename(graph: Any, outer: dict[str, str]) -> None:
        names = dict(outer)
        for name in sorted(_defined(graph)):
            new = name
            while new in used:
                new += "_"
            used.add(new)
            names[name] = new
        for part in [*graph.initializer, *graph.output, *graph.value_info]:
            part.name = names.get(part.name, part.name)
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            inner(node, names)

    def inner(node: Any, names: dict[str, str]) -> None:
        for attribute in node.attribute:
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                rename(graph, names)

    for node in copied.graph.node:
        inner(node, {})
    return copied


def _defined(graph: Any) -> set[str]:
    """Names of what a graph's own nodes and tensors are called."""
    return {name for node in graph.node for name in node.output if name} | {t.name for t in graph.initializer}


def _has_body(node: Any, model: Any) -> bool:
    import onnx

    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


__all__ = ["prepared"]
