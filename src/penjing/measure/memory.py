"""Memory of this process in bytes: current and peak."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, or since `reset_peak`.

    On Linux this is VmHWM, which begins at zero when a program starts. `ru_maxrss` does not: a child inherits
    the peak of the process that started it, so a worker of a large trainer would look as large as the trainer.
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
    """Let the peak begin again at what is resident now; False where the system can't (all but Linux)."""
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets VmHWM, see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def _high_water(status: str) -> int | None:
    """VmHWM of the text of /proc/PID/status, in bytes; None where a kernel leaves it out."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
