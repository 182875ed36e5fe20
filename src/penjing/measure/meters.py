"""Meters of a machine's energy: RAPL, INA sensors, batteries, and NVML of NVIDIA GPUs.

`penjing bench` writes this file's text into `bench.py`, which runs with Python 3.9 and NumPy alone: nothing of Penjing
is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

SAMPLING_S = 0.05  # between two readings of a power meter


def power_meter(sysfs: pathlib.Path) -> tuple[str, Callable[[], Any]] | None:
    """What the device tells of its energy: the name of a meter and how to read it; None where there is none.

    A function that returns an int tells microjoules since some moment; one that returns a float tells watts.

    Args:
        sysfs: Where Linux shows its meters: /sys.
    """
    zones = [z for z in sorted((sysfs / "class/powercap").glob("*-rapl:?")) if number_of(z / "energy_uj")]
    if zones:
        return "RAPL: the processor package, idle power included", _Counter(zones)
    for chip in sorted((sysfs / "class/hwmon").glob("hwmon*")):
        if text_of(chip / "name").startswith("ina"):
            volts, amperes = sorted(chip.glob("in1_input")), sorted(chip.glob("curr1_input"))
            if volts and amperes:  # millivolts and milliamperes
                name = f"{text_of(chip / 'name')} {text_of(chip / 'in1_label')}".strip()
                return f"{name}: the whole board, idle power included", partial(_watts, volts[0], amperes[0], 1e6)
    for supply in sorted((sysfs / "class/power_supply").glob("*")):
        current, voltage = supply / "current_now", supply / "voltage_now"  # microamperes and microvolts
        if text_of(supply / "status") == "Discharging" and number_of(current) and number_of(voltage):
            return "battery: the whole device, idle power included", partial(_watts, current, voltage, 1e12)
    return None


class _Counter:
    """Microjoules of RAPL zones together; a zone that began again at 0 is continued, where it tells its range."""

    def __init__(self, zones: list[pathlib.Path]) -> None:
        self.zones = zones
        self.last = [0] * len(zones)
        self.before = [0] * len(zones)

    def __call__(self) -> int:
        for place, zone in enumerate(self.zones):
            value = int(number_of(zone / "energy_uj") or 0)
            if value < self.last[place]:
                self.before[place] += int(number_of(zone / "max_energy_range_uj") or 0)
            self.last[place] = value
        return sum(self.last) + sum(self.before)


def gpu_meter(library: str = "libnvidia-ml.so.1") -> tuple[str, Callable[[], Any]] | None:
    """The first NVIDIA GPU's meter, by its driver's library NVML; None where there is none.

    Since Volta it counts energy; before, it tells power alone.
    """
    try:
        nvml = ctypes.CDLL(library)
        handle = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError):
        return None

    def microjoules() -> int:
        counted = ctypes.c_ulonglong()  # millijoules since the driver was loaded
        return (
            1000 * counted.value if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted)) else 0
        )

    def watts() -> float:
        milliwatts = ctypes.c_uint()
        return milliwatts.value / 1e3 if not nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)) else 0.0

    name = "NVML: the first GPU's board, idle power included"
    if hasattr(nvml, "nvmlDeviceGetTotalEnergyConsumption") and microjoules():
        return name, microjoules
    return (name, watts) if hasattr(nvml, "nvmlDeviceGetPowerUsage") and watts() else None


def _watts(first: pathlib.Path, second: pathlib.Path, scale: float) -> float:
    return abs((number_of(first) or 0.0) * (number_of(second) or 0.0)) / scale


@contextlib.contextmanager
def metered(meter: tuple[str, Callable[[], Any]] | None) -> Iterator[dict[str, float]]:
    """Fills in "mj", the millijoules that the block took, where there is a meter."""
    energy: dict[str, float] = {}
    if meter is None:
        yield energy
        return
    read = meter[1]
    before, start = read(), time.perf_counter()
    if isinstance(before, int):
        yield energy
        used = read() - before
        if used > 0:  # a counter that began again at 0 tells nothing
            energy["mj"] = used / 1e3
        return
    watts: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLING_S):
            watts.append(read())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    yield energy
    seconds = time.perf_counter() - start
    over.set()
    sampler.join()
    if watts:
        energy["mj"] = 1e3 * seconds * sum(watts) / len(watts)


def text_of(path: pathlib.Path) -> str:
    """A file's text without spaces around it; empty where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def number_of(path: pathlib.Path) -> float | None:
    """A file's number; None where there is none that can be read."""
    try:
        return float(text_of(path))
    except ValueError:
        return None
