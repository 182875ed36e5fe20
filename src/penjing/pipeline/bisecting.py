"""Finding the first operator at which an artifact differs from the torch network that it was exported from.

Values in the middle are made outputs of a copy of the artifact and compared, site by site, in the order of execution.
All at once shows where an export went wrong; but a value that is asked for can't be fused away, so what a runtime
makes wrong by joining operators is looked for with one of them asked for at a time, halving the interval.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from penjing import measure
from penjing.network.graph import flat_inputs, kind, site, sites
from penjing.pipeline.evidence import SAMPLES, arrays, one_call
from penjing.records import Parity, Rejection
from penjing.records.manifest import Manifest
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.surgery import insert
from penjing.tasks.outputs import to_numpy
from penjing.tasks.task import Call, Task

NEAR_DB = 10.0  # the noise of the operator that is to blame comes this close to that of the outputs
MOST_BYTES = 2**29  # of values in the middle; beyond it a few samples are compared


def first_difference(
    draft: Draft, task: Task, folder: Path, manifest: Manifest, threads: int, rejection_db: float | None, batch: int
) -> str | None:
    """Site of the first operator whose values differ; None where none does by itself, or none can be looked at.

    Args:
        draft: What the artifact was exported from, its plan empty for a floating-point artifact.
        task: Gives the samples.
        folder: The artifact.
        manifest: Its manifest.
        threads: To open it with.
        rejection_db: What the outputs keep; None where they are not finite.
        batch: Samples of the call that differs.
    """
    try:
        return _Search(draft, task, folder, manifest, threads, rejection_db, batch).first()
    except Exception:  # whoever looks for a reason must not fall over it
        return None


def located(
    rejection: Rejection, parities: Sequence[Parity], draft: Draft, task: Task, folder: Path, manifest: Manifest,
    threads: int,
) -> Rejection:  # fmt: skip
    """The rejection with the first operator that differs.

    Args:
        rejection: Of the artifact.
        parities: Its comparisons.
        draft: As in `first_difference`.
        task: As in `first_difference`.
        folder: As in `first_difference`.
        manifest: As in `first_difference`.
        threads: As in `first_difference`.
    """
    worst = next(
        row for p in parities if p.against == rejection.against for row in p.rows if row.place == rejection.output
    )
    operator = first_difference(draft, task, folder, manifest, threads, rejection.snr_db, worst.batch)
    where = (
        f"the first operator that differs is {operator}"
        if operator
        else "no operator that can be looked at differs by itself; the runtime may join them wrongly"
    )
    return replace(rejection, reason=f"{rejection.reason}; {where}", operator=operator)


class _Search:
    def __init__(
        self, draft: Draft, task: Task, folder: Path, manifest: Manifest, threads: int, worst: float | None, batch: int
    ) -> None:
        self.folder, self.manifest, self.threads = folder, manifest, threads
        self.limit = min(measure.limits.of(manifest.precision).snr_db, (worst if worst is not None else 0.0) + NEAR_DB)
        network = insert(draft.network, draft.plan)
        sizes = [SAMPLES] if batch in (0, SAMPLES) else [SAMPLES, batch]
        self.expected = _values(network, one_call(task, sizes[-1]))
        if sum(value.nbytes for value in self.expected.values()) > MOST_BYTES:
            sizes = [min(size, 4) for size in sizes]
            self.expected = _values(network, one_call(task, sizes[-1]))
        ends = next(node for node in network.graph.nodes if node.op == "output").all_input_nodes
        self.ends = [site(node) for node in ends]
        self.calls = [arrays(manifest, one_call(task, size)) for size in sizes]

    def first(self) -> str | None:
        names = list(self.expected)
        values = self._asked(names)
        names = [name for name in names if name in values]
        for name in names:
            if self._differs(name, values[name]):
                return name
        low, high = -1, len(names) - 1
        if high < 0 or not self._alone(names[high]):  # then it is what gives the outputs, which stands last
            return self.ends[0] if len(self.ends) == 1 and self.ends[0] in self.expected else None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._alone(names[middle]) else (middle, high)
        return names[high]

    def _alone(self, name: str) -> bool:
        values = self._asked([name])
        return name in values and self._differs(name, values[name])

    def _differs(self, name: str, values: np.ndarray) -> bool:
        (part, *_) = measure.split([self.expected[name]])
        (difference,) = measure.differences([self.expected[name]], [values], [part])
        return difference.snr_db < self.limit and difference.signal > 0 or bool(difference.fault)

    def _asked(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Values of the artifact by site, of the sites that its file names and whose shape is torch's."""
        with tempfile.TemporaryDirectory(prefix="penjing-") as aside:
            shown = isolated.expose(self.folder, self.manifest, names, Path(aside))
            session = isolated.open_artifact(aside, self.threads)
            for call in self.calls:
                results = session.run(call)
            del session
        values = dict(zip(shown, results[len(results) - len(shown) :], strict=True))
        return {name: value for name, value in values.items() if value.shape == self.expected[name].shape}


def _values(network: fx.GraphModule, call: Call) -> dict[str, np.ndarray]:
    """Floating-point results of every operator by its site, in the order of execution."""
    nodes = {node: name for name, node in sites(network).items()}
    values: dict[str, np.ndarray] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            first = result[0] if isinstance(result, tuple | list) and result else result
            if n in nodes and kind(network, n) != "fakequantize" and isinstance(first, torch.Tensor):
                if first.is_floating_point():
                    values[nodes[n]] = to_numpy(first)
            return result

    with torch.no_grad():
        Recorder(network).run(*flat_inputs(network, call), enable_io_processing=False)
    return values
