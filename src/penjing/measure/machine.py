"""The machine that figures are measured on, and the versions of what measured them."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil

from penjing.errors import UsageError
from penjing.records import MOST_THREADS, Machine

PACKAGES = (
    "penjing",
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "ai_edge_litert",
    "litert_torch",
    "executorch",
    "ncnn",
    "pnnx",
    "apache-tvm",
    "coremltools",
    "ethos-u-vela",
    "safetensors",
)

# Our spelling → how Linux, macOS and the Arm manuals spell it, in lower case without punctuation.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "f16c": ("f16c",),
    "fma": ("fma",),
    "avx": ("avx", "avx10"),  # Apple writes AVX1.0; Intel's AVX10 is listed by version, "avx10_1"
    "avx2": ("avx2",),
    "avx_vnni": ("avxvnni",),
    "avx_vnni_int8": ("avxvnniint8",),
    "avx_ne_convert": ("avxneconvert",),
    "avx512f": ("avx512f",),
    "avx512bw": ("avx512bw",),
    "avx512vl": ("avx512vl",),
    "avx512_vnni": ("avx512vnni",),
    "avx512_bf16": ("avx512bf16",),
    "avx512_fp16": ("avx512fp16",),
    "avx512_vpopcntdq": ("avx512vpopcntdq",),
    "amx_tile": ("amxtile",),
    "amx_int8": ("amxint8",),
    "amx_bf16": ("amxbf16",),
    "amx_fp16": ("amxfp16",),
    "neon": ("neon", "asimd", "advsimd"),
    "fp16": ("asimdhp", "featfp16"),
    "dotprod": ("asimddp", "featdotprod"),
    "i8mm": ("i8mm", "feati8mm"),
    "bf16": ("bf16", "featbf16"),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme", "featsme"),
    "sme2": ("sme2", "featsme2"),
}

# Numbers of IsProcessorFeaturePresent (winnt.h). Windows does not report VNNI, bf16 or AMX of x86 processors.
_WINDOWS = {"avx": 39, "avx2": 40, "avx512f": 41, "neon": 19, "dotprod": 43, "sve": 46, "i8mm": 66, "bf16": 68}


def check_threads(threads: int) -> int:
    """Return `threads`; raise UsageError if it is not between 1 and `MOST_THREADS`."""
    if not 1 <= threads <= MOST_THREADS:
        raise UsageError("threads is out of range", code="threads", got=threads, expected=f"1 to {MOST_THREADS}")
    return threads


def machine(threads: int) -> Machine:
    """Describe this machine; `threads` is the number of threads that the figures were measured with.

    `cores` counts the physical cores that this process may use, by affinity and container quota. `instruction_sets`
    holds those that neural-network kernels use, spelled the same on every system, without those that the system does
    not report (on Windows: VNNI, bf16 and AMX).
    """
    processor, sets = _processor()
    return Machine(
        processor=processor,
        instruction_sets=sets,
        cores=cores(),
        threads=threads,
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of those installed packages that figures depend on; nothing is imported."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def cores() -> int:
    """Physical cores that this process may use, at least 1."""
    allowed = len({_siblings(cpu) for cpu in _affinity()})
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _quota() or allowed))


def processors() -> tuple[int, ...]:
    """Indices of the logical processors that this process may use, starting with one of every physical core."""
    first: list[int] = []
    second: list[int] = []
    seen: set[str] = set()
    for cpu in _affinity():
        core = _siblings(cpu)
        (second if core in seen else first).append(cpu)
        seen.add(core)
    return tuple(first + second)


def _affinity() -> list[int]:
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # Linux, Windows, FreeBSD
        return sorted(process.cpu_affinity())
    return list(range(psutil.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """Name of the physical core of a logical processor; the processor's index if the system does not report it."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole processors that a container's quota allows (cgroups, v2 then v1), at least 1; None without a quota."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return max(1, math.floor(int(limit) / int(period)))


@functools.cache
def _processor() -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets of the processor."""
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        out = subprocess.run(["sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True, check=False)
        name, words = from_sysctl(out.stdout)
    else:
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        name, words = from_cpuinfo(text)
    return name or platform.processor() or platform.machine(), instruction_sets(words)


def instruction_sets(words: list[str]) -> tuple[str, ...]:
    """The instruction sets among a system's processor features, in our spelling and order.

    >>> instruction_sets(["AVX512VNNI", "sse2", "asimddp"])
    ('avx512_vnni', 'dotprod')
    """
    plain = {re.sub(r"[^a-z0-9]", "", word.lower()) for word in words}
    return tuple(ours for ours, theirs in _SPELLINGS.items() if plain.intersection(theirs))


def from_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Processor name and features from the text of Linux' /proc/cpuinfo (x86 writes "flags", Arm "Features")."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("hardware", "")
    if not name and "cpu part" in fields:  # 64-bit Arm gives numbers only
        name = f"Arm implementer {fields.get('cpu implementer', '?')} part {fields['cpu part']}"
    return name, (fields.get("flags") or fields.get("features", "")).split()


def from_sysctl(text: str) -> tuple[str, list[str]]:
    """Processor name and features from macOS' `sysctl hw.optional machdep.cpu`."""
    name, words = "", []
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        last = key.rpartition(".")[2]
        if last == "brand_string":
            name = value
        elif last in ("features", "leaf7_features"):
            words += value.split()
        elif key.startswith("hw.optional") and value == "1":
            words.append(last)
    return name, words


def _windows() -> tuple[str, tuple[str, ...]]:
    name = ""
    sets: tuple[str, ...] = ()
    if sys.platform == "win32":  # repeated for the type checker, which checks one platform at a time
        import ctypes
        import winreg

        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                name = str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            name = os.environ.get("PROCESSOR_IDENTIFIER", "")
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        sets = tuple(ours for ours in _SPELLINGS if ours in _WINDOWS and present(_WINDOWS[ours]))
    return name or platform.processor() or platform.machine(), sets
