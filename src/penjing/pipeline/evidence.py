"""Stored samples with the networks' outputs: what an artifact is compared with, now and by `verify`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing import measure, runtimes
from penjing.errors import ArtifactError, RecordError
from penjing.numerics.suppression import SELECTIONS
from penjing.pipeline.conditioning import rounded_elsewhere
from penjing.records import Parity, reading
from penjing.records.folder import EVIDENCE, STATE, RunFolder, writing
from penjing.records.manifest import Manifest
from penjing.runtimes.artifact import arrange
from penjing.steps.draft import Draft
from penjing.steps.plan import Plan
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs, to_numpy
from penjing.tasks.sample_axes import along_samples
from penjing.tasks.task import Call, Task, calibration_calls

SAMPLES = 32
MOST_BYTES = 1 << 33  # of what is stored
PROBES = (3, 1)
"""Calls of so many samples are compared too, in the same session: some runtimes go wrong when the batch changes."""
FEW = 8  # samples of a first try, which is enough in most cases
COMPARED = "int8"
"""Artifacts of this precision are compared with each other too, across runtimes."""
TRIES = 3  # of rounding elsewhere, at most: one may be lucky


def one_call(task: Task, batch: int) -> Call:
    """One call of `batch` samples from the calibration data, or of the example where there is none.

    Where there are fewer samples they are repeated; a batch that the network is fixed to stays.
    """
    call = task.call()
    if task.calibration is not None:
        call = next(iter(calibration_calls(task, limit=1)))
    if task.dynamic is not None and not any(0 in axes for axes in task.dynamic.values()):
        return task.call()

    def resize(value: torch.Tensor, axis: int) -> torch.Tensor:
        times = -(-batch // value.shape[axis])
        return torch.cat([value] * times, axis).narrow(axis, 0, batch).contiguous()

    return along_samples(call, task.dynamic, resize)


def batch_size(task: Task, size: int) -> int:
    """Samples of one call: `size`, or the number that the network is fixed to."""
    args, kwargs = one_call(task, size)
    first = next(iter([*args, *kwargs.values()]))
    return int(first.shape[0]) if first.dim() else size


def arrays(manifest: Manifest, call: Call) -> list[np.ndarray]:
    """A call as the flat list of arrays that the artifact's runtime takes."""
    args, kwargs = call
    return arrange(
        manifest.programs[0].inputs, tuple(t.numpy() for t in args), {k: t.numpy() for k, t in kwargs.items()}
    )


def store_source(folder: RunFolder, task: Task, manifest: Manifest, outputs: Sequence[torch.Tensor]) -> None:
    """Write the samples and the source network's answers to them (flat outputs)."""
    inputs = arrays(manifest, one_call(task, SAMPLES))
    _write(folder, named("input", inputs) | named("source", [to_numpy(t) for t in outputs]))


def store_planned(folder: RunFolder, task: Task, network: fx.GraphModule, plan: Plan) -> None:
    """Add the chosen network's answers, so that `verify` can compare without torch code."""
    stored = {name: x for name, x in _read(folder).items() if not name.startswith(("planned_", "probe"))}
    simulated = insert(network, plan)
    stored |= named("planned", _outputs(simulated, one_call(task, SAMPLES)))
    for size in PROBES if varies(task) else ():
        stored |= named(f"probe{size}", _tried(simulated, one_call(task, size)) or [])
    _write(folder, stored)


def answers(folder: RunFolder, session: Any) -> list[np.ndarray]:
    """The outputs of an opened artifact for the stored samples."""
    stored = _read(folder)
    outputs: list[np.ndarray] = session.run([stored[k] for k in stored if k.startswith("input_")])
    return outputs


def parity(
    folder: RunFolder,
    task: Task,
    session: Any,
    answers: Sequence[np.ndarray],
    draft: Draft,
    source: fx.GraphModule,
    manifest: Manifest,
) -> tuple[Parity, Parity]:
    """Parity of an artifact with its plan, computed in torch, and with the source network.

    Args:
        folder: With the stored samples.
        task: Gives calls of other sizes, where the batch varies.
        session: The opened artifact; it is called with each of them, and with the stored samples again.
        answers: What it answered to the stored samples at first.
        draft: What it was exported from, its plan empty for a floating-point artifact.
        source: The source network.
        manifest: Of the artifact.
    """
    simulated = insert(draft.network, draft.plan)
    planned = _outputs(simulated, one_call(task, SAMPLES))
    if manifest.precision == COMPARED:
        both = named("planned", planned) | named("answer", answers)
        _write(folder, both, _answers_of(folder, manifest.runtime))
    return compared(originals(folder), task, session, answers, simulated, source, manifest, planned)


def originals(folder: RunFolder) -> list[np.ndarray]:
    """The source network's answers to the stored samples."""
    return [value for name, value in _read(folder).items() if name.startswith("source_")]


def integer_answers(folder: RunFolder, runtime: str) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """A runtime's integers: what their plan answers in torch to the stored samples, and what the artifact did.

    `parity` keeps both while the run lasts; None where it did not.
    """
    path = _answers_of(folder, runtime)
    if not path.exists():
        return None
    stored = _arrays(path)
    plan, artifact = ([x for name, x in stored.items() if name.startswith(word)] for word in ("planned", "answer"))
    return plan, artifact


