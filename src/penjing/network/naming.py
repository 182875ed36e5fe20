"""Names of a network's parts that generated code, sites and files can hold.

A part of a module may be called anything: a keyword of Python, with quotes, like an attribute of `torch.fx`'s graph
modules. Torch writes such names into the source of a forward, and sites (see `penjing.network.graph`) are made of
``/``, ``#``, ``@`` and ``:``. What can't be held is renamed at the door; everything else is called as its
owner calls it.
"""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Iterable
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {"_in_spec", "_out_spec", "_guards_fn"}


def safe_names(program: ExportedProgram) -> tuple[ExportedProgram, dict[str, str]]:
    """The program with parts renamed where their names can't be held, and new → old names of its tensors.

    The program itself, and an empty dict, where every name can.
    """
    tensors: list[str] = [spec.target for spec in program.graph_signature.input_specs if spec.target is not None]
    tensors = list(dict.fromkeys([*tensors, *program.state_dict, *program.constants]))
    modules = [_module_path(node) for node in program.graph.nodes]
    paths = _safe_paths([*tensors, *filter(None, modules)])
    if all(path == new for path, new in paths.items()):
        return program, {}
    renamed = copy.copy(program)
    renamed._graph_module = copy.deepcopy(program.graph_module)
    renamed._graph_signature = copy.deepcopy(program.graph_signature)
    renamed._state_dict = {paths[name]: tensor for name, tensor in program.state_dict.items()}
    renamed._constants = {paths[name]: value for name, value in program.constants.items()}
    specs: list[Any] = [*renamed._graph_signature.input_specs, *renamed._graph_signature.output_specs]
    for spec in specs:
        if spec.target is not None:
            spec.target = paths.get(spec.target, spec.target)
    for node in renamed.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (_renamed(path, paths), cls) for key, (path, cls) in stack.items()}
    return renamed, {new: old for old, new in paths.items() if new != old and old in tensors}


def free_name(module: nn.Module, word: str) -> str:
    """`word`, or with as many underscores behind it as make it a name that the module does not have."""
    while hasattr(module, word):
        word += "_"
    return word


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def _renamed(path: Any, paths: dict[str, str]) -> Any:
    if path in paths:
        return paths[path]
    called, _, number = str(path).rpartition("@")  # torch counts the calls of a module behind an @
    return f"{paths[called]}@{number}" if called in paths else path


def _safe_paths(given: Iterable[str]) -> dict[str, str]:
    """Every path, and every path on the way to one, with what it is called from now on."""
    paths = {"": ""}
    used: set[str] = set()
    known = list(dict.fromkeys(given))
    whole = [path for path in known if not re.search(r"@\d+$", path) or path.rpartition("@")[0] not in known]
    ways = [".".join(path.split(".")[: n + 1]) for path in whole for n in range(path.count(".") + 1)]
    for path in sorted(
        dict.fromkeys(ways), key=lambda path: (path.count("."), _safe_leaf(path) != path.split(".")[-1])
    ):
        parent = path.rpartition(".")[0]
        above = f"{paths[parent]}." if parent else ""
        name = _safe_leaf(path)
        while above + name in used:
            name += "_"
        used.add(above + name)
        paths[path] = above + name
    return paths


def _safe_leaf(path: str) -> str:
    """The last part of a path, as it can be held."""
    parent, _, leaf = path.rpartition(".")
    name = re.sub(r"[^\w-]", "_", leaf) or "_"
    return f"{name}_" if keyword.iskeyword(name) or (not parent and name in _TAKEN) else name
