"""Python that the user names on the command line: ``file.py:name`` or ``package.module:name``.

This is the one place where Penjing runs code it is given by name. Names inside records, recipes of other people and
checkpoints never get here.
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

USER_MODULE = "penjing_user_"  # how the modules of files that were named begin
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def split_spec(spec: str) -> tuple[str, str] | None:
    """(file or module, name) of ``file.py:name`` or ``package.module:name``; None where it is something else.

    A colon of a Windows drive is not a separator.

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
    """Raise where ``file.py:name`` names a file that is missing: before anything heavy is imported.

    Raises:
        error: It is missing.
    """
    where = (split_spec(spec) or (spec,))[0]
    if where.endswith(".py") and not Path(where).is_file():
        raise error(
            f"the {role}'s file is missing",
            got=where,
            expected="an existing Python file",
            remedy=suggest_file(Path(where)) or "check the path",
        )


def load_named(where: str, name: str, *, error: type[PenjingError], role: str) -> Any:
    """Import a file or module and return its attribute `name`. A file is imported once, however often it is named.

    Args:
        where: Path of a ``.py`` file, or the dotted name of a module that can be imported from here.
        name: The attribute.
        error: What to raise when that fails: `SourceError` or `TaskError`.
        role: "source" or "task", for the texts.

    Raises:
        error: The file or the attribute is missing, or importing it raised (chained, with file and line).
    """
    module = _import_file(Path(where), error, role) if where.endswith(".py") else _import_module(where, error, role)
    if hasattr(module, name):
        return getattr(module, name)
    public = sorted(n for n, value in vars(module).items() if not n.startswith("_") and _own(value, module))
    raise error(
        f"the {role}'s file has no {name!r}",
        got=f"{where}, which has {', '.join(public[:20]) or 'no public names'}",
        expected=f"a {role} of that name",
        remedy=suggest(name, public) or "check the name after the colon",
    )


def _own(value: Any, module: ModuleType) -> bool:
    """Whether a module defined a value itself; what it imported is not a candidate for a suggestion."""
    if isinstance(value, ModuleType):
        return False
    return not isinstance(value, type | FunctionType) or value.__module__ == module.__name__


def call_named(factory: Callable[[], Any], where: str, *, error: type[PenjingError], role: str) -> Any:
    """Call a factory without arguments, with the imports of its file within reach.

    Raises:
        error: It raised; the original error is chained and its line is named.
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
            got=f"{cause or type(cause).__name__} ({line_of(cause)})",
            expected="a factory that can be called without arguments",
            remedy="call it in a Python shell and fix what it reports",
        ) from cause


@contextlib.contextmanager
def never_exiting() -> Iterator[None]:
    """Code of the user's that ends the process (``sys.exit``) is an error with its line, wherever it is called from.

    Raises:
        TaskError: It did; the exit is chained.
    """
    try:
        yield
    except SystemExit as cause:
        raise TaskError(
            "code of the task or of the network ended the process",
            got=f"sys.exit({'' if cause.code is None else repr(cause.code)}) ({line_of(cause)})",
            expected="code that returns, or raises an error",
            remedy="take the call out, or guard a script's own part with if __name__ == '__main__'",
        ) from cause


def line_of(error: BaseException) -> str:
    """Where the user's own code raised: the innermost line that belongs to neither torch, Penjing nor Python.

    For example ``net.py:12 in forward: x = self.fc(x)``.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()}"
    return line_in(traceback.extract_tb(error.__traceback__)) or "outside the user's code"


def line_in(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """The innermost of these frames that belongs to the user's own code, in words; None where none does."""
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
    """The nearest existing names beside a file that is missing, or None."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return None
    return suggest(path.name, sorted(names))


def public_callables(path: Path) -> list[str]:
    """Names of the public functions and classes of a file, read without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def _import_file(path: Path, error: type[PenjingError], role: str) -> ModuleType:
    check_file(str(path), error=error, role=role)
    path = path.resolve()
    # one name per file, so that SOURCE and TASK of the same file share one module, and two files called
    # network.py do not meet
    digest = hashlib.sha256(os.path.normcase(str(path)).encode()).hexdigest()[:12]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{USER_MODULE}{digest}_{stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
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
        got=f"{cause or type(cause).__name__} ({line_of(cause)})",
        expected=f"{where} to be importable",
        remedy="run it with python and fix what it reports",
    )


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let user code import what lies beside it, as it could if it were the script that runs."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
