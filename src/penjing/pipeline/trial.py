"""Drafts built and timed during a step: for steps that decide by measured latency."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from penjing import measure
from penjing.pipeline.building import build
from penjing.pipeline.evidence import arrays, one_call
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

REPEATS = 3  # times that a measurement is taken at most while others disturb the machine
STEADY = 0.05  # half of the turns' ratios lie within this part of their median, or the measurement is taken again


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The environment in which drafts are timed.

    Attributes:
        runtime: Its name.
        source: The source network, for the form of its outputs.
        stored: Folder of the source's artifact, for the order of its inputs.
        task: Gives the samples.
        threads: As many as the run measures with.
        batch: Samples of a call.
        seconds: Time for every draft.
    """

    runtime: str
    source: fx.GraphModule
    stored: Path
    task: Task
    threads: int
    batch: int
    seconds: float

    def latency(self, drafts: Sequence[Draft], precision: str) -> list[float]:
        """Latencies in milliseconds, measured in turns: the first's median, the others' as multiples of it.

        Each turn is divided by the first draft's of the same round, for what disturbs the machine meets both; as long
        as these ratios scatter, more turns are taken.
        """
        with tempfile.TemporaryDirectory() as aside:
            targets = [
                measure.Target(str(i), self._built(d, precision, Path(aside) / str(i)), self._inputs(), self.batch)
                for i, d in enumerate(drafts)
            ]
            turns = np.empty((len(drafts), 0))
            for _ in range(REPEATS):
                timings = measure.compare(targets, threads=self.threads, seconds=self.seconds, warmup_seconds=0.3)
                turns = np.hstack([turns, [timings[target.name].rounds for target in targets]])
                low, ratios, high = np.percentile(turns / turns[0], [25, 50, 75], axis=1)
                if ((high - low) <= STEADY * ratios).all():
                    break
        return [float(ratio * np.median(turns[0])) for ratio in ratios]

    def profile(self, draft: Draft, precision: str) -> list[tuple[tuple[str, ...], float]]:
        """Sites and milliseconds of a draft's operators."""
        with tempfile.TemporaryDirectory() as aside:
            folder = self._built(draft, precision, Path(aside) / "draft")
            return [(t.sites, t.ms) for t in isolated.profile(folder, self._inputs(), self.threads)]

    def _built(self, draft: Draft, precision: str, folder: Path) -> Path:
        folder.mkdir()
        args, kwargs = one_call(self.task, 2)
        with torch.no_grad():
            _, structure = flatten_outputs(self.source(*args, **kwargs))
        build(draft, self.runtime, precision, self.task, structure, folder)
        return folder

    def _inputs(self) -> list[np.ndarray]:
        return arrays(read_manifest(self.stored), one_call(self.task, self.batch))
