"""A few real samples and what the networks answer to them: what an artifact is compared with, now and at `verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing import measure
from penjing.folder import EVIDENCE, STATE, RunFolder, writing
from penjing.outputs import flatten_outputs, to_numpy
from penjing.plan import Plan
from penjing.records import Parity
from penjing.runtimes.artifact import Manifest, arrange
from penjing.surgery import insert
from penjing.task import Call, Task, calibration_calls

SAMPLES = 32


def one_call(task: Task, batch: int) -> Call:
    """One call of `batch` samples from the calibration data, or of the example where there is none.

    Where there are fewer samples they are repeated; a batch that the network is fixed to stays.
    """
    call = task.call()
    if task.calibration is not None:
        call = next(iter(calibration_calls(task, limit=1)))
    if task.dynamic is not None and not any(0 in axes for axes in task.dynamic.values()):
        return task.call()

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        times = -(-batch // value.shape[0])
        return torch.cat([value] * times)[:batch].contiguous()

    return tuple(map(resize, call[0])), {k: resize(v) for k, v in call[1].items()}


def batch_size(task: Task, wanted: int) -> int:
    """Samples of one call: as many as are wanted, or the number that the network is fixed to."""
    args, kwargs = one_call(task, wanted)
    first = next(iter([*args, *kwargs.values()]))
    return int(first.shape[0]) if first.dim() else wanted


def arrays(manifest: Manifest, call: Call) -> list[np.ndarray]:
    """A call as the flat list of arrays that the artifact's runtime takes."""
    args, kwargs = call
    return arrange(
        manifest.programs[0].inputs, tuple(t.numpy() for t in args), {k: t.numpy() for k, t in kwargs.items()}
    )


def store_source(folder: RunFolder, task: Task, manifest: Manifest, outputs: Sequence[torch.Tensor]) -> None:
    """Write the samples and the source network's answers to them (flat outputs)."""
    inputs = arrays(manifest, one_call(task, SAMPLES))
    _write(folder, _named("input", inputs) | _named("source", [to_numpy(t) for t in outputs]))


def store_planned(folder: RunFolder, task: Task, network: fx.GraphModule, plan: Plan) -> None:
    """Add the chosen network's answers, so that `verify` can compare without torch code."""
    stored = {name: x for name, x in _read(folder).items() if not name.startswith("planned_")}
    _write(folder, stored | _named("planned", _planned(task, network, plan)))


def parity(folder: RunFolder, task: Task, session: Any, network: fx.GraphModule, plan: Plan) -> tuple[Parity, ...]:
    """How far an artifact's answers are from its plan's, computed in torch, and from the source network's."""
    stored = _read(folder)
    original = [stored[k] for k in stored if k.startswith("source_")]
    outputs = session.run([stored[k] for k in stored if k.startswith("input_")])
    planned = _planned(task, network, plan)
    return (measure.parity([planned], [outputs], "planned"), measure.parity([original], [outputs], "source"))


def _planned(task: Task, network: fx.GraphModule, plan: Plan) -> list[np.ndarray]:
    """What the torch network with the plan's quantizers answers."""
    args, kwargs = one_call(task, SAMPLES)
    with torch.no_grad():
        return [to_numpy(t) for t in flatten_outputs(insert(network, plan)(*args, **kwargs))[0]]


def _read(folder: RunFolder) -> dict[str, np.ndarray]:
    with np.load(folder.path / EVIDENCE, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def _write(folder: RunFolder, stored: dict[str, np.ndarray]) -> None:
    aside = folder.path / STATE / EVIDENCE
    with writing(folder.path):
        aside.parent.mkdir(exist_ok=True)
        with aside.open("wb") as file:
            np.savez(file, **stored)  # type: ignore[arg-type]
        os.replace(aside, folder.path / EVIDENCE)


def _named(prefix: str, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{i:03d}": value for i, value in enumerate(values)}
