"""An artifact on the device itself: a folder that measures it there, and what it measured back in the record."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from penjing import measure, records, runtimes
from penjing.errors import ArtifactError, OutputError, RecordError
from penjing.measure import meters
from penjing.pipeline import evidence
from penjing.pipeline.verify import batch_of
from penjing.records import Candidate, DeviceRun, Record
from penjing.records.device import read_bench
from penjing.records.files import write_text
from penjing.records.folder import ARTIFACT, EVIDENCE, RECORD, replacing, writing
from penjing.records.lock import locked
from penjing.records.manifest import MANIFEST, Manifest, Port, read_manifest, sample_axes
from penjing.report import html
from penjing.runtimes import isolated, on_device
from penjing.runtimes.artifact import narrowed

BENCH, SAMPLES, COMMANDS = "bench.py", "samples.npz", "COMMANDS.md"
OWN = "the answers of the same artifact on the machine that wrote this folder"
PLANNED = "the torch network with the same quantizers"
_BATCH = 8  # samples that are compared where no run stored any


def write_bench(source: Path | str, out: Path | str, *, threads: int | None = None, force: bool = False) -> Path:
    """Write a folder that measures an artifact on the device where it is to run; returns the folder.

    It holds the artifact's files, samples with the answers that are expected, `bench.py` (Python, NumPy and the runtime
    are all that it needs), and command lines of the runtime's own programs.

    Args:
        source: A run folder, whose stored answers are what the device's are compared with, or an artifact folder.
        out: A new or empty folder.
        threads: Of the runtime there, unless `bench.py --threads` says otherwise; None takes the record's, or 1.
        force: Replace the files of a folder that `penjing bench` wrote.

    Raises:
        ArtifactError: There is no artifact, or its runtime can't open it here where its answers are needed.
        OutputError: The folder holds other files, or can't be written.
    """
    source, out = Path(source), Path(out)
    record = records.read(source) if (source / RECORD).exists() else None
    artifact = source / ARTIFACT if record is not None else source
    manifest = read_manifest(artifact)
    chosen = record.chosen if record is not None else None
    latency = chosen.measured.latency_ms if chosen is not None else None
    batch = latency.batch if latency is not None else 1
    threads = measure.check_threads(threads or (latency.threads if latency is not None else 1))
    program = manifest.programs[0]
    stored = _samples(source, artifact, manifest, record is not None)
    timed = batch_of(source, program.inputs, batch) if record is not None else _drawn(program.inputs, batch)
    files = (MANIFEST, *manifest.files())
    _check_free(out, force)
    remedy = "free some space, or choose another folder"
    with writing(out, what="the folder for the device", remedy=remedy), replacing(out.absolute()) as aside:
        for name in files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / name, aside / name)
        with (aside / SAMPLES).open("wb") as stream:
            np.savez_compressed(stream, **stored, **evidence.named("timed", timed))  # type: ignore[arg-type]
        hashes = {name: measure.sha256(aside / name) for name in (*files, SAMPLES)}
        facts = {
            "runtime": manifest.runtime,
            "precision": manifest.precision,
            "packages": _packages(manifest.runtime),
            "sha256": hashes,
            "artifact": list(manifest.files()),
            "samples": SAMPLES,
            "batch": batch,
            "threads": threads,
            "gpu": runtimes.SPECS[manifest.runtime].place is runtimes.NVIDIA,
            "limits": _limits(manifest, chosen),
            "against": PLANNED if record is not None else OWN,
        }
        write_text(aside / BENCH, _script(manifest, facts))
        write_text(aside / COMMANDS, _commands(manifest, timed, threads))
    return out


def add_device(run: Path | str, bench: Path | str) -> Record:
    """Take what `bench.py` measured on a device into a run's record and report; returns the new record.

    The figures of the same device, runtime and threads that were there before are replaced.

    Args:
        run: The run folder.
        bench: The JSON that `bench.py` wrote.

    Raises:
        RecordError: There is no record, the figures can't be read, or they are of another artifact.
        OutputError: The run folder can't be written.
    """
    folder = Path(run)
    records.read(folder)  # before a lock makes a folder of a wrong name
    with locked(folder, "the run folder"):
        record = records.read(folder)
        measured = read_bench(bench)
        chosen = record.chosen
        ours = chosen.sha256 if chosen is not None else {}
        kinds = (chosen.runtime, chosen.precision) if chosen is not None else ()
        if measured.sha256 != ours or (measured.runtime, measured.precision) != kinds:
            raise RecordError(
                "the device's figures are of another artifact",
                code="another",
                got=f"{measured.runtime} {measured.precision}, {_hashes(measured.sha256)}",
                expected=f"the run's own, {_hashes(ours)}",
                remedy="write the folder for the device with `penjing bench RUN -o bench/`, and run bench.py there",
            )
        others = tuple(d for d in record.devices if _place(d) != _place(measured))
        record = replace(record, devices=(*others, measured))
        html.write(record, folder / "report.html")
        record = replace(record, files=record.files | {"report.html": measure.sha256(folder / "report.html")})
        write_text(folder / RECORD, records.to_json(record))
    return record


def _place(run: DeviceRun) -> tuple[str, str, int, int]:
    return run.device.processor, run.device.system, run.latency_ms.threads, run.latency_ms.batch


def _hashes(sha256: dict[str, str]) -> str:
    return ", ".join(f"{name[:40]} {sha[:12]}" for name, sha in sorted(sha256.items())[:4]) or "no file"


def _samples(source: Path, artifact: Path, manifest: Manifest, run: bool) -> dict[str, np.ndarray]:
    """Inputs, and what the artifact is to answer: as a run stored them, or drawn and answered by the artifact here."""
    if run and (source / EVIDENCE).exists():
        every = evidence.stored(source)
        inputs = [every[name] for name in sorted(every) if name.startswith("input_")]
        expected = [every[name] for name in sorted(every) if name.startswith("planned_")]
        if expected:
            inputs = narrowed(manifest.programs[0].inputs, inputs)
            return evidence.named("input", inputs) | evidence.named("expected", expected)
    inputs = _drawn(manifest.programs[0].inputs, _BATCH)
    outputs = isolated.open_artifact(artifact, 1).run(inputs)
    return evidence.named("input", inputs) | evidence.named("expected", outputs)


def _drawn(ports: tuple[Port, ...], batch: int) -> list[np.ndarray]:
    """Inputs of one call, of normally distributed numbers, and zeros where a type holds integers."""
    generator = np.random.default_rng(0)
    sizes = [
        [n if isinstance(n, int) else batch if i == axis else 8 for i, n in enumerate(port.shape)]
        for port, axis in zip(ports, sample_axes(ports), strict=True)
    ]
    floats = [np.issubdtype(np.dtype(port.dtype), np.floating) for port in ports]
    return [
        (generator.standard_normal(size) if real else np.zeros(size)).astype(port.dtype)
        for port, size, real in zip(ports, sizes, floats, strict=True)
    ]


def _limits(manifest: Manifest, chosen: Candidate | None) -> list[dict[str, Any]]:
    """What every output has to reach: the limits of the precision, lowered where the run had to lower them."""
    limits = measure.limits.of(manifest.precision)
    rows = [row for parity in chosen.parity if parity.against == "planned" for row in parity.rows] if chosen else []
    lowered: dict[str, float] = {}
    for row in rows:
        if row.limit_db is not None:
            lowered[row.output] = min(row.limit_db, lowered.get(row.output, limits.snr_db))
    return [
        {"output": port.name, "snr_db": lowered.get(port.name, limits.snr_db), "equal": limits.equal}
        for port in manifest.programs[0].outputs
    ]


def _packages(runtime: str) -> list[str]:
    """What an opener needs beside NumPy, as its own text says it."""
    needs = re.search(r"Needs: ([^.]*)\.", _module(runtime).LOAD)
    names = needs[1].split(", ") if needs else []
    return [name for name in names if name != "numpy"]


def _module(runtime: str) -> Any:
    return importlib.import_module(runtimes.SPECS[runtime].module)


def _script(manifest: Manifest, facts: dict[str, Any]) -> str:
    """`bench.py`: the measurement, the opener of the runtime's own `load.py`, and the facts."""
    head = _module(manifest.runtime).LOAD.replace("@ALONE@", "").replace("@FOLDER@", ".")
    head = head.replace("@THREADS@", str(facts["threads"]))
    head = re.sub(r'\A""".*?"""\n', "", head, flags=re.DOTALL)  # its own docstring
    meters_alone = inspect.getsource(meters).partition("from __future__ import annotations\n")[2]
    measuring = re.sub(
        r"from penjing\.measure\.meters import .*\n", lambda _: meters_alone, inspect.getsource(on_device)
    )
    return (
        measuring
        + "\n\ndef open_artifact():\n"
        + textwrap.indent(head.strip("\n"), "    ")
        + "\n\n    return run\n\n\n"
        + f"FACTS = json.loads({json.dumps(facts)!r})\n\n"
        + 'if __name__ == "__main__":\n'
        + "    sys.exit(main(FACTS, pathlib.Path(__file__).resolve().parent, open_artifact))\n"
    )


