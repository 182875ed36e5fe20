"""Graphs within the nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penjing.errors import CheckpointError
from penjing.onnx_files.node import Node


@dataclass(frozen=True)
class Branch:
    """A graph within a node: its nodes, and the names of what it gives."""

    nodes: list[Node]
    outputs: tuple[str, ...]


def branches(node: Node) -> list[Branch]:
    """The graphs within a node."""
    return [value for value in node.attributes.values() if isinstance(value, Branch)]


def all_nodes(nodes: list[Node]) -> Iterator[Node]:
    """Nodes, and those of the graphs within them."""
    for node in nodes:
        yield node
        for branch in branches(node):
            yield from all_nodes(branch.nodes)


def check_given(branch: Branch, given: set[str]) -> None:
    """Refuse a graph that reads or gives a value which nothing gives before; `given` are the names that are there."""
    given = set(given)
    for node in branch.nodes:
        missing = [name for name in node.inputs if name not in given]
        if missing:
            raise node.refuse("nothing before it gives its input", repr(missing[0])[:100])
        for inner in branches(node):
            check_given(inner, given)
        given |= {*node.outputs}
    missing = [name for name in branch.outputs if name not in given]
    if missing:
        raise CheckpointError(
            "the ONNX file can't be read",
            code="damaged",
            got=f"nothing gives its output {missing[0][:100]!r}",
            expected="outputs that nodes, inputs or stored tensors give",
            remedy="download or export it again",
        )


__all__ = ["Branch", "all_nodes", "branches", "check_given"]
