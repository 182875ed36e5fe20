"""Static post-training quantization: ranges from unlabelled data, one pass over it for all values together.

Jacob et al., CVPR 2018; Krishnamoorthi, 2018. Batch norms are folded first; weights are quantized per output
channel, activations per tensor.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import fx, nn

from penjing.errors import RecipeError
from penjing.network.graph import RECURRENT, kind, site, sites
from penjing.quantize import sentinels
from penjing.quantize.affine import scale_and_zero_point, shiftable, weight_range
from penjing.quantize.easing import eased
from penjing.quantize.histogram import Histogram
from penjing.quantize.placement import Placement, place
from penjing.quantize.ranges import ESTIMATORS, estimate
from penjing.quantize.sharing import apart, to_watch
from penjing.quantize.statistics import collect
from penjing.steps.draft import Draft, Edit
from penjing.steps.plan import BIAS_LIMIT, GENERIC, GRIDS, Capabilities, Entry, Formats, Plan, QuantSpec
from penjing.steps.settings import FLAG, NAMES, check, one_of, optional, require, whole
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms, own_weights, recurrent, unfold_attentions
from penjing.tasks.keywords import suggesting

RULES = {
    "weight_bits": whole(2, 8),
    "activation_bits": whole(2, 8),
    "weight_range": one_of("minmax", "mse"),
    "activation_range": one_of(*ESTIMATORS),
    "weight_per": one_of("channel", "tensor"),
    "weight_group": optional(whole()),
    "weight_grid": one_of(*GRIDS),
    "activation_grid": one_of(*GRIDS),
    "weight_symmetric": optional(FLAG),
    "activation_symmetric": optional(FLAG),
    "scale": one_of("free", "power_of_two"),
}
"""Of the fields of `Static` that may differ between operators."""


@suggesting
@dataclass(frozen=True, kw_only=True)
class Static:
    """Quantize weights and activations with ranges that are fixed after calibration.

    Attributes:
        weight_bits: Bits of a weight.
        activation_bits: Bits of an activation.
        weight_range: "minmax" or "mse".
        activation_range: "minmax", "moving_average", "percentile", "mse" or "entropy".
        weight_per: "channel" or "tensor": what shares a scale.
        weight_group: So many neighbouring weights of an output channel share a scale instead; a layer whose channels
            it does not divide keeps one scale a channel.
        weight_grid: "uniform", "powers_of_two" (up to 4 bits) or "additive_powers_of_two" (up to 6).
        activation_grid: The same; unsigned activations take a bit less.
        weight_symmetric: Whether zero points of weights are 0; None is as the runtime wants it.
        activation_symmetric: The same of activations, which are signed then.
        scale: "free", or "power_of_two" for processors that only shift.
        samples: At most so many calibration samples are read.
        exclude: Name patterns (as in ``layer3.*``) of operators that stay in floating point.
        outliers: "keep", or "ease": where an output loses most of its values to a few huge channels of an activation,
            `SmoothQuant`, `SplitOutliers` or floating point is taken, and `Plan.remedy` says which.
        settings: Name pattern → other values of the fields above, down to `scale`, for the operators it matches.
    """

    stage: ClassVar[str] = "quantize"
    per_runtime: ClassVar[bool] = True
    for_floats: ClassVar[bool] = False

    weight_bits: int = 8
    activation_bits: int = 8
    weight_range: str = "mse"
    activation_range: str = "mse"
    weight_per: str = "channel"
    weight_group: int | None = None
    weight_grid: str = "uniform"
    activation_grid: str = "uniform"
    weight_symmetric: bool | None = None
    activation_symmetric: bool | None = None
    scale: str = "free"
    samples: int = 300
    exclude: tuple[str, ...] = ()
    outliers: str = "keep"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, **RULES, samples=whole(), exclude=NAMES, outliers=one_of("keep", "ease"))
        _check_grids("", vars(self))
        if not isinstance(self.settings, Mapping) or not all(isinstance(v, Mapping) for v in self.settings.values()):
            expected = "{'layer3.*': {'activation_range': 'minmax'}}"
            raise RecipeError("Static(settings=...) is not a mapping", got=repr(self.settings), expected=expected)
        for pattern, values in self.settings.items():
            _check_fields(pattern, values)
            for name, value in values.items():
                require(f"Static({name}=...) for {pattern!r}", value, RULES[name])
            _check_grids(f" for {pattern!r}", {**vars(self), **values})

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with batch norms folded and a plan."""
        made = self._quantized(draft, context)
        if self.outliers == "keep":
            return made

        def quantize(changed: Draft, context: Context, floats: tuple[str, ...], **settings: Any) -> Draft:
            return replace(self, exclude=(*self.exclude, *floats), **settings)._quantized(changed, context)

        return eased(quantize, draft, made, context)

    def _quantized(self, draft: Draft, context: Context) -> Draft:
        capabilities = context.capabilities or GENERIC
        draft = draft.copy()
        whole = [name for name, node in sites(draft.network).items() if kind(draft.network, node) == "attention"]
        edits = prepare(draft.network, capabilities, self.exclude)
        names = list(dict.fromkeys([*whole, *sites(draft.network)]))  # an unfolded one can be named as a whole
        excluded = {name: f"excluded by {pattern!r}" for pattern in self.exclude for name in matches(pattern, names)}
        excluded = {name: reason for name, reason in excluded.items() if name in sites(draft.network)}
        for pattern in self.settings:
            matches(pattern, names)
        seen: dict[str, frozenset[int]] = {}  # masks' numbers
        while True:
            placement = place(draft.network, capabilities, excluded, seen)
            values, watched = set(placement.edges.values()), to_watch(draft.network, placement)
            statistics, columns = collect(draft.network, values, context, self.samples, watched)
            shown = {name: signs for name in values if (signs := sentinels.standing_out(statistics[name]))}
            if shown.keys() <= seen.keys():
                break
            seen |= shown
        entries = self._activations(placement, statistics, capabilities)
        entries |= self._cells(draft.network, placement, statistics, capabilities)
        separate = apart(draft.network, placement, entries, statistics, columns)
        entries |= self._weights(draft.network, placement, entries, capabilities)
        entries = {edge: entry for edge, entry in sorted(entries.items()) if edge not in separate.edges}
        plan = Plan(entries, {**placement.floats, **separate.floats})
        return replace(draft, plan=plan, edits=draft.edits + edits)

    def _for(self, name: str) -> Static:
        for pattern, values in self.settings.items():
            if _fits(pattern, name):
                return replace(self, settings={}, **values)
        return self

    def activation_spec(self, capabilities: Capabilities) -> QuantSpec:
        """The format of activations in a runtime."""
        spec = replace(
            capabilities.activation, bits=self.activation_bits, range=self.activation_range, scale=self.scale,
            grid=self.activation_grid,
        )  # fmt: skip
        if self.activation_symmetric is not None:
            # Not narrow: a file has no type of its own for −127..127, and the clip would stand between fused operators.
            spec = replace(spec, symmetric=self.activation_symmetric, signed=self.activation_symmetric, narrow=False)
        return _legal("activations", spec, capabilities, capabilities.activations)

    def weight_spec(self, capabilities: Capabilities, weight: torch.Tensor) -> QuantSpec:
        """The format of a weight (out, …) in a runtime."""
        bits = min(self.weight_bits, capabilities.weight.bits)
        axis = capabilities.weight.axis if self.weight_per == "channel" else None
        spec = replace(
            capabilities.weight, bits=bits, range=self.weight_range, scale=self.scale, grid=self.weight_grid, axis=axis
        )
        if self.weight_symmetric is not None:
            spec = replace(spec, symmetric=self.weight_symmetric)
        if self.weight_group is not None and weight[0].numel() % self.weight_group == 0:
            spec = replace(spec, axis=0, group=self.weight_group)
        return _legal("weights", spec, capabilities, capabilities.weights)

    def _activations(
        self, placement: Placement, statistics: Mapping[str, Histogram], capabilities: Capabilities
    ) -> dict[str, Entry]:
        found: dict[tuple[str, QuantSpec], Entry] = {}
        entries: dict[str, Entry] = {}
        for edge, value in placement.edges.items():
            mine = self._for(edge.rpartition(":")[0])
            spec = mine.activation_spec(capabilities)
            if capabilities.symmetric_products and value in placement.centred and statistics[value].low < 0:
                spec = replace(spec, symmetric=True, signed=True, narrow=False)
            if (value, spec) not in found:
                low, high = estimate(statistics[value], spec)
                scale, zero = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
                found[value, spec] = Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))
            entries[edge] = found[value, spec]
        return entries

    def _weights(
        self,
        network: fx.GraphModule,
        placement: Placement,
        activations: Mapping[str, Entry],
        capabilities: Capabilities,
    ) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for name in placement.weights:
            mine = self._for(name)
            layer = network.get_submodule(name.split("@")[0])
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, torch.Tensor)
            spec = for_layer(mine.weight_spec(capabilities, weight), layer)
            scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
            if isinstance(bias, torch.Tensor) and spec.group is None:
                # A bias is int32 on the grid weight scale × input scale: a dead channel's grid must not be too fine.
                finest = bias.detach().abs() / (BIAS_LIMIT * activations[f"{name}:in0"].scale[0])
                scale = torch.maximum(scale, finest if spec.axis is not None else finest.max())
                scale = shiftable(scale, spec)
            entries[f"{name}:weight"] = Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))
        return entries | self._tables(network, placement.stored, entries, capabilities)

    def _cells(
        self,
        network: fx.GraphModule,
        placement: Placement,
        statistics: Mapping[str, Histogram],
        capabilities: Capabilities,
    ) -> dict[str, Entry]:
        """Of recurrent layers: their matrices (gates·hidden, in) are stored in integers.

        Where the runtime multiplies them in integers too, the input has a grid, on which the state lies as well.
        """
        entries: dict[str, Entry] = {}
        for node in network.graph.nodes:
            name = site(node)
            if kind(network, node) not in RECURRENT or name not in placement.stored:
                continue
            mine = self._for(name)
            matrices = recurrent.weights(network, node)
            spec = replace(mine.weight_spec(capabilities, next(iter(matrices.values()))), group=None)
            if name in placement.floats:
                entries |= {edge: stored_entry(matrix, spec) for edge, matrix in matrices.items()}
                continue
            low, high = estimate(statistics[placement.edges[f"{name}:in0"]], mine.activation_spec(capabilities))
            entries |= recurrent.entries(network, node, max(-low, high), mine.activation_spec(capabilities), spec)
        return entries

    def _tables(
        self, network: fx.GraphModule, names: Iterable[str], layers: Mapping[str, Entry], capabilities: Capabilities
    ) -> dict[str, Entry]:
        """Of weights that are only stored in integers.

        One that a layer multiplies by too has that layer's grid, so that it is stored once.
        """
        grids = {
            id(network.get_submodule(edge.rpartition(":")[0].split("@")[0]).weight): e for edge, e in layers.items()
        }
        modules = {site(n) for n in network.graph.nodes if n.op == "call_module"}
        entries: dict[str, Entry] = {}
        for name in names:
            if name not in modules:
                continue  # a recurrent layer
            layer: Any = network.get_submodule(name.split("@")[0])
            shared = grids.get(id(layer.weight))
            if shared is None or shared.spec.group is not None:
                spec = self._for(name).weight_spec(capabilities, layer.weight)
                shared = stored_entry(layer.weight, for_layer(replace(spec, group=None), layer))
            entries[f"{name}:weight"] = shared
        return entries


