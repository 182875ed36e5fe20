"""Current and peak memory of this process, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss_bytes() -> int:
    """Current resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process in bytes, since its start or since `reset_peak`.

    On Linux this is VmHWM, which is reset when a program is executed. `ru_maxrss` is not: a child inherits the peak of
    its parent, so a worker of a large trainer would report at least the trainer's memory.
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if _STATUS.exists():
        peak = _high_water(_STATUS.read_text(encoding="ascii", errors="replace"))
        if peak is not None:
            return peak
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def reset_peak() -> bool:
    """Reset the peak to the current resident memory; False if the system does not support it (all but Linux)."""
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets VmHWM, see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def _high_water(status: str) -> int | None:
    """VmHWM in bytes from the text of /proc/PID/status; None if the kernel does not report it."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
