"""A run in progress: what every stage of the pipeline needs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from penjing import measure, runtimes
from penjing.errors import OutputError, UsageError
from penjing.pipeline import targeting
from penjing.pipeline.trial import Trial
from penjing.records import StepCost, Training, from_dict
from penjing.records.events import Events
from penjing.records.folder import SOURCE, RunFolder
from penjing.steps.cache import Cache
from penjing.steps.draft import Draft
from penjing.steps.plan import Capabilities
from penjing.steps.step import Context
from penjing.targets import Target
from penjing.tasks.task import Task


@dataclass(frozen=True)
class Variant:
    """One artifact to build: a runtime and a precision of the whole network."""

    runtime: str
    precision: str

    @property
    def name(self) -> str:
        """For example "openvino-int8"."""
        return f"{self.runtime}-{self.precision}"


@dataclass(kw_only=True)
class Run:
    """One run in progress: what every stage needs, its costs and its warnings.

    Attributes:
        network: The source, captured.
        target: The device that artifacts are for; None: this machine.
        start: The draft that the steps begin with, where it is more than the source: with a plan and edits.
        cache: Statistics that steps share.
        drafts: What each step made, or how it failed, by where it ran, its position and its branch.
        packed: Bytes of packed artifacts, by the hashes of their files.
        sample_s: Seconds that the source took for one sample, measured when its answers were stored.
        costs: Of all stages, those before an interruption among them.
        trainings: Those that came to their end.
    """

    network: fx.GraphModule
    task: Task
    folder: RunFolder
    events: Events
    seed: int
    device: str
    threads: int
    batch: int
    seconds: float
    instruction_sets: tuple[str, ...]
    start: Draft | None = None
    target: Target | None = None
    cache: Cache = field(default_factory=Cache)
    drafts: dict[tuple[str, int, str], Draft | Exception] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    sample_s: float = 0.0
    costs: list[StepCost] = field(init=False)
    trainings: list[Training] = field(init=False)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What an interrupted run has spent and trained counts."""
        self.costs = [from_dict(StepCost, row) for row in self.folder.read_state("costs") or []]
        self.trainings = [from_dict(Training, row) for row in self.folder.read_state("trainings") or []]

    def warn(self, text: str) -> None:
        """Warn the user, now and in the record."""
        self.warnings.append(text)
        self.events("warning", text=text)

    def capabilities(self, runtime: str) -> Capabilities:
        """What a runtime accelerates where the artifact is to run."""
        return targeting.capabilities(runtime, self.instruction_sets, self.target)

    def context(self, runtime: str | None, folder: Path | None) -> Context:
        """What a step is told."""
        # Otherwise nothing that is timed here is of use.
        here = self.target is None and not (runtime and runtimes.absent(runtime))
        trial = Trial(
            runtime=runtime or "torch",
            source=self.network,
            stored=self.folder.path / SOURCE,
            task=self.task,
            threads=self.threads,
            batch=self.batch,
            seconds=self.seconds,
        )
        return Context(
            task=self.task,
            seed=self.seed,
            device=self.device,
            capabilities=self.capabilities(runtime) if runtime else None,
            events=self.events,
            folder=folder,
            source=self.network,
            cache=self.cache,
            latency=trial.latency if runtime and here else None,
            profile=trial.profile if runtime and here and runtimes.SPECS[runtime].times_operators else None,
        )

    @contextmanager
    def costing(self, name: str) -> Iterator[None]:
        """Wall time and peak memory of a stage, and the trainings in it, into the record and the events."""
        curves: list[Any] = []
        self.events("stage", name=name)
        measure.reset_peak()
        start = time.perf_counter()
        with self.events.heard(lambda event: curves.append(event["curve"]) if event["kind"] == "trained" else None):
            yield
        spent = StepCost(
            name=name, wall_s=round(time.perf_counter() - start, 3), peak_memory_bytes=measure.peak_memory_bytes()
        )
        self.costs.append(spent)
        self.folder.write_state("costs", [dataclasses.asdict(cost) for cost in self.costs])
        if curves:
            self.trainings += [from_dict(Training, {"name": name, "curve": curve}) for curve in curves]
            self.folder.write_state("trainings", [dataclasses.asdict(training) for training in self.trainings])


def ends_run(error: Exception) -> bool:
    """Whether an error is not of a candidate's own making: the request, the folder, the disk. All else loses it alone.

    A runtime's process that broke off or took too long is a candidate's failure.
    """
    lost = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OutputError | UsageError | OSError) and not lost
