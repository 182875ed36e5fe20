"""Dynamic quantization of linear and recurrent layers: no calibration, activation ranges are computed at run time.

As in torch's `quantize_dynamic` (2019) and Zafrir et al., "Q8BERT: Quantized 8Bit BERT", EMC2 at NeurIPS 2019, with
per-channel int8 weights. Computing a range at run time costs a pass over the input of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from penjing.analyze.cost import multiplies
from penjing.network.graph import RECURRENT, kind, site, sites
from penjing.quantize.placement import CHECKED
from penjing.quantize.static import fitting, for_layer, matches, stored_entry
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC, Capabilities, Entry, Plan, QuantSpec
from penjing.steps.settings import NAMES, check, one_of, whole
from penjing.steps.step import Context
from penjing.surgery import own_weights, recurrent


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Quantize the weights of linear layers and LSTMs; their activations are quantized to 8 bits at run time.

    Everything else stays in floating point. No calibration data is needed.

    Attributes:
        weight_bits: Bits of a weight.
        weight_range: "minmax" or "mse".
        exclude: Name patterns (as in ``layer3.*``) of layers that stay in floating point.
    """

    stage: ClassVar[str] = "quantize at run time"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    weight_bits: int = 8
    weight_range: str = "mse"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, weight_bits=whole(2, 8), weight_range=one_of("minmax", "mse"), exclude=NAMES)

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with a plan; its network is unchanged, except that transposed tied weights are untied."""
        capabilities = context.capabilities or GENERIC
        draft = draft.copy()
        edits = own_weights(draft.network, fitting(self.exclude, draft.network))
        names = list(sites(draft.network))
        floats = {name: f"excluded by {pattern!r}" for pattern in self.exclude for name in matches(pattern, names)}
        entries: dict[str, Entry] = {}
        for node in draft.network.graph.nodes:
            name, what = site(node), kind(draft.network, node)
            if name in floats:
                continue
            if what in capabilities.stored and node.op == "call_module":
                table: Any = draft.network.get_submodule(str(node.target))
                entries[f"{name}:weight"] = self._weight(table.weight, capabilities, table)
            if what not in (*CHECKED, *RECURRENT) and not multiplies(draft.network, node):
                continue
            if (reason := _refusal(draft.network, node, what, capabilities)) is not None:
                floats[name] = reason
                continue
            assert capabilities.dynamic is not None
            entries[f"{name}:in0"] = Entry(capabilities.dynamic)
            if what in RECURRENT:
                matrices = recurrent.weights(draft.network, node)
                entries |= {edge: self._weight(weight, capabilities) for edge, weight in matrices.items()}
            else:
                layer: Any = draft.network.get_submodule(str(node.target))
                entries[f"{name}:weight"] = self._weight(layer.weight, capabilities)
        plan = Plan(dict(sorted(entries.items())), floats)
        return replace(draft, plan=plan, edits=draft.edits + edits)

    def _weight(self, weight: torch.Tensor, capabilities: Capabilities, layer: nn.Module | None = None) -> Entry:
        bits = min(self.weight_bits, capabilities.weight.bits)
        spec: QuantSpec = replace(capabilities.weight, bits=bits, range=self.weight_range)
        return stored_entry(weight, spec if layer is None else for_layer(spec, layer))


def _refusal(network: fx.GraphModule, node: fx.Node, what: str, capabilities: Capabilities) -> str | None:
    """The reason why a node stays in floating point; None if it is quantized."""
    if what in RECURRENT:
        if what not in capabilities.recurrent:
            refusal = f"{capabilities.without_kernel(what)} that takes its ranges at run time"
            return f"{refusal}: quantize.Static has them from calibration" if what in capabilities.integer else refusal
        return recurrent.refusal(network, node)
    if what != "linear":
        return "its range would be taken at run time, and that is done for linear and recurrent layers alone"
    if node.op != "call_module":
        return "its weight is computed, not stored"
    if capabilities.dynamic is None:
        return f"{capabilities.runtime} takes no ranges at run time on this processor"
    layer = network.get_submodule(str(node.target))
    assert isinstance(layer, nn.Linear)
    group = capabilities.dynamic.group
    if group is not None and layer.in_features % group:
        return (
            f"its {layer.in_features} inputs are not a multiple of the {group} that share a scale in "
            f"{capabilities.runtime}"
        )
    if layer.weight.dtype != torch.float32:
        return f"its weight is {layer.weight.dtype}"
    return None
