"""Bias correction: give every layer back the mean that rounding its weights and inputs took from it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, in
its empirical form. Layers are corrected in the order of execution, each behind its corrected predecessors, in one
pass over one batch instead of one pass a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from penjing.draft import Draft
from penjing.network import flat_inputs, kind, site
from penjing.step import Context
from penjing.surgery import insert
from penjing.task import Call, calibration_calls


def mean_by_channel(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Mean over all axes but one: (…, channels, …) → (channels,), float64."""
    others = [i for i in range(x.dim()) if i != axis % x.dim()]
    return x.detach().mean(others).double()


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Shift the biases of quantized layers so that their outputs keep their means.

    Attributes:
        samples: Calibration samples that the means are taken over, all in one batch.
    """

    per_runtime: ClassVar[bool] = True

    samples: int = 64

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with corrected biases; where nothing is quantized, there is nothing to correct."""
        if not draft.plan:
            return draft
        draft = draft.copy()
        calls = gather(context, self.samples)
        wanted = _means(draft.network, calls)
        corrections = _Corrector(insert(draft.network, draft.plan), wanted).correct(calls)
        with torch.no_grad():
            for layer, shift in corrections.items():
                bias = draft.network.get_submodule(layer).bias
                assert isinstance(bias, torch.Tensor)
                bias += shift.to(bias.dtype)
        return replace(draft)


def gather(context: Context, samples: int) -> Call:
    """The first calibration samples as one call."""
    calls: list[Call] = []
    count = 0
    for call in calibration_calls(context.task):
        calls.append(call)
        count += next(int(t.shape[0]) for t in [*call[0], *call[1].values()] if isinstance(t, torch.Tensor))
        if count >= samples:
            break

    def join(values: list[Any]) -> Any:
        return torch.cat(values)[:samples] if isinstance(values[0], torch.Tensor) and values[0].dim() else values[0]

    sizes = {tuple(t.shape[1:] for t in (*c[0], *c[1].values()) if isinstance(t, torch.Tensor)) for c in calls}
    if len(sizes) > 1:  # batches of different lengths can't be joined: the first tells enough
        return calls[0]
    args = tuple(join([c[0][i] for c in calls]) for i in range(len(calls[0][0])))
    return args, {k: join([c[1][k] for c in calls]) for k in calls[0][1]}


def _correctable(network: fx.GraphModule) -> dict[str, int]:
    """Site → channel axis of the output, for layers that are called once and have a bias."""
    found: dict[str, int] = {}
    calls: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and kind(network, node) in ("conv", "linear"):
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
            if network.get_submodule(str(node.target)).bias is not None:
                found[site(node)] = 1 if kind(network, node) == "conv" else -1
    return {name: axis for name, axis in found.items() if calls.get(name) == 1}


def _means(network: fx.GraphModule, call: Call) -> dict[str, tuple[torch.Tensor, int]]:
    """Site → mean of the layer's output per channel, (channels,), and the channel axis."""
    axes = _correctable(network)
    means: dict[str, tuple[torch.Tensor, int]] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if site(n) in axes:
                means[site(n)] = (mean_by_channel(result, axes[site(n)]), axes[site(n)])
            return result

    with torch.no_grad():
        Observer(network.eval()).run(*flat_inputs(network, call))
    return means


class _Corrector(fx.Interpreter):
    """Runs the quantized network, shifting each layer's output before its successors see it."""

    def __init__(self, network: fx.GraphModule, wanted: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        super().__init__(network.eval())
        self.network = network
        self.wanted = wanted
        self.corrections: dict[str, torch.Tensor] = {}

    def correct(self, call: Call) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.run(*flat_inputs(self.network, call))
        return self.corrections

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = site(n)
        if n.op != "call_function" or name not in self.wanted:
            return result
        wanted, axis = self.wanted[name]
        shift = wanted - mean_by_channel(result, axis)
        self.corrections[name] = shift
        shape = [1] * result.dim()
        shape[axis] = -1
        return result + shift.to(result.dtype).reshape(shape)
