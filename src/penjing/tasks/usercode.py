"""Running Python that the user names on the command line: ``file.py:name`` or ``package.module:name``.

This is the only place where Penjing runs code by name. Names in records, recipes and checkpoints never get here.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from penjing.errors import PenjingError, TaskError

USER_MODULE = "penjing_user_"  # prefix of the module names of such files
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def split_spec(spec: str) -> tuple[str, str] | None:
    """Split ``file.py:name`` or ``package.module:name`` into (file or module, name); None for anything else.

    The colon of a Windows drive is not a separator.

    >>> split_spec("nets/small.py:make"), split_spec("pkg.nets:make"), split_spec("C:/data/images")
    (('nets/small.py', 'make'), ('pkg.nets', 'make'), None)
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        return None
    if where.endswith(".py") or (_MODULE.fullmatch(where) and not (len(where) == 1 and where.isupper())):
        return where, name
    return None


def check_file(spec: str, *, error: type[PenjingError], role: str) -> None:
    """Raise if the file of ``file.py:name`` is missing, before anything heavy is imported.

    Raises:
        error: The file is missing.
    """
    where = (split_spec(spec) or (spec,))[0]
    if where.endswith(".py") and not Path(where).is_file():
        raise error(
            f"the {role}'s file is missing",
            code="missing",
            got=where,
            expected="an existing Python file",
            remedy=suggest_file(Path(where)) or "check the path",
        )


def load_named(where: str, name: str, *, error: type[PenjingError], role: str) -> Any:
    """Import a file or module and return its attribute `name`. A file is imported only once.

    Args:
        where: Path of a ``.py`` file, or the dotted name of an importable module.
        name: The attribute.
        error: The exception to raise on failure: `SourceError` or `TaskError`.
        role: "source" or "task", for messages.

    Raises:
        error: The file or the attribute is missing, or importing it raised (chained, with file and line).
    """
    # Code that imports Keras decides its backend; only one of torch can be captured.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    module = _import_file(Path(where), error, role) if where.endswith(".py") else _import_module(where, error, role)
    if hasattr(module, name):
        return getattr(module, name)
    public = sorted(n for n, value in vars(module).items() if not n.startswith("_") and _own(value, module))
    raise error(
        f"the {role}'s file has no {name!r}",
        code="unknown-name",
        got=f"{where}, which has {', '.join(public[:20]) or 'no public names'}",
        expected=f"a {role} of that name",
        remedy=suggest(name, public) or "check the name after the colon",
    )


def _own(value: Any, module: ModuleType) -> bool:
    """Whether a module defined a value itself; imported values are not suggested."""
    if isinstance(value, ModuleType):
        return False
    return not isinstance(value, type | FunctionType) or value.__module__ == module.__name__


def call_named(factory: Callable[[], Any], where: str, *, error: type[PenjingError], role: str) -> Any:
    """Call a factory without arguments, with its file's folder importable.

    Raises:
        error: The factory raised; the original error is chained and its line is named.
    """
    folder = Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
    try:
        with _on_path(folder):
            return factory()
    except PenjingError:
        raise
    except (Exception, SystemExit) as cause:
        raise error(
            f"the {role}'s factory {getattr(factory, '__name__', factory)!s} raised {type(cause).__name__}",
            code="raised",
            got=f"{cause or type(cause).__name__} ({line_of(cause)})",
            expected="a factory that can be called without arguments",
            remedy="call it in a Python shell and fix what it reports",
        ) from cause


@contextlib.contextmanager
def never_exiting() -> Iterator[None]:
    """Turn an exit of the process (``sys.exit``) by the user's code into an error with its line.

    Raises:
        TaskError: The code exited; the exit is chained.
    """
    try:
        yield
    except SystemExit as cause:
        raise TaskError(
            "code of the task or of the network ended the process",
            code="exited",
            got=f"sys.exit({'' if cause.code is None else repr(cause.code)}) ({line_of(cause)})",
            expected="code that returns, or raises an error",
            remedy="remove the call, or guard the script part with if __name__ == '__main__'",
        ) from cause


def line_of(error: BaseException) -> str:
    """Locate the error in the user's own code: the innermost line that is not in torch, Penjing or Python.

    For example ``net.py:12 in forward: x = self.fc(x)``.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()}"
    return line_in(traceback.extract_tb(error.__traceback__)) or "outside the user's code"


def line_in(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """Describe the innermost of these frames that belongs to the user's own code; None if none does."""
    own = [f for f in frames if not _foreign(f.filename)]
    if not own:
        return None
    frame = own[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"


def _foreign(filename: str) -> bool:
    path = os.path.normcase(os.path.abspath(filename))
    roots = [Path(__file__).resolve().parents[1], Path(os.__file__).resolve().parent]
    inside = any(path.startswith(os.path.normcase(str(root)) + os.sep) for root in roots)
    return inside or "site-packages" in path or "dist-packages" in path or filename.startswith("<")


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """ "did you mean ...?" with the nearest known names, or None.

    >>> suggest("ResNet2O", ["resnet20", "vgg"])
    'did you mean resnet20?'
    """
    lower = {name.lower(): name for name in known}
    near = [lower[name] for name in difflib.get_close_matches(word.lower(), list(lower), n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(near)}?" if near else None


def suggest_file(path: Path) -> str | None:
    """Suggest the nearest existing names in the folder of a missing file, or None."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return None
    return suggest(path.name, sorted(names))


def public_callables(path: Path) -> list[str]:
    """List the public functions and classes of a file without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def _import_file(path: Path, error: type[PenjingError], role: str) -> ModuleType:
    check_file(str(path), error=error, role=role)
    path = path.resolve()
    # one module name per file, so that SOURCE and TASK in the same file share a module, and two files called
    # network.py do not collide
    digest = hashlib.sha256(os.path.normcase(str(path)).encode()).hexdigest()[:12]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{USER_MODULE}{digest}_{stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, because dataclasses look up their module
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        raise _import_error(str(path), cause, error, role) from cause
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, error: type[PenjingError], role: str) -> ModuleType:
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name and (name == cause.name or name.startswith(cause.name + ".")):
            raise error(
                f"there is no module {name!r}",
                code="no-module",
                got=str(cause),
                expected="a module that Python can import from here",
                remedy=f"install it, change into its folder, or give the file: {name.replace('.', '/')}.py:...",
            ) from cause
        raise _import_error(name, cause, error, role) from cause
    except (Exception, SystemExit) as cause:
        raise _import_error(name, cause, error, role) from cause


def _import_error(where: str, cause: BaseException, error: type[PenjingError], role: str) -> PenjingError:
    return error(
        f"importing the {role}'s code raised {type(cause).__name__}",
        code="import",
        got=f"{cause or type(cause).__name__} ({line_of(cause)})",
        expected=f"{where} to be importable",
        remedy="run it with python and fix what it reports",
    )


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let user code import from its own folder, as if it were run as a script."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