def prepare(network: fx.GraphModule, capabilities: Capabilities, exclude: Iterable[str] = ()) -> tuple[Edit, ...]:
    """Edit a network, in place, into the form whose edges are quantized: what stays in floating point is told of it.

    Readers of a tied weight that turn it get one of their own, batch norms are folded, and attentions unfolded. What
    fits a pattern of `exclude` keeps its weight and its attention.
    """
    kept = fitting(exclude, network)
    edits = own_weights(network, kept) + fold_batch_norms(network)
    if "matmul" not in capabilities.integer:
        return edits
    return edits + unfold_attentions(network, kept)


def for_layer(spec: QuantSpec, layer: nn.Module) -> QuantSpec:
    """The format of a layer's weight where its output channels are not the first axis: (in, out/groups, …)."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) or spec.axis is None:
        return spec
    return replace(spec, axis=1 if layer.groups == 1 else None, group=None)


def stored_entry(weight: torch.Tensor, spec: QuantSpec) -> Entry:
    """The grid of a weight that nothing is multiplied by in integers."""
    scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
    return Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))


def _legal(what: str, spec: QuantSpec, capabilities: Capabilities, formats: Formats) -> QuantSpec:
    """The spec, if the runtime has integer kernels for it.

    Raises:
        RecipeError: It has none; says what it takes.
    """
    refusal = formats.refusal(spec)
    if refusal is None:
        return spec
    raise RecipeError(
        f"{capabilities.runtime} has no integer kernel for {what} of this format",
        got=refusal.got,
        expected=refusal.takes,
        remedy="change the step's settings; pj.apply(recipe, model, task) computes any format, in torch alone",
    )


def _check_grids(where: str, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for more bits than the integers of a grid of powers of two fit into 8."""
    for what, sign in (("weight", 1), ("activation", 0)):
        grid, bits = values[f"{what}_grid"], values[f"{what}_bits"]
        most = {"powers_of_two": 3, "additive_powers_of_two": 5}.get(grid, 8) + sign
        if bits > most:
            raise RecipeError(
                f"Static({what}_grid={grid!r}, {what}_bits={bits}){where} can't be used",
                got=f"{bits} bits",
                expected=f"at most {most}: the powers are stored in 8 bits",
            )


def _check_fields(pattern: str, values: Mapping[str, Any]) -> None:
    known = set(RULES)
    if not set(values) <= known:
        raise RecipeError(
            f"the settings for {pattern!r} hold a value that cannot differ between operators",
            got=", ".join(sorted(set(values) - known)),
            expected=f"some of {sorted(known)}",
        )


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith((f"{pattern}.", f"{pattern}/", f"{pattern}@"))


def fitting(patterns: Iterable[str], network: fx.GraphModule) -> set[str]:
    """The sites that fit any of the patterns; none need."""
    return {name for pattern in patterns for name in sites(network) if _fits(pattern, name)}


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that fit a pattern: exactly, as a prefix of module paths, or with the wildcards of `fnmatch`.

    Raises:
        RecipeError: Nothing fits; names the nearest.
    """
    names = list(names)
    found = [n for n in names if _fits(pattern, n)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise RecipeError(
            "a name pattern fits no operator of the network",
            got=repr(pattern),
            expected=f"for example {', '.join(map(repr, near))}",
            remedy="`penjing inspect` lists all names",
        )
    return found
