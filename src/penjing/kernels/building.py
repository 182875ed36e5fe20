"""From a generated kernel to a loaded shared library: TVM's object code or C source, linked by the C compiler, cached.

Loading a shared library runs its code. The cache lies in the user's own folder, and a library is loaded only if its
bytes have the hash that was written when it was linked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import ArtifactError, MissingDependency
from penjing.kernels.instruction_sets import InstructionSet
from penjing.records import files

C_FLAGS = ("-std=c99", "-O3", "-fPIC", "-ffp-contract=off")


@dataclass(frozen=True)
class Function:
    """A C function ``void name(pointers…, int32_t begin, int32_t end)`` that computes rows of its last pointer.

    Attributes:
        name: In the library.
        pointers: C types of its pointers, such as "const float *".
        program: Called with nothing, its code: a TVM function, or C source.
    """

    name: str
    pointers: tuple[str, ...]
    program: Callable[[], Any]


def compiler() -> str:
    """Return the path of the C compiler: ``$CC``, or ``cc``.

    Raises:
        MissingDependency: There is none.
    """
    path = shutil.which(os.environ.get("CC", "cc"))
    if path is None:
        raise MissingDependency(
            "kernels are linked by a C compiler",
            code="not-installed",
            got=f"no {os.environ.get('CC', 'cc')} on the path",
            expected="cc, or the name of a C compiler in CC",
            remedy="install gcc or clang",
        )
    return path


def cache() -> Path:
    """Return the folder of compiled kernels: ``$PENJING_CACHE/kernels`` or ``~/.cache/penjing/kernels``."""
    return files.cache("kernels")


def library(functions: Sequence[Function], key: str, instructions: InstructionSet, folder: Path | None = None) -> Path:
    """Return the shared library of some functions, built unless the cache has it.

    Args:
        functions: Its functions.
        key: All that the code depends on besides the instruction set and versions: the shapes.
        instructions: What to generate for.
        folder: Of the cache.

    Raises:
        MissingDependency: TVM or a C compiler is missing.
    """
    folder = folder or cache()
    versions = f"{_generator()} {compiler()}"
    if instructions.triple:
        needs_tvm()
        versions += f" {importlib.metadata.version('apache-tvm')}"
    names = ",".join(f.name for f in functions)
    digest = hashlib.sha256(f"{names} {key} {instructions} {versions}".encode()).hexdigest()[:24]
    path = folder / f"{digest}.so"
    if not (path.is_file() and _intact(path)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = link(functions, instructions, Path(scratch))
            path.with_suffix(".sha256").write_text(_hash(built))
            os.replace(built, path)
    return path


@functools.cache
def _generator() -> str:
    """A hash of this room's code: other code makes other cache entries."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def link(
    functions: Sequence[Function],
    instructions: InstructionSet,
    scratch: Path,
    sources: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Build a shared library in the folder `scratch`, from generated functions and more C sources."""
    parts = [scratch / "rows.c"]
    parts[0].write_text("\n".join(["#include <stdint.h>", *map(_rows, functions)]))
    programs = {f.name: f.program() for f in functions}
    sources = (*sources, *(program for program in programs.values() if isinstance(program, str)))
    module = {name: program for name, program in programs.items() if not isinstance(program, str)}
    if module:
        parts.append(scratch / "kernels.o")
        compiled(module, instructions).write_to_file(str(parts[-1]), "o")
    for number, source in enumerate(sources):
        parts.append(scratch / f"source{number}.c")
        parts[-1].write_text(source)
    path = scratch / "library.so"
    _run(
        [
            compiler(),
            *C_FLAGS,
            *instructions.c_flags,
            *flags,
            "-shared",
            "-o",
            str(path),
            *map(str, parts),
            "-lm",
            "-lpthread",
        ]
    )
    return path


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ArtifactError(
            "the C compiler failed on generated code",
            code="not-compiled",
            got=f"{' '.join(command)}: {done.stderr}"[-1500:],
            expected="a C99 compiler that links object files of this machine",
            remedy="name another compiler in CC",
        )


def _rows(function: Function) -> str:
    """C source of ``NAME_rows(void **, begin, end)``, the form that `threads.run` calls."""
    types = ", ".join((*(kind.replace("const ", "") for kind in function.pointers), "int32_t", "int32_t"))
    given = ", ".join(f"a[{i}]" for i in range(len(function.pointers)))
    return (
        f"void {function.name}({types});\n"
        f"void {function.name}_rows(void **a, int32_t begin, int32_t end) {{ {function.name}({given}, begin, end); }}\n"
    )


def compiled(programs: Mapping[str, Any], instructions: InstructionSet) -> Any:
    """Compile TVM functions to machine code with plain C signatures; returns TVM's module.

    TVM's own pipeline makes functions that take its tensors and need its runtime; these are called with pointers and
    need nothing. What they allocate is small and of constant size, and lies on the stack.

    Raises:
        MissingDependency: TVM is not installed.
    """
    tvm = needs_tvm()
    from tvm.tirx import transform as to

    target = tvm.target.Target(instructions.target())
    target = target.with_host(target)
    named = {name: f.with_attr("global_symbol", name).with_attr("calling_conv", 1) for name, f in programs.items()}
    lowered = tvm.ir.transform.Sequential(
        [
            to.BindTarget(target), to.LowerTIRx(), to.StmtSimplify(), to.LowerTIRxOpaque(), to.FlattenBuffer(),
            to.NarrowDataType(32), to.VectorizeLoop(), to.UnrollLoop(), to.StmtSimplify(), to.CommonSubexprElim(),
            to.LowerIntrin(),
        ]
    )(tvm.IRModule(named))  # fmt: skip
    return tvm.get_global_func("target.build.llvm")(lowered, target)


def needs_tvm() -> Any:
    """Import TVM. Raises MissingDependency if it is not installed."""
    try:
        import tvm
    except ImportError as error:
        raise MissingDependency(
            "kernels are generated with TVM",
            code="not-installed",
            got=str(error),
            expected="apache-tvm",
            remedy="pip install 'penjing[tvm]', or generate C: instruction set 'c'",
        ) from None
    return tvm


def assembly(functions: Sequence[Function], instructions: InstructionSet) -> str:
    """Return the assembly of functions, for a processor that need not be this one."""
    programs = {f.name: program for f in functions if not isinstance(program := f.program(), str)}
    return str(compiled(programs, instructions).inspect_source("s"))


def load(path: Path) -> ctypes.CDLL:
    """Load a library of the cache.

    Raises:
        ArtifactError: Its bytes are not those that were linked.
    """
    if not _intact(path):
        raise ArtifactError(
            "a compiled kernel was altered", code="altered", got=str(path), expected="the bytes that were linked",
            remedy="delete the file",
        )  # fmt: skip
    return _loaded(str(path))


@functools.cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(path: Path) -> bool:
    sidecar = path.with_suffix(".sha256")
    return sidecar.is_file() and sidecar.read_text() == _hash(path)


__all__ = ["Function", "assembly", "cache", "compiled", "compiler", "library", "link", "load", "needs_tvm"]
