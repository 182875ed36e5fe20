"""Histograms of the values that need a range, collected once for all steps on the same network and data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from penjing.analyze.samples import cache_key, in_chunks
from penjing.network.graph import flat_inputs
from penjing.quantize.histogram import Histogram
from penjing.quantize.shared_scales import Columns
from penjing.steps.step import Context
from penjing.tasks.sample_axes import size_of


class Statistics(NamedTuple):
    """Statistics of a network's values, by node name."""

    histograms: dict[str, Histogram]
    columns: dict[str, Columns]


def collect(
    network: fx.GraphModule, values: set[str], context: Context, samples: int, columns: Collection[str] = ()
) -> Statistics:
    """Collect histograms of the named values over the calibration data, and column statistics of some, in one pass.

    They are cached in `context.cache`; what was collected before is reused.
    """
    key = cache_key(Statistics, network, context, samples)
    statistics = context.cache.once(key, lambda: Statistics({}, {}))
    new, beside = values - set(statistics.histograms), set(columns) - set(statistics.columns)
    if new | beside:
        more = {name: Histogram() for name in sorted(new)}
        watched = {name: Columns() for name in sorted(beside)}
        _observe(network, more, watched, context, samples)
        statistics.histograms.update(more)
        statistics.columns.update(watched)
    return statistics


def _observe(
    network: fx.GraphModule,
    histograms: Mapping[str, Histogram],
    columns: Mapping[str, Columns],
    context: Context,
    samples: int,
) -> None:
    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in histograms and isinstance(result, torch.Tensor):
                histograms[n.name].update(result, share=share, more=more)  # of the observer below
            if n.name in columns and isinstance(result, torch.Tensor):
                columns[n.name].update(result)
            return result

    network.eval()
    observer = Observer(network)
    done = 0
    with torch.no_grad():
        for batch in in_chunks(context, network, samples):
            share = 1 / len(batch)
            for i, call in enumerate(batch):
                more = i > 0
                observer.run(*flat_inputs(network, call))
                done += size_of(call)
                context.events("progress", label="calibrate", done=done, total=samples)
