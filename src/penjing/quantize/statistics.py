"""Histograms of the values that need a range, collected once for all steps on the same network and data."""

from __future__ import annotations

from collections.abc import Collection
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
    reach: dict[str, float]  # largest finite magnitudes


def collect(
    network: fx.GraphModule,
    values: set[str],
    context: Context,
    samples: int,
    columns: Collection[str] = (),
    reach: Collection[str] = (),
) -> Statistics:
    """Collect histograms of the named values over the calibration data in one pass, and more of some.

    What is collected is cached in `context.cache` and reused.

    Args:
        network: The network.
        values: Names of nodes whose histograms are needed.
        context: With the calibration data.
        samples: How many of them are used.
        columns: Names of nodes whose columns are needed, too.
        reach: Names of nodes whose largest magnitude is needed, whatever else they hold.
    """
    key = cache_key(Statistics, network, context, samples)
    statistics = context.cache.once(key, lambda: Statistics({}, {}, {}))
    both = ((values, statistics.histograms), (columns, statistics.columns), (reach, statistics.reach))
    histograms, watched, magnitudes = (sorted(set(names) - known.keys()) for names, known in both)
    if histograms or watched or magnitudes:
        more = Statistics(
            {name: Histogram() for name in histograms},
            {name: Columns() for name in watched},
            dict.fromkeys(magnitudes, 0.0),
        )
        _observe(network, more, context, samples)
        statistics.histograms.update(more.histograms)
        statistics.columns.update(more.columns)
        statistics.reach.update(more.reach)
    return statistics


def _observe(network: fx.GraphModule, statistics: Statistics, context: Context, samples: int) -> None:
    histograms, columns, reach = statistics

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in histograms and isinstance(result, torch.Tensor):
                histograms[n.name].update(result, share=share, more=more)  # of the observer below
            if n.name in columns and isinstance(result, torch.Tensor):
                columns[n.name].update(result)
            if n.name in reach and isinstance(result, torch.Tensor) and result.numel():
                reach[n.name] = max(reach[n.name], float(result.detach().float().nan_to_num(0, 0, 0).abs().max()))
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
