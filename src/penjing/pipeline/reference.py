"""The network that `drop` is against, where that is not the source."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.export import ExportedProgram

from penjing.analyze.cost import cost
from penjing.network import weights
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.repeatable import capture_repeatable
from penjing.pipeline.run import Run
from penjing.records import Measured, Reference
from penjing.sources.source import check_forward, in_single_precision, open_source
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task


@dataclass(frozen=True)
class Original:
    """The network that `drop` is against, where it is not the source.

    Attributes:
        name: How it is called in tables.
        network: Captured.
        weights: SHA-256 of its tensors.
        macs: Of one sample of the task's example.
    """

    name: str
    network: fx.GraphModule
    weights: str
    macs: int

    def row(self, metrics: dict[str, float | None]) -> Reference:
        """Its row in the record."""
        state = self.network.state_dict().values()
        measured = Measured(
            metric=metrics["evaluate"],
            size_bytes=sum(t.numel() * t.element_size() for t in state),
            parameters=sum(p.numel() for p in self.network.parameters()),
            macs=self.macs,
        )
        return Reference(name=self.name, weights=self.weights, measured=measured, selected=metrics["select"])


def original(reference: str | nn.Module | ExportedProgram | None, task: Task) -> Original | None:
    """The network that `drop` is against; None where that is the source.

    Raises:
        SourceError: It can't be opened, or does not take the task's example.
    """
    if reference is None:
        return None
    opened, task, _ = in_single_precision(open_source(reference), task)
    check_forward(opened, task)
    network = capture_repeatable(opened, task)
    macs = sum(row.macs for row in cost(network, task.call()))
    return Original(opened.name, network, weights.fingerprint(network), macs)


def reference_metrics(run: Run, task: Task, original: Original) -> dict[str, float | None]:
    """The metric of the network that `drop` is against, by `evaluate` and by `select` where the task has it."""
    metrics: dict[str, float | None] | None = run.folder.read_state("reference-metrics")
    if metrics is None:
        predict = numpy_predictor(original.network)
        with run.costing("evaluate reference"):
            metrics = {
                name: None if function is None else metric_of(function, predict, "the reference")
                for name, function in (("evaluate", task.evaluate), ("select", task.select))
            }
        run.folder.write_state("reference-metrics", metrics)
    return metrics
