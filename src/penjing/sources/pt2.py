"""Opening a ``.pt2`` exported program without running code from it.

`torch.export.load` trusts its file. In torch 2.13, a crafted archive can execute code in these ways, each of which is
checked here before torch sees the file:

- weights and constants marked as pickled, custom objects, the legacy ``.pt`` members: unpickled in full;
- example inputs: unpickled in full where the restricted unpickler refuses them;
- symbolic sizes: passed to sympy, which evaluates them as Python;
- operators: any attribute path below ``torch``, such as ``torch.os.system``, becomes a node;
- names of values and of arguments: pasted into the source of the graph's generated ``forward``;
- guards: pasted into a generated function; tree specs: may name modules to import;
- compiled libraries of AOTInductor: loaded.

So everything that is not plainly the data of a network is refused, by allow-lists rather than by forbidden names.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from penjing.errors import CheckpointError, PenjingError
from penjing.numerics import operators, suppression  # noqa: F401  register the operators that a file may hold
from penjing.records import reading

_MODELS, _WEIGHTS, _CONSTANTS, _EXAMPLES = "models/", "data/weights/", "data/constants/", "data/sample_inputs/"
_PLAIN_MEMBERS = re.compile(r"archive_format|archive_version|byteorder|\.data/\w+|extra/.*|data/extra/.*")

_NAME = re.compile(r"[A-Za-z_]\w*")
_ARGUMENT = re.compile(r"\*{0,2}[A-Za-z_]\w*")
_PATH = re.compile(r"[^\"'\\(){}\x00-\x1f\x7f]*")  # a parameter's dotted path is quoted in generated code
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")  # others are custom objects, which would be unpickled
_PATH_KEYS = frozenset(
    {"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn", "class_fqn", "custom_obj_name"}
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|quantized_decomposed|penjing|torchvision)\.(\w+)\.\w+")
_FILE_OPERATORS = frozenset({"from_file", "save", "load", "import_ir_module"})  # these would access files when run
_BLOCK = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
_SCALAR = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem"
    r"|lshift|rshift)|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_\w+"
)
_EXPRESSION_CALLS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Max Min Abs floor ceiling Mod Eq Ne Ge Gt Le Lt And Or Not Piecewise "
    "Equality Unequality GreaterThan StrictGreaterThan LessThan StrictLessThan FloorDiv ModularIndexing Where "
    "PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv "
    "TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator "
    "BooleanTrue BooleanFalse".split()
)
_GUARD_WORDS = frozenset("size shape dim ndim dtype stride storage_offset len abs min max int float isnan inf".split())
_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Tuple,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)


def open_program(path: Path | str) -> ExportedProgram:
    """Open a ``.pt2`` exported program after checking that neither loading nor running it executes code from the file.

    Raises:
        CheckpointError: The file is damaged, has another format, or contains anything that torch would execute.
    """
    path = Path(path)
    try:
        with reading.regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
        if "version" in members:  # torch.export.load falls back to this format, which consists of pickles
            raise _refusal(path, "it has the format of torch 2.7 and older, which is made of pickles")
        _check(path, PT2ArchiveReader(str(path)))
        program = torch.export.load(path)
    except PenjingError:
        raise
    except Exception as cause:  # a damaged file fails in many ways inside zip, json and torch
        raise CheckpointError(
            f"{path.name} can't be opened as an exported program",
            code="damaged",
            got=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else path}",
            expected="a file written by torch.export.save, by this or an older torch",
            remedy=f"write it again: torch.export.save(torch.export.export(model.eval(), example), {path.name!r})",
        ) from cause
    return program


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is refused: opening it could run code",
        code="foreign-code",
        got=why,
        expected="an exported program made of ATen operators and plain tensors",
        remedy="give the module itself as file.py:factory, or export it again with torch.export.save",
    )


def _check(path: Path, archive: PT2ArchiveReader) -> None:
    """Check every member with the reader that torch itself uses, so that both see the same bytes."""
    for member in archive.get_file_names():
        if member.startswith(_MODELS):
            why = _model_danger(json.loads(archive.read_string(member)))
        elif member.startswith((_WEIGHTS, _CONSTANTS)):
            why = _payload_danger(member, archive)
        elif member.startswith(_EXAMPLES):
            why = _example_danger(archive.read_bytes(member))
        elif _PLAIN_MEMBERS.fullmatch(member):
            why = None
        else:
            why = f"it holds {member}, which is not a part of an exported program"
        if why is not None:
            raise _refusal(path, why)


def _payload_danger(member: str, archive: PT2ArchiveReader) -> str | None:
    if member.endswith(".json"):
        for name, meta in json.loads(archive.read_string(member))["config"].items():
            if meta["use_pickle"] or not _PAYLOAD.fullmatch(meta["path_name"]):
                return f"{name} is stored as a pickle"
            if not _PATH.fullmatch(name):
                return f"a tensor is called {name!r}"
        return next(_strings_danger(json.loads(archive.read_string(member))), None)
    if member.endswith(".pt"):
        return f"{member} is a pickle"
    return None


def _example_danger(data: bytes) -> str | None:
    if not data:
        return None
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        return f"its example inputs are a pickle of more than tensors ({str(error).strip().splitlines()[0]})"
    return None


def _model_danger(model: dict[str, Any]) -> str | None:
    for guard in model.get("guards_code") or []:
        if not _harmless(guard, calls=_GUARD_WORDS, guard=True):
            return f"a guard reads {guard!r}"
    return next(_strings_danger(model), None)


def _strings_danger(value: Any, key: str = "") -> Iterator[str]:
    """Walk JSON and report a string that would be executed. Strings that torch only stores are recognized by their key.

    Nothing is skipped by its key: a file may choose tensor names freely, and could hide a shape from such a walk.
    """
    if isinstance(value, list):
        for item in value:
            yield from _strings_danger(item, key)
    elif isinstance(value, dict):
        for inner, item in value.items():
            if inner in ("as_custom_obj", "custom_obj_values") and item:
                yield "it holds custom objects"
            yield from _strings_danger(item, inner)
    elif isinstance(value, str):
        why = _string_danger(key, value)
        if why is not None:
            yield why


def _string_danger(key: str, text: str) -> str | None:
    if key == "expr_str":
        return None if _harmless(text, calls=_EXPRESSION_CALLS) else f"a symbolic size reads {text!r}"
    if key in ("target", "as_operator"):
        return None if _known_operator(text) else f"it calls {text!r}"
    if key in ("name", "as_name"):
        return None if _NAME.fullmatch(text) or not text else f"a value is called {text!r}"
    if key == "forward_arg_names":
        return None if _ARGUMENT.fullmatch(text) else f"an argument is called {text!r}"
    if key in _PATH_KEYS:
        return None if _PATH.fullmatch(text) else f"a tensor is called {text!r}"
    if key in ("in_spec", "out_spec"):
        imports = "__enum__" in text or "default_factory" in text or "\\u" in text
        return "its inputs or outputs name Python objects to import" if imports else None
    return None


def _known_operator(target: str) -> bool:
    match = _OPERATOR.fullmatch(target)
    if match is not None:
        return match[2] not in _FILE_OPERATORS
    return bool(_BLOCK.fullmatch(target) or _SCALAR.fullmatch(target))


def _harmless(text: str, *, calls: frozenset[str], guard: bool = False) -> bool:
    """Whether an expression is only arithmetic on names and numbers, with allowed calls."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if guard and isinstance(node, ast.Subscript):
            continue
        if guard and isinstance(node, ast.Attribute) and node.attr in calls:
            continue
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Call):
            word = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if word not in calls:
                return False
        # sympy parses a string again as an expression, so it must itself be a plain name or number
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"[\w.+-]*", node.value):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
            return False
    return True
