"""What Arm's compiler for the Ethos-U, `vela`, makes of an INT8 .tflite file: its estimate of cycles and memory.

Vela models the hardware; nothing is measured. Inference times are those of the processing unit alone, without the
operators that it leaves to the processor beside it.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from penjing.errors import ArtifactError, MissingDependency
from penjing.measure import time_limits

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What vela tells of a file.

    Attributes:
        compiler: Its name and version.
        figures: By name with the unit: `cycles`, `npu_cycles`, `inference_ms`, `clock_mhz`, `sram_bytes`,
            `flash_bytes`, `sram_traffic_bytes`, `flash_traffic_bytes`, `macs`, `npu_operators`, `cpu_operators`.
        left: The operators that it leaves to the processor, each with its reason; without the conversions of inputs
            and outputs in floating point, which it always leaves.
    """

    compiler: str
    figures: dict[str, float]
    left: tuple[str, ...]


def missing() -> MissingDependency | None:
    """The error to raise where vela is not installed; None where it is."""
    if importlib.util.find_spec("ethosu") is not None:
        return None
    return MissingDependency(
        "artifacts for an Ethos-U are checked with Arm's compiler",
        code="not-installed",
        got="no package ethos-u-vela",
        expected="ethos-u-vela",
        remedy="pip install 'penjing[ethos-u]'",
    )


def estimate(path: Path, accelerator: str, system: str, memory: str) -> Estimate:
    """Compile a file, and read what vela says of it.

    Args:
        path: A .tflite file.
        accelerator: For example ``ethos-u55-128``.
        system: A system configuration of vela's own file, for example ``Ethos_U55_High_End_Embedded``.
        memory: A memory mode of that file, for example ``Shared_Sram``.

    Raises:
        MissingDependency: Vela is not installed.
        ArtifactError: It can't compile the file, or takes too long.
    """
    refusal = missing()
    if refusal is not None:
        raise refusal
    settings = ["--accelerator-config", accelerator, "--system-config", system, "--memory-mode", memory]
    settings += ["--config", "Arm/vela.ini", "--optimise", "Performance"]
    with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
        command = [sys.executable, "-m", "ethosu.vela", str(path.absolute()), "--output-dir", aside, *settings]
        try:
            limit = time_limits.opening_s(path)
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=aside, check=False)
            told = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            told, done = "it took too long", None
        rows = _summary(Path(aside))
        if done is None or done.returncode or not rows:
            lines = [line.strip() for line in told.splitlines() if line.strip()]
            lines = lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines[-6:]
            raise ArtifactError(
                "vela can't compile the artifact",
                code="vela",
                got=" ".join(lines)[:400] or "no summary",
                expected=f"a network that {accelerator} runs",
                remedy="`vela --supported-ops-report` lists what it takes",
            )
    return Estimate(
        compiler=f"vela {importlib.metadata.version('ethos-u-vela')}", figures=_figures(rows, told), left=_left(told)
    )


def _summary(folder: Path) -> dict[str, str]:
    files = list(folder.glob("*_summary_*.csv"))
    if len(files) != 1:
        return {}
    with files[0].open(newline="", encoding="utf-8") as file:
        return next(iter(csv.DictReader(file)), {})


def _figures(row: dict[str, str], told: str) -> dict[str, float]:
    counts = {
        name: int(match[1]) if (match := re.search(rf"^{unit} operators = (\d+)", told, re.MULTILINE)) else 0
        for name, unit in (("npu_operators", "NPU"), ("cpu_operators", "CPU"))
    }
    return {
        "cycles": float(row["cycles_total"]),
        "npu_cycles": float(row["cycles_npu"]),
        "inference_ms": 1000 * float(row["inference_time"]),
        "clock_mhz": float(row["core_clock"]) / 1e6,
        "sram_bytes": KIB * float(row["sram_memory_used"]),
        "flash_bytes": KIB * (float(row["off_chip_flash_memory_used"]) + float(row["on_chip_flash_memory_used"])),
        "sram_traffic_bytes": float(row["sram_total_bytes"]),
        "flash_traffic_bytes": float(row["off_chip_flash_total_bytes"]) + float(row["on_chip_flash_total_bytes"]),
        "macs": float(row["nn_macs"]),
        **counts,
    }


def _left(told: str) -> tuple[str, ...]:
    """Operators that stay with the processor, by the pairs of lines that vela prints of them."""
    warnings = re.findall(r"^Warning \([\w ]+\) operator: (\S+), ofm: '([^']*)'\n *Reason: (.*)", told, re.MULTILINE)
    rows = [row for row in warnings if row[0] not in ("QUANTIZE", "DEQUANTIZE")]
    return tuple(f"{what} ({name}): {reason}" for what, name, reason in rows)
