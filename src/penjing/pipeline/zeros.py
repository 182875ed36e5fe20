"""What zero weights gain in the runtime: the artifact beside a copy with other values in their place.

Both files hold the same operators and shapes, and are timed in turns. What differs is the zeros alone, so a runtime
that makes no use of them needs the same time for both.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from penjing import measure
from penjing.pipeline import evidence
from penjing.pipeline.building import build
from penjing.pipeline.run import Run
from penjing.records import Candidate, Zeros, from_dict
from penjing.records.manifest import Manifest
from penjing.steps.draft import Draft


def gained(run: Run, draft: Draft, chosen: Candidate, manifest: Manifest, structure: Any) -> Zeros | None:
    """How many weights are zero and what that gains; None where no step has draft zeros.

    Args:
        run: For its data, threads and seconds.
        draft: The draft that the candidate was built from.
        chosen: The candidate; its folder stands in the run folder.
        manifest: Of the source, for the order of its inputs.
        structure: How the outputs are nested.
    """
    if stored := run.folder.read_state("zeros"):
        return from_dict(Zeros, stored)
    weights = _marked(draft)
    count = sum(int((w == 0).sum()) for w in weights)
    if not count:
        return None
    with run.costing(f"measure zeros of {chosen.name}"), tempfile.TemporaryDirectory(prefix="penjing-") as aside:
        build(filled(draft, run.seed), chosen.runtime, chosen.precision, run.task, structure, Path(aside))
        inputs = evidence.arrays(manifest, evidence.one_call(run.task, run.batch))
        folders = {"zeros": run.folder.path / chosen.folder, "numbers": Path(aside)}
        timings = measure.compare(
            [measure.Target(name, folder, inputs, run.batch) for name, folder in folders.items()],
            threads=run.threads,
            seconds=run.seconds,
            warmup_seconds=min(0.3, run.seconds),
        )
    rounds = zip(timings["numbers"].rounds, timings["zeros"].rounds, strict=True)
    low, median, high = statistics.quantiles([n / z for n, z in rounds], n=4, method="inclusive")
    gain = Zeros(count=count, weights=sum(w.numel() for w in weights), speedup=median, low=low, high=high)
    run.folder.write_state("zeros", dataclasses.asdict(gain))
    return gain


def filled(draft: Draft, seed: int) -> Draft:
    """A draft with other numbers where pruned weights are zero: the median size of the tensor's others, signs drawn.

    They lie within the range of the weights, so that a plan's integers hold, and none of them rounds to zero.
    """
    draft = draft.copy()
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        for weight in _marked(draft):
            zero = weight == 0
            size = weight[~zero].abs().median() if not zero.all() else weight.new_ones(())
            signs = torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1).to(weight.dtype)
            weight.copy_(torch.where(zero, signs * size, weight))
    return draft


def _marked(draft: Draft) -> list[torch.Tensor]:
    """The pruned tensors, as far as later steps have left them in the network."""
    known = dict(draft.network.named_parameters())
    return [known[name].detach() for name in draft.sparse if name in known]
