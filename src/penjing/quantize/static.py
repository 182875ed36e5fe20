"""Static post-training quantization: ranges from unlabelled data, in one pass for all values.

Jacob et al., CVPR 2018; Krishnamoorthi, 2018. Batch norms are folded first; weights are quantized per channel,
activations per tensor.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import fx, nn

from penjing.analyze.samples import in_chunks
from penjing.errors import RecipeError
from penjing.network.graph import RECURRENT, kind, site, sites
from penjing.quantize import few_integers, mask_values, pixels
from penjing.quantize.affine import centred_where_cheap, representable, scale_and_zero_point, weight_range
from penjing.quantize.histogram import Histogram
from penjing.quantize.outlier_mitigation import mitigated
from penjing.quantize.placement import Placement, place
from penjing.quantize.ranges import ESTIMATORS, estimate
from penjing.quantize.shared_scales import SAMPLES, apart, to_watch
from penjing.quantize.statistics import collect
from penjing.steps.draft import Draft, Edit
from penjing.steps.plan import BIAS_LIMIT, GENERIC, GRIDS, Capabilities, Entry, Formats, Plan, QuantSpec
from penjing.steps.settings import FLAG, NAMES, check, one_of, optional, require, whole
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms, own_weights, recurrent, unfold_attentions, unfold_self_gates
from penjing.surgery.self_gates import GATES
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
    "weight_entries": optional(whole(2, 128)),
    "weight_symmetric": optional(FLAG),
    "activation_symmetric": optional(FLAG),
    "scale": one_of("free", "power_of_two"),
}
"""Rules for the fields of `Static` that may differ between operators."""

DECOMPOSED = ("attention", *GATES)
"""Kinds that `prepare` replaces by their operators where a runtime has integer kernels for these."""


@suggesting
@dataclass(frozen=True, kw_only=True)
class Static:
    """Quantize weights and activations with ranges that are fixed after calibration.

    Attributes:
        weight_bits: Bits of a weight.
        activation_bits: Bits of an activation.
        weight_range: "minmax" or "mse".
        activation_range: "minmax", "moving_average", "percentile", "mse" or "entropy".
        weight_per: "channel" or "tensor": the granularity of weight scales.
        weight_group: Group size: that many neighbouring weights of an output channel share a scale. A layer whose input
            channels it does not divide has per-channel scales.
        weight_grid: "uniform", "powers_of_two" (up to 4 bits) or "additive_powers_of_two" (up to 6).
        activation_grid: The same for activations; unsigned ones take one bit less.
        weight_entries: How many different integers a weight tensor has at most. The fewer, the smaller the file is when
            it is packed; it runs as before. `QAT` trains them. Matrices of recurrent layers keep all of theirs.
        weight_symmetric: Whether weights have a zero point of 0; None follows the runtime.
        activation_symmetric: The same for activations, which are then signed; None follows the runtime.
        scale: "free", or "power_of_two" for processors that rescale by shifting.
        samples: Largest number of calibration samples to read.
        exclude: Name patterns (such as ``layer3.*``) of operators that stay in floating point.
        outliers: "keep", or "mitigate": if a few outlier channels cost an output most of its signal, apply
            `SmoothQuant`, `SplitOutliers` or floating point, and record which in `Plan.remedy`.
        settings: Name pattern → overrides of the fields above, down to `scale`, for the operators it matches.
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
    weight_entries: int | None = None
    weight_symmetric: bool | None = None
    activation_symmetric: bool | None = None
    scale: str = "free"
    samples: int = 300
    exclude: tuple[str, ...] = ()
    outliers: str = "keep"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, **RULES, samples=whole(), exclude=NAMES, outliers=one_of("keep", "mitigate"))
        _check_grids("", vars(self))
        few_integers.check("", vars(self))
        if not isinstance(self.settings, Mapping) or not all(isinstance(v, Mapping) for v in self.settings.values()):
            expected = "{'layer3.*': {'activation_range': 'minmax'}}"
            raise RecipeError(
                "Static(settings=...) is not a mapping",
                code="settings",
                field="settings",
                got=repr(self.settings),
                expected=expected,
            )
        for pattern, values in self.settings.items():
            _check_fields(pattern, values)
            for name, value in values.items():
                require(f"Static({name}=...) for {pattern!r}", value, RULES[name], field=name)
            _check_grids(f" for {pattern!r}", {**vars(self), **values})
            few_integers.check(f" for {pattern!r}", {**vars(self), **values})

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with batch norms folded and a plan."""
        quantized = self._quantized(draft, context)
        if self.outliers == "keep":
            return quantized

        def quantize(changed: Draft, context: Context, floats: tuple[str, ...], **settings: Any) -> Draft:
            return replace(self, exclude=(*self.exclude, *floats), **settings)._quantized(changed, context)

        return mitigated(quantize, draft, quantized, context)

    def _quantized(self, draft: Draft, context: Context) -> Draft:
        capabilities = context.capabilities or GENERIC
        draft = draft.copy()
        whole = [name for name, node in sites(draft.network).items() if kind(draft.network, node) in DECOMPOSED]
        edits = prepare(draft.network, capabilities, self.exclude)
        names = list(dict.fromkeys([*whole, *sites(draft.network)]))  # what is decomposed can be named as a whole
        excluded = {name: f"excluded by {pattern!r}" for pattern in self.exclude for name in matches(pattern, names)}
        excluded = {name: reason for name, reason in excluded.items() if name in sites(draft.network)}
        for pattern in self.settings:
            matches(pattern, names)
        seen: dict[str, frozenset[int]] = {}  # values far beyond all others
        distant: set[str] = set()  # those that are not masks
        reach: Mapping[str, float] = {}
        beside = mask_values.beside(draft.network)
        while True:
            placement = place(draft.network, capabilities, excluded, seen, distant, reach)
            values, watched = set(placement.edges.values()), to_watch(draft.network, placement)
            statistics, columns, near = collect(draft.network, values, context, self.samples, watched, beside)
            revealed = {name: signs for name in values if (signs := mask_values.standing_out(statistics[name]))}
            if revealed.keys() <= seen.keys() and near == reach:
                break
            seen, reach = seen | revealed, near
            distant |= {name for name in revealed if not mask_values.alike(statistics[name])}
        known = pixels.grids(draft.network, context.task.call())
        entries = self._activations(placement, statistics, capabilities, known)
        entries |= self._cells(draft.network, placement, statistics, capabilities)
        few = (call for batch in in_chunks(context, draft.network, SAMPLES) for call in batch)
        separate = apart(draft.network, placement, entries, statistics, columns, few)
        entries |= self._weights(draft.network, placement, entries, capabilities)
        counts = {edge: self._for(edge.rpartition(":")[0]).weight_entries for edge in entries}
        entries |= few_integers.chosen(draft.network, entries, counts, context, self.samples)
        entries = {edge: entry for edge, entry in sorted(entries.items()) if edge not in separate.edges}
        plan = Plan(entries, {**placement.floats, **separate.floats})
        return replace(draft, plan=plan, edits=draft.edits + edits)

    def _for(self, name: str) -> Static:
        for pattern, values in self.settings.items():
            if _fits(pattern, name):
                return replace(self, settings={}, **values)
        return self

    def _scale(self, runtime: QuantSpec) -> str:
        return self.scale if self.scale != "free" else runtime.scale

    def activation_spec(self, capabilities: Capabilities) -> QuantSpec:
        """Return the format of activations in a runtime."""
        spec = replace(
            capabilities.activation, bits=self.activation_bits, range=self.activation_range,
            scale=self._scale(capabilities.activation), grid=self.activation_grid,
        )  # fmt: skip
        if self.activation_symmetric is not None:
            # Not narrow: files have no type for −127..127, and a clip would separate operators that are fused.
            spec = replace(spec, symmetric=self.activation_symmetric, signed=self.activation_symmetric, narrow=False)
        return _legal("activations", spec, capabilities, capabilities.activations)

    def weight_spec(self, capabilities: Capabilities, weight: torch.Tensor) -> QuantSpec:
        """Return the format of a weight (out, …) in a runtime."""
        bits = min(self.weight_bits, capabilities.weight.bits)
        axis = capabilities.weight.axis if self.weight_per == "channel" else None
        spec = replace(
            capabilities.weight, bits=bits, range=self.weight_range, scale=self._scale(capabilities.weight),
            grid=self.weight_grid, axis=axis,
        )  # fmt: skip
        if self.weight_symmetric is not None:
            spec = replace(spec, symmetric=self.weight_symmetric)
        if self.weight_group is not None and weight[0].numel() % self.weight_group == 0:
            spec = replace(spec, axis=0, group=self.weight_group)
        return _legal("weights", spec, capabilities, capabilities.weights)

    def _activations(
        self,
        placement: Placement,
        statistics: Mapping[str, Histogram],
        capabilities: Capabilities,
        known: Mapping[str, tuple[float, int]],
    ) -> dict[str, Entry]:
        by_value: dict[tuple[str, QuantSpec], Entry] = {}
        entries: dict[str, Entry] = {}
        for edge, value in placement.edges.items():
            mine = self._for(edge.rpartition(":")[0])
            spec = mine.activation_spec(capabilities)
            if capabilities.symmetric_products and value in placement.centred and statistics[value].low < 0:
                spec = replace(spec, symmetric=True, signed=True, narrow=False)
            if value in known and pixels.fits(spec):
                step, first = known[value]
                by_value[value, spec] = Entry(spec, (step,), (first,))
            elif capabilities.centred_db and mine.activation_symmetric is None and value in placement.padded:
                spec = centred_where_cheap(spec, estimate(statistics[value], spec), capabilities.centred_db)
            if (value, spec) not in by_value:
                low, high = estimate(statistics[value], spec)
                scale, zero = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
                by_value[value, spec] = Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))
            entries[edge] = by_value[value, spec]
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
                # A bias is int32 on the grid weight scale × input scale: a dead channel's scale must not be too small.
                finest = bias.detach().abs() / (BIAS_LIMIT * activations[f"{name}:in0"].scale[0])
                scale = torch.maximum(scale, finest if spec.axis is not None else finest.max())
                scale = representable(scale, spec)
            entries[f"{name}:weight"] = Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))
        return entries | self._tables(network, placement.stored, entries, capabilities)

    def _cells(
        self,
        network: fx.GraphModule,
        placement: Placement,
        statistics: Mapping[str, Histogram],
        capabilities: Capabilities,
    ) -> dict[str, Entry]:
        """Entries of recurrent layers, whose matrices (gates·hidden, in) are stored in integers.

        If the runtime also multiplies them in integers, the input has a grid, which the hidden state shares.
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
        """Entries of weights that are only stored in integers.

        One that a layer also multiplies by takes that layer's grid, so that it is stored once.
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
    """Prepare a network for quantization, in place, and return the edits.

    Tied weights are untied where a reader transposes them, batch norms are folded, and attentions, SiLUs and
    hard swishes are decomposed, except in operators that match a pattern of `exclude`.
    """
    in_floats = fitting(exclude, network)
    edits = own_weights(network, in_floats) + fold_batch_norms(network)
    if "matmul" in capabilities.integer:
        edits += unfold_attentions(network, in_floats)
    return edits + unfold_self_gates(network, capabilities.integer, in_floats)


def for_layer(spec: QuantSpec, layer: nn.Module) -> QuantSpec:
    """Return the format for a layer's own weight layout; a transposed convolution's is (in, out/groups, …)."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) or spec.axis is None:
        return spec
    return replace(spec, axis=1 if layer.groups == 1 else None, group=None)