def _answers_of(folder: RunFolder, runtime: str) -> Path:
    return folder.path / STATE / f"answers-{runtime}.npz"


def compared(
    original: Sequence[np.ndarray],
    task: Task,
    session: Any,
    answers: Sequence[np.ndarray],
    network: fx.GraphModule,
    source: fx.GraphModule,
    manifest: Manifest,
    planned: Sequence[np.ndarray] | None = None,
) -> tuple[Parity, Parity]:
    """As `parity`, with the source network's answers to the samples given, and `answers` the artifact's.

    `network` is the plan's, with its quantizers, and `planned` what that answers, where that is known.
    """
    names = [port.name for port in manifest.programs[0].outputs]
    parts = measure.split(original)
    whole = one_call(task, SAMPLES)
    planned = _outputs(network, whole) if planned is None else planned
    samples = len(planned[0]) if planned and planned[0].ndim else 1
    near = measure.differences(planned, answers, parts, samples)
    far = measure.differences(original, answers, parts, samples)
    for size in (*PROBES, SAMPLES) if varies(task) else ():
        call = whole if size == SAMPLES else one_call(task, size)
        expected = planned if size == SAMPLES else _tried(network, call)
        if expected is None:  # the network itself does not take so few
            continue
        mine = _called(session, arrays(manifest, call), expected, size)
        near = measure.worst(near, measure.differences(expected, mine, parts, size))
        exact = original if size == SAMPLES else _outputs(source, call)
        far = measure.worst(far, measure.differences(exact, mine, parts, size))

    def elsewhere(rounding: float) -> Iterator[Sequence[measure.Difference]]:
        for seed in range(TRIES):
            yield measure.differences(planned, rounded_elsewhere(network, whole, rounding, seed), parts)

    def on_few(rounding: float) -> Sequence[measure.Difference]:
        call = one_call(task, FEW)
        return measure.differences(_outputs(network, call), rounded_elsewhere(network, call, rounding, TRIES), parts)

    few = on_few if varies(task) and samples == SAMPLES else None
    least = measure.limits.SELECTED_DB if selects_boxes(network) else measure.limits.LEAST_DB
    rows = {
        "planned": measure.limits.judged(near, names, manifest.precision, elsewhere, least, few, _rounding(manifest)),
        "source": measure.limits.told(far, names),
    }
    return (
        replace(measure.parity([planned], [answers], "planned"), rows=rows["planned"]),
        replace(measure.parity([original], [answers], "source"), rows=rows["source"]),
    )


def _rounding(manifest: Manifest) -> float:
    """Relative error of the numbers by which the runtime's integer kernels rescale; 0 for other artifacts."""
    integers = manifest.precision.startswith("int8")
    return runtimes.get(manifest.runtime).capabilities(()).rounding if integers else 0.0


def selects_boxes(network: fx.GraphModule) -> bool:
    """Whether boxes are selected in it, whose order changes where two scores are nearly equal."""
    return any(n.target in SELECTIONS for n in network.graph.nodes if n.op == "call_function")


def varies(task: Task) -> bool:
    """Whether the network takes calls of any number of samples."""
    return task.dynamic is None or any(0 in axes for axes in task.dynamic.values())


def _called(session: Any, inputs: list[np.ndarray], expected: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    try:
        outputs: list[np.ndarray] = session.run(inputs)
    except Exception as error:
        raise ArtifactError(
            f"the artifact fails when the batch changes to {size}",
            code="batch",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected=f"{len(expected)} outputs, as the network gives",
            remedy="fix the batch with Task(dynamic={}), or choose another runtime",
        ) from error
    return outputs


def _tried(network: torch.nn.Module, call: Call) -> list[np.ndarray] | None:
    try:
        return _outputs(network, call)
    except Exception:  # a fixed type in the middle of the network, or a size that it refuses
        return None


def _outputs(network: torch.nn.Module, call: Call) -> list[np.ndarray]:
    args, kwargs = call
    with torch.no_grad():
        return [to_numpy(t) for t in flatten_outputs(network(*args, **kwargs))[0]]


def _read(folder: RunFolder) -> dict[str, np.ndarray]:
    return stored(folder.path)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The samples of a run folder and the answers to them, by name.

    Raises:
        RecordError: They are missing or damaged.
    """
    return _arrays(folder / EVIDENCE)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return reading.arrays(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise RecordError(
            "the evidence can't be read",
            code="unreadable",
            got=f"{path}: {error}",
            expected="the samples and answers that the run stored",
            remedy="copy the whole run folder, or run `penjing compress` again",
        ) from None


def _write(folder: RunFolder, stored: dict[str, np.ndarray], path: Path | None = None) -> None:
    aside = folder.path / STATE / EVIDENCE
    with writing(folder.path):
        aside.parent.mkdir(exist_ok=True)
        with aside.open("wb") as file:
            np.savez(file, **stored)  # type: ignore[arg-type]
        os.replace(aside, path or folder.path / EVIDENCE)


def named(prefix: str, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the names that they are stored under."""
    return {f"{prefix}_{i:03d}": value for i, value in enumerate(values)}
