"""Instruction sets that kernels are generated for: how wide a register is, and in which words bits are counted."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A processor to generate for.

    Attributes:
        name: What users write.
        triple: LLVM's target triple; "" is C source for any processor.
        processor: LLVM's name of the processor.
        features: Instructions beyond those of `processor`, as LLVM writes them.
        flags: What /proc/cpuinfo lists where the kernels can run.
        machine: `platform.machine()` there; "" is any.
        register_bits: Width of a vector register.
        registers: How many of them.
        c_flags: What the C compiler is told, for the parts of a library that are C.
        words: The widths in bits whose 1s one instruction counts in every lane.
    """

    name: str
    triple: str = ""
    processor: str = ""
    features: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    machine: str = ""
    register_bits: int = 64
    registers: int = 16
    c_flags: tuple[str, ...] = ()
    words: tuple[int, ...] = (64,)

    def target(self) -> dict[str, Any]:
        """Return what TVM calls a target."""
        # At higher levels loops whose bodies are unrolled already are unrolled again: twice the code, no faster.
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "opt-level": 1}
        if self.processor:
            target["mcpu"] = self.processor
        return target | ({"mattr": list(self.features)} if self.features else {})

    def word(self, channels: int) -> int:
        """Return the width in bits of the words in which so many channels are packed."""
        return next((bits for bits in self.words if bits >= channels), self.words[-1])


INSTRUCTION_SETS = {
    row.name: row
    for row in (
        # LLVM's model of processors with AVX-512 has room for long loops, and puts two copies of a body into each.
        InstructionSet(
            name="x86-vpopcnt", triple="x86_64-linux-gnu", processor="x86-64", machine="x86_64",
            features=(
                *("+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl", "+avx512vpopcntdq", "+avx512bitalg"),
                *("+bmi", "+bmi2", "+crc32", "+f16c", "+fma", "+lzcnt", "+movbe", "+popcnt"),
            ), register_bits=512, registers=32,
            flags=frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vpopcntdq", "avx512_bitalg"}),
            words=(8, 16, 32, 64), c_flags=("-march=x86-64-v4",),
        ),
        # Without an instruction that counts, 1s are looked up by halves of bytes (vpshufb), so bytes are the lanes.
        InstructionSet(
            name="x86-avx2", triple="x86_64-linux-gnu", processor="x86-64-v3", machine="x86_64", register_bits=256,
            flags=frozenset({"avx2", "fma"}), words=(8,), c_flags=("-march=x86-64-v3",),
        ),
        InstructionSet(
            name="aarch64-neon", triple="aarch64-linux-gnu", features=("+neon",), machine="aarch64", register_bits=128,
            registers=32, words=(8,),
        ),
        InstructionSet(name="c", words=(8, 16, 32, 64)),
    )
}  # fmt: skip
"""By name, the fastest of a machine first; "c" runs everywhere."""


def here() -> InstructionSet:
    """Return the fastest instruction set of this processor."""
    return next(row for row in INSTRUCTION_SETS.values() if runs_here(row))


def runs_here(row: InstructionSet) -> bool:
    """Whether this processor has all that the instruction set needs."""
    return row.machine in ("", platform.machine()) and row.flags <= _flags()


def named(name: str) -> InstructionSet:
    """Return an instruction set by its name.

    Raises:
        TargetError: None has this name.
    """
    if name not in INSTRUCTION_SETS:
        raise TargetError(
            "no kernels are generated for this instruction set",
            code="unknown-instruction-set",
            got=name,
            expected=f"one of {', '.join(INSTRUCTION_SETS)}",
        )
    return INSTRUCTION_SETS[name]


def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


__all__ = ["INSTRUCTION_SETS", "InstructionSet", "here", "named", "runs_here"]