def stored_entry(weight: torch.Tensor, spec: QuantSpec) -> Entry:
    """Return the grid of a weight that is stored in integers and dequantized before use."""
    scale, zero = scale_and_zero_point(*weight_range(weight, spec), spec)
    return Entry(spec, tuple(scale.tolist()), tuple(zero.tolist()))


def _legal(what: str, spec: QuantSpec, capabilities: Capabilities, formats: Formats) -> QuantSpec:
    """Return the spec if the runtime has integer kernels for it.

    Raises:
        RecipeError: It has none; the error lists the formats it supports.
    """
    refusal = formats.refusal(spec)
    if refusal is None:
        return spec
    raise RecipeError(
        f"{capabilities.runtime} has no integer kernel for {what} of this format",
        code="no-kernel",
        got=refusal.got,
        expected=refusal.takes,
        remedy="change the step's settings; pj.apply(recipe, model, task) simulates any format in torch",
    )


def _check_grids(where: str, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for more bits than a power-of-two grid can represent in 8-bit integers."""
    for what, sign in (("weight", 1), ("activation", 0)):
        grid, bits = values[f"{what}_grid"], values[f"{what}_bits"]
        most = {"powers_of_two": 3, "additive_powers_of_two": 5}.get(grid, 8) + sign
        if bits > most:
            raise RecipeError(
                f"Static({what}_grid={grid!r}, {what}_bits={bits}){where} can't be used",
                code="settings",
                field=f"{what}_bits",
                got=f"{bits} bits",
                expected=f"at most {most}: the powers are stored in 8 bits",
            )


def _check_fields(pattern: str, values: Mapping[str, Any]) -> None:
    known = set(RULES)
    if not set(values) <= known:
        raise RecipeError(
            f"the settings for {pattern!r} hold a value that cannot differ between operators",
            code="unknown-setting",
            got=", ".join(sorted(set(values) - known)),
            expected=f"some of {sorted(known)}",
        )


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith((f"{pattern}.", f"{pattern}/", f"{pattern}@"))


def fitting(patterns: Iterable[str], network: fx.GraphModule) -> set[str]:
    """Return the sites that match any of the patterns; a pattern may match none."""
    return {name for pattern in patterns for name in sites(network) if _fits(pattern, name)}


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that match a pattern: exactly, as a module-path prefix, or with the wildcards of `fnmatch`.

    Raises:
        RecipeError: Nothing matches; the error names the nearest.
    """
    names = list(names)
    matching = [n for n in names if _fits(pattern, n)]
    if not matching:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise RecipeError(
            "a name pattern matches no operator of the network",
            code="no-match",
            got=repr(pattern),
            expected=f"for example {', '.join(map(repr, near))}",
            remedy="`penjing inspect` lists all names",
        )
    return matching
