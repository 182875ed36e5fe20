"""Making module names valid in generated code, sites and files.

A submodule may have any name: a Python keyword, one with quotes, or that of an attribute of `torch.fx` graph modules.
Torch pastes such names into the source of a generated forward, and sites (see `penjing.network.graph`) are built with
``/``, ``#``, ``@`` and ``:``. Invalid names are replaced at capture; all others are kept.
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
    """Rename submodules with invalid names, and return the program and new → old names of its tensors.

    Returns the program itself, and an empty dict, if all names are valid.
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
    """Return `word`, with as many trailing underscores as it takes for the module not to have that name."""
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
    called, _, number = str(path).rpartition("@")  # torch appends the number of a module's call after an @
    return f"{paths[called]}@{number}" if called in paths else path


def _safe_paths(given: Iterable[str]) -> dict[str, str]:
    """Every path, and every prefix of one, with its new name."""
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
    """The last component of a path, made valid."""
    parent, _, leaf = path.rpartition(".")
    name = re.sub(r"[^\w-]", "_", leaf) or "_"
    return f"{name}_" if keyword.iskeyword(name) or (not parent and name in _TAKEN) else name
