"""Reading and writing the YAML of recipes and device profiles: YAML 1.2 scalars, bounded size, unique keys."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import YAMLError

from penjing.records import reading

__all__ = ["RECIPE_BYTES", "YAMLError", "dump", "load"]

RECIPE_BYTES = 1 << 18  # size of a recipe's text
NODES = 10_000  # number of entries in it
DIGITS = 400  # digits of a number


def load(text: str) -> Any:
    """Parse YAML text to plain data.

    Raises:
        YAMLError: It is not valid YAML.
        ValueError: It is too large or too deeply nested for a recipe.
    """
    if len(text) > RECIPE_BYTES:
        raise ValueError(f"{len(text):,} characters, and at most {RECIPE_BYTES:,} are read")
    _check_brackets(text)
    data = yaml.load(text, _Loader)
    reading.check(data)
    return data


def dump(data: Any) -> str:
    """Return YAML text that `load` reads back."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Loads numbers and booleans by YAML 1.2, where PyYAML follows 1.1: 1e-3 is a number, and `off` a string.

    A key that appears twice in a mapping is an error instead of overriding the first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict with unique keys."""
        seen = set()
        for written, _ in node.value:
            key = self.construct_object(written, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} appears twice"[:200], node.start_mark)
            seen.add(key if isinstance(key, Hashable) else id(key))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def get_single_node(self) -> Any:
        """The document, unless its aliases expand to too many entries."""
        node = super().get_single_node()
        if node is not None and (count := _expanded(node, {})) > NODES:
            raise ValueError(f"{count:,} entries with all aliases expanded, and at most {NODES:,} are read")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer of at most 64 bits."""
        if len(node.value) > DIGITS or abs(value := super().construct_yaml_int(node)) >= 2**63:
            raise ValueError(f"the number {node.value[:20]}…, which has more than 64 bits")
        return int(value)


def _expanded(node: Any, known: dict[int, int]) -> int:
    """The number of entries of a document with every alias expanded."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = NODES + 1  # an alias within itself expands without end
    inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
    parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
    known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _check_brackets(text: str) -> None:
    """Raise ValueError for deeply nested brackets: the parser's time is quadratic in the depth."""
    depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if depth > reading.DEPTH:
            raise ValueError(f"brackets nested deeper than {reading.DEPTH} levels")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what either version of YAML would not read as a string."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag not in (_BOOL, _FLOAT)]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _reads_or_writes in (_Loader, _Dumper):
    _reads_or_writes.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )
