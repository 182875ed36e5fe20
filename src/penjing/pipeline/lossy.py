"""Packing with loss: the smallest packed file whose network stays within a limit, in one go.

`share.Grid` gives weights whole numbers of a step; the network is written for ONNX Runtime in floating point, compared
there, and packed (`penjing.storage.packed`). What the same network takes without loss is packed beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing import measure
from penjing.errors import OutputError, UsageError
from penjing.measure import time_limits
from penjing.pipeline.building import build
from penjing.pipeline.quick import Clock, decibels, exported, opened
from penjing.records import Parity
from penjing.records.events import Events, Listener
from penjing.records.folder import ARTIFACT, check_writable
from penjing.records.manifest import MANIFEST, read_manifest
from penjing.report.numbers import figure
from penjing.share import Grid
from penjing.steps.draft import Draft
from penjing.storage import checkpoint, packed
from penjing.tasks.undisturbed import same_process
from penjing.tasks.usercode import never_exiting

RUNTIME = "onnxruntime"


@dataclass(frozen=True, kw_only=True)
class LossyFile:
    """The result of `pack_to`.

    Attributes:
        packed: The file, and what its tensors take.
        lossless_bytes: Of the same network, packed as it is.
        limits: What was asked: "snr_db", "agreement" or "drop" → value.
        figures: The same on the samples that the limit was held on, in torch; always with "snr_db".
        parity: With what was planned, and with the source; measured in the runtime.
        seconds: By stage.
        warnings: What the user should know.
    """

    packed: packed.Packed
    lossless_bytes: int
    limits: dict[str, float]
    figures: dict[str, float]
    parity: tuple[Parity, Parity]
    seconds: dict[str, float]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """What there is to know: bytes with and without loss, the limits, and parity."""
        planned, source = self.parity
        size = self.packed.size_bytes
        held = [f"{_LIMITS[name].format(self.figures[name])} (limit {_LIMITS[name].format(limit)})"
                for name, limit in self.limits.items()]  # fmt: skip
        if "snr_db" not in self.limits:
            held.append(_LIMITS["snr_db"].format(self.figures["snr_db"]))
        return [
            f"{self.packed.path}: {figure(size, 'bytes')}; without loss {figure(self.lossless_bytes, 'bytes')}, "
            f"{self.lossless_bytes / size:.1f}\u00d7 as much",
            f"on samples held out: {', '.join(held)}",
            f"in {RUNTIME}: {decibels(source)} beside the source ({source.samples} samples)"
            + (f", {source.agreement:.1%} in the same class" if source.agreement is not None else "")
            + f"; beside what was planned {decibels(planned)}",
        ]


_LIMITS = {"snr_db": "noise {:.1f} dB", "agreement": "agreement {:.1%}", "drop": "drop {:.4g}"}


@never_exiting()
@same_process()
def pack_to(
    model: Any,
    calibration: Any,
    out: Path | str,
    *,
    snr_db: float | None = None,
    agreement: float | None = None,
    drop: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    listeners: Sequence[Listener] = (),
) -> LossyFile:
    """Pack a network with loss, as far as a limit allows.

    Args:
        model: The network in floating point, or a SOURCE as on the command line; of a run folder or an artifact the
            ONNX file in it.
        calibration: As of `penjing.pipeline.quick.quantize_to`; for `drop` a task with `select`.
        out: The packed file to write.
        snr_db: See `penjing.share.Grid`.
        agreement: See there.
        drop: See there.
        seed: Same seed, data, machine kind and threads: same file.
        threads: None takes every core.
        force: Replace the file.
        listeners: Called with every event (a dict).

    Raises:
        UsageError: A folder holds no network that can be changed.
        SourceError: The network is quantized already, or can't be opened.
        RecipeError: There is no limit, or one makes no sense.
        SharingError: No grid holds the limit.
        OutputError: The file exists, or can't be written.
    """
    asked = {"snr_db": snr_db, "agreement": agreement, "drop": drop}
    step = Grid(snr_db=snr_db, agreement=agreement, drop=drop)
    out = Path(out)
    check_writable(out)
    if out.exists() and not force:
        raise OutputError(
            "the file exists already", code="exists", got=str(out), expected="a new name", remedy="--force replaces it"
        )
    model = _network_of(model)
    events = Events(listeners=tuple(listeners))
    clock = Clock(events)
    used = measure.check_threads(threads or measure.machine(1).cores)
    trials: list[dict[str, Any]] = []
    try:
        context, network, told = opened(clock, model, calibration, RUNTIME, used, seed)
        with clock("Grid"), events.heard(lambda event: trials.append(event) if event["kind"] == "grid" else None):
            draft = step(Draft(network), context)
        with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
            plain, gridded = Path(aside) / "plain", Path(aside) / "gridded"
            plain.mkdir()
            gridded.mkdir()
            done = exported(draft, network, context.task, RUNTIME, "fp32", used, clock, gridded)
            with clock("pack"):
                small = packed.pack(gridded, out, threads=used, force=force)
                build(Draft(network), RUNTIME, "fp32", context.task, done.structure, plain)
                lossless = packed.packed_bytes(plain, [p.name for p in plain.iterdir()])
    finally:
        time_limits.expect_nothing()
    best = max((trial for trial in trials if trial["met"]), key=lambda trial: float(trial["step"]))
    for text in told:
        events("warning", text=text)
    return LossyFile(
        packed=small,
        lossless_bytes=lossless,
        limits={name: value for name, value in asked.items() if value is not None},
        figures={name: best[name] for name in asked if name in best},
        parity=done.parity,
        seconds=clock.seconds,
        warnings=tuple(told),
    )


def _network_of(model: Any) -> Any:
    """The SOURCE; of a run folder or an artifact its ONNX file.

    Raises:
        UsageError: The folder holds another runtime's files, or a checkpoint, from which no network can be built.
    """
    root = Path(model) if isinstance(model, str | Path) else None
    if root is None or not root.is_dir():
        return model
    root = root / ARTIFACT if (root / ARTIFACT).is_dir() else root
    if (root / MANIFEST).is_file():
        manifest = read_manifest(root)
        first = manifest.programs[0].files[0]
        if first.endswith(".onnx"):
            return str(root / first)
        holds = f"an artifact for {manifest.runtime}"
    elif (root / checkpoint.EDITS).is_file():
        holds = "a checkpoint, whose network is not in it"
    else:
        return model
    raise UsageError(
        "this folder holds no network whose weights can be changed",
        code="not-a-network",
        got=f"{root}: {holds}",
        expected="a SOURCE: file.py:factory, or an .onnx, .pt2 or .keras file",
        remedy="without a limit `penjing pack` packs the folder as it is",
    )


__all__ = ["LossyFile", "pack_to"]
