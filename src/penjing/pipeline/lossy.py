"""Packing with loss: the smallest packed file whose network stays within a limit, in one go.

`share.Grid` gives weights whole numbers of a step; the network is written for ONNX Runtime in floating point, compared
there, and packed (`penjing.storage.packed`). What the same network takes without loss is packed beside it, and is what
remains where no grid holds the limit, or where grids save nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from penjing import measure
from penjing.errors import OutputError, SharingError, UsageError
from penjing.measure import time_limits
from penjing.numerics import compiled
from penjing.pipeline.building import build
from penjing.pipeline.quick import Clock, decibels, exported, opened
from penjing.records import Parity
from penjing.records.events import Events, Listener
from penjing.records.folder import ARTIFACT, check_writable
from penjing.records.manifest import MANIFEST, read_manifest
from penjing.report.numbers import figure
from penjing.share.grid import LIMITS, Grid
from penjing.steps.draft import Draft
from penjing.steps.step import Context
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
        figures: The same as they were measured in torch; always with "snr_db". Empty where nothing was lost.
        parity: With what was planned, and with the source; measured in the runtime.
        seconds: By stage.
        warnings: What the user should know, such as why nothing was lost.
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
        first = f"{self.packed.path}: {figure(size, 'bytes')}"
        lines = [f"{first}, without loss"]
        if self.figures:
            lines = [
                f"{first}; without loss {figure(self.lossless_bytes, 'bytes')}, "
                f"{self.lossless_bytes / size:.1f}\u00d7 as much",
                ", ".join(
                    f"{words} {form.format(self.figures[name])}"
                    + (f" (limit {form.format(self.limits[name])})" if name in self.limits else "")
                    for name, (words, form) in _LIMITS.items()
                    if name in self.figures
                ),
            ]
        return [
            *lines,
            f"in {RUNTIME}: {decibels(source)} beside the source ({source.samples} samples)"
            + (f", {source.agreement:.1%} in the same class" if source.agreement is not None else "")
            + f"; beside what was planned {decibels(planned)}",
        ]


_LIMITS = {
    "snr_db": ("signal over noise, on samples held out,", "{:.1f} dB"),
    "agreement": ("the same class there for", "{:.1%}"),
    "drop": ("drop of the metric", "{:.4g}"),
}


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
    keep: Sequence[str] = (),
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
        keep: Layers, or parts of the network, whose weights stay as they are.
        seed: Same seed, data, machine kind and threads: same file.
        threads: None takes every core.
        force: Replace the file.
        listeners: Called with every event (a dict).

    Where no grid holds the limit, or grids save nothing, the network is packed as it is, with a warning.

    Raises:
        UsageError: A folder holds no network that can be changed.
        SourceError: The network is quantized already, or can't be opened.
        RecipeError: There is no limit, or one makes no sense.
        SharingError: The network has no weights that could lie on grids.
        TaskError: `drop` without `Task.select`.
        ParityError: ONNX Runtime does not compute what was planned; no file is written.
        OutputError: The file exists, or can't be written.
        MissingDependency: numba is not installed.
    """
    asked = {"snr_db": snr_db, "agreement": agreement, "drop": drop}
    step = Grid(snr_db=snr_db, agreement=agreement, drop=drop, keep=tuple(keep))
    out = Path(out)
    check_writable(out)
    if out.exists() and not force:
        raise OutputError(
            "the file exists already", code="exists", got=str(out), expected="a new name", remedy="--force replaces it"
        )
    compiled.loops("entropy_loops")  # where numba is missing, say so before anything is computed
    model = _network_of(model)
    clock = Clock(Events(listeners=tuple(listeners)))
    used = measure.check_threads(threads or measure.machine(1).cores)
    try:
        context, network, told = opened(clock, model, calibration, RUNTIME, used, seed)
        with clock("Grid"):
            draft, figures, why = _on_grids(step, network, context, clock.events)
        with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
            folders = [Path(aside) / name for name in ("gridded", "plain", "instead")]
            for folder in folders:
                folder.mkdir()
            done = exported(draft, network, context.task, RUNTIME, "fp32", used, clock, folders[0])
            small = _packed(folders[0], out, used, force, clock)
            lossless = small.size_bytes
            if figures:
                with clock("pack"):
                    build(Draft(network), RUNTIME, "fp32", context.task, done.structure, folders[1])
                    lossless = packed.packed_bytes(folders[1], [p.name for p in folders[1].iterdir()])
            if lossless < small.size_bytes:
                figures, why = {}, [f"grids save nothing ({small.size_bytes:,} bytes): packed without loss"]
                done = exported(Draft(network), network, context.task, RUNTIME, "fp32", used, clock, folders[2])
                small = _packed(folders[2], out, used, True, clock)
    finally:
        time_limits.expect_nothing()
    for text in why:
        clock.events("warning", text=text)
    return LossyFile(
        packed=small,
        lossless_bytes=lossless,
        limits={name: value for name, value in asked.items() if value is not None},
        figures=figures,
        parity=done.parity,
        seconds=clock.seconds,
        warnings=(*told, *why),
    )


def _on_grids(
    step: Grid, network: fx.GraphModule, context: Context, events: Events
) -> tuple[Draft, dict[str, float], list[str]]:
    """The draft on grids and its figures; the network itself, no figures, and the reason where no grid is enough."""
    trials: list[dict[str, Any]] = []
    try:
        with events.heard(lambda event: trials.append(event) if event["kind"] == "grid" else None):
            draft = step(Draft(network), context)
    except SharingError as error:
        if error.code != "unreachable":
            raise
        why = f"no grid holds {error.expected} (the nearest: {error.got}): packed without loss"
        return Draft(network), {}, [why]
    best = max((trial for trial in trials if trial["met"]), key=lambda trial: float(trial["step"]))
    return draft, {name: best[name] for name in LIMITS if name in best}, []


def _packed(folder: Path, out: Path, threads: int, force: bool, clock: Clock) -> packed.Packed:
    with clock("pack"):
        return packed.pack(folder, out, threads=threads, force=force)


def _network_of(model: Any) -> Any:
    """The SOURCE; of a run folder or an artifact its ONNX file.

    Raises:
        UsageError: It is a packed file, or a folder of another runtime's files, of integers, or of a checkpoint.
    """
    root = Path(model) if isinstance(model, str | Path) else None
    holds, remedy = "", "without a limit `penjing pack` packs the folder as it is"
    if root is not None and root.is_file() and root.suffix == ".pj":
        holds, remedy = "a packed file", f"penjing unpack {root} -o FOLDER"
    elif root is not None and root.is_dir():
        floats = root / "candidates" / f"{RUNTIME}-fp32"
        root = root / ARTIFACT if (root / ARTIFACT).is_dir() else root
        if (root / MANIFEST).is_file():
            manifest = read_manifest(root)
            if manifest.runtime == RUNTIME and manifest.precision == "fp32":
                return str(root / manifest.programs[0].files[0])
            holds = f"an artifact for {manifest.runtime}, {manifest.precision}"
            if floats.is_dir():
                remedy = f"give {floats}; {remedy}"
        elif (root / checkpoint.EDITS).is_file():
            holds = "a checkpoint, whose network is not in it"
    if not holds:
        return model
    raise UsageError(
        "a limit needs a network in float32, whose weights can be changed",
        code="not-a-network",
        got=f"{root}: {holds}",
        expected=f"file.py:factory, an .onnx, .pt2 or .keras file, or an artifact for {RUNTIME} in fp32",
        remedy=remedy,
    )


__all__ = ["LossyFile", "pack_to"]
