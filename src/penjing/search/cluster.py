"""Trials on a Ray cluster: several at once, each in a process of its own, on machines that see the same run folder.

Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018. Every process gets what was
prepared once. A process that is lost takes its trial with it only for so long: the trial goes on in another one, where
it was. Trials that run side by side disturb each other's timings; those are ratios to the source in the same minute,
and the finalists are timed again, alone, at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from penjing.errors import OutputError
from penjing.pipeline.prepare import Prepared
from penjing.pipeline.run import Run
from penjing.records.events import Events
from penjing.records.folder import RunFolder
from penjing.search.budget import Clock
from penjing.search.choice import Choice, Learning, recipe
from penjing.search.trial import RUN, carry_out, give_up, read
from penjing.train import cluster

AUTO = "auto"  # the cluster of this machine
RETRIES = 3  # times that a trial is begun again whose process was lost
LOOK_S = 5.0  # between two looks at the clock


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """What a worker needs of what was prepared: all but what belongs to the process of the search.

    Attributes:
        network: The source.
        prepared: Fields of `Prepared`.
        run: Fields of its run.
        folder: Of its run.
    """

    network: torch.fx.GraphModule
    prepared: dict[str, Any]
    run: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, prepared: Prepared) -> _Sent:
        run = prepared.run
        fields = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
        # Nobody opens the source again, which may be a file that only this machine has.
        fields["order"] = replace(prepared.order, model="", task=run.task, reference=None, listeners=())
        names = ("task", "seed", "device", "threads", "batch", "seconds", "instruction_sets", "target")
        return cls(
            network=run.network,
            prepared={name: value for name, value in fields.items() if name not in ("run", "original")},
            run={name: getattr(run, name) for name in names},
            folder=run.folder.path.absolute(),
        )

    def opened(self, events: Path) -> Prepared:
        """The same in another process."""
        folder = RunFolder(self.folder, resume=True)
        run = Run(network=self.network, folder=folder, events=Events(events), **self.run)
        return Prepared(run=run, original=None, **self.prepared)


class OnRay:
    """Trials in the processes of a Ray cluster.

    Args:
        prepared: The run.
        clock: Of the search.
        address: "auto" starts a cluster here; else an address that `ray.init` takes.

    Raises:
        MissingDependency: Ray is not installed.
        TrainingError: The cluster can't be reached.
        TaskError: Something of the task can't be sent to another process.
    """

    def __init__(self, prepared: Prepared, clock: Clock, address: str) -> None:
        self.prepared, self.clock = prepared, clock
        self.ray = cluster.ray()
        self._stack = contextlib.ExitStack()
        self._running: dict[Any, tuple[int, Choice, Learning, Path]] = {}
        self._address = address
        self.count = 1

    def __enter__(self) -> Self:
        threads = self.prepared.run.threads
        here = max(1, (os.cpu_count() or 1) // threads)
        address = cluster.LOCAL if self._address == AUTO else self._address
        data = cluster.pickled({"sent": _Sent.of(self.prepared)})
        self._stack.enter_context(cluster.connected(address, here))
        processors = self.ray.cluster_resources().get("CPU", 1)
        self.count = here if address == cluster.LOCAL else max(1, math.floor(processors / threads))
        self._data, self._key = self.ray.put(data), uuid.uuid4().hex
        self._carry_out = self.ray.remote(num_cpus=threads, max_retries=RETRIES)(_carry_out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self.ray.cancel(reference, force=True)
        self._running.clear()
        self._stack.close()

    def submit(self, number: int, choice: Choice, learning: Learning, folder: Path) -> None:
        """Send a trial to the cluster."""
        place = folder.absolute()
        reference = self._carry_out.remote(self._data, self._key, choice, learning, place, os.getcwd(), sys.path)
        self._running[reference] = (number, choice, learning, place)

    def wait(self) -> int:
        """Wait until one of the trials has ended.

        Raises:
            OutOfTime: The time of the search is over.
            PenjingError: What would fail in every trial.
        """
        while True:
            done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=LOOK_S)
            self.clock({"kind": "waiting"})
            if done:
                break
        number, choice, learning, folder = self._running.pop(done[0])
        try:
            self.ray.get(done[0])
        except self.ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except self.ray.exceptions.RayError as error:  # lost again and again
            give_up(folder, choice, recipe(choice, learning), f"its process was lost: {' '.join(str(error).split())}")
        if read(folder) is None:
            raise OutputError(
                "a worker of the cluster writes into another folder",
                code="not-shared",
                got=f"{folder} has no outcome of the trial that ended",
                expected="a run folder that all machines of the cluster see under the same path",
                remedy="--out on a shared file system",
            )
        return number


_opened: dict[str, Prepared] = {}  # of this process, by the key of the search


def _carry_out(
    data: bytes, key: str, choice: Choice, learning: Learning, folder: Path, at: str, path: list[str]
) -> None:
    """What Ray runs in every process."""
    import pickle

    sys.path += [entry for entry in path if entry not in sys.path]
    if os.path.isdir(at):  # another machine may not have it; a data set may name files relatively
        os.chdir(at)
    if key not in _opened:
        _opened.clear()
        (folder / RUN).mkdir(parents=True, exist_ok=True)
        sent: _Sent = pickle.loads(data)["sent"]
        torch.set_num_threads(sent.run["threads"])
        _opened[key] = sent.opened(folder / "events.jsonl")
    prepared = _opened[key]
    prepared.run.events.into(folder / "events.jsonl")
    carry_out(prepared, choice, recipe(choice, learning), folder)