def _commands(manifest: Manifest, timed: Sequence[np.ndarray], threads: int) -> str:
    """Command lines for the device, with the artifact's own names and shapes."""
    ports = manifest.programs[0].inputs
    shapes = {port.name: list(x.shape) for port, x in zip(ports, timed, strict=True)}
    text = getattr(_module(manifest.runtime), "COMMANDS", "")
    sizes = [
        (str(axis), n)
        for port, x in zip(ports, timed, strict=True)
        for axis, n in zip(port.shape, x.shape, strict=True)
        if isinstance(axis, str)
    ]
    words = {
        "@FILE@": manifest.programs[0].files[0],
        "@FILES@": " ".join(manifest.files()),
        "@THREADS@": str(threads),
        "@SHAPES@": ",".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in shapes.items()),
        "@SIZES@": " ".join(dict.fromkeys(f"-f {axis}:{n}" for axis, n in sizes)),
    }
    for word, value in words.items():
        text = text.replace(word, value)
    return _HEADING.replace("@PACKAGES@", " ".join(["numpy", *_packages(manifest.runtime)])) + text


_HEADING = """\
# On the device

With Python:

```
pip install @PACKAGES@
python bench.py --out bench.json
```

Back where the run is: `penjing record add RUN bench.json`.
"""


def _check_free(out: Path, force: bool) -> None:
    """Raise OutputError where the folder is a file, or has files that are not to be replaced."""
    there = {p.name for p in out.iterdir()} if out.is_dir() else set()
    ours: set[str] = set()
    if {BENCH, SAMPLES, MANIFEST} <= there:
        with contextlib.suppress(ArtifactError):
            ours = {BENCH, SAMPLES, COMMANDS, MANIFEST, *read_manifest(out).files()}
    foreign = sorted(there - ours)
    if (out.exists() and not out.is_dir()) or foreign or (there and not force):
        raise OutputError(
            "the folder for the device can't be written there",
            code="foreign",
            got=f"{out} with {', '.join((foreign or sorted(there))[:4])}" if there else f"{out}, a file",
            expected="a new or an empty folder",
            remedy="choose another folder" if foreign or not there else "--force replaces what `penjing bench` wrote",
        )
