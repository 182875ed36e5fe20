"""What a layer can be replaced by: a form and its ranks, with what it costs and what it keeps of the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.cost import cost
from penjing.decompose import cp, svd, tucker
from penjing.decompose.moments import Basis
from penjing.network.graph import shapes, sites, tensor_inputs
from penjing.numerics import vbmf
from penjing.tasks.task import Call

CP_SHARES = (0.125, 0.25, 0.35, 0.5, 0.7)  # of a layer's MACs: the ranks at which CP is tried


@dataclass(frozen=True)
class Place:
    """A layer that may be decomposed.

    Attributes:
        name: Of the layer.
        module: The layer.
        macs: Its multiply-accumulates of one sample.
        inputs: Positions of its input, of one sample.
        outputs: Positions of its output.
        between: For every axis the positions between the depthwise convolutions of CP.
    """

    name: str
    module: Any
    macs: float
    inputs: float
    outputs: float
    between: tuple[float, ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """In float64, (out, in, …)."""
        return self.module.weight.detach().double().cpu()  # type: ignore[no-any-return]

    @property
    def params(self) -> int:
        """Of the weight."""
        return int(self.module.weight.numel())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Outputs, inputs, and positions of the kernel."""
        out, inputs, *kernel = self.module.weight.shape
        return out, inputs, math.prod(kernel)


@dataclass(frozen=True)
class Candidate:
    """One way to replace a layer.

    Attributes:
        form: One of `penjing.surgery.factorize.FORMS`.
        ranks: As in `penjing.surgery.factorize`.
        energy: The fraction of the energy of the layer's outputs that is left, from 0 to 1; NaN: it was not computed.
        macs: Of one sample.
        params: Of the weights.
    """

    form: str
    ranks: tuple[int, ...]
    energy: float
    macs: float
    params: float

    @property
    def text(self) -> str:
        """The form and its ranks.

        >>> Candidate("tucker", (16, 24), 0.9, 1.0, 1.0).text
        'tucker 16×24'
        """
        return f"{self.form} {'×'.join(map(str, self.ranks))}"


def places(network: fx.GraphModule, modules: dict[str, Any], call: Call) -> dict[str, Place]:
    """Layer → its place, with its cost and positions."""
    macs = {row.name: row.macs for row in cost(network, call)}
    values, nodes = shapes(network, call), sites(network)
    every: dict[str, Place] = {}
    for name, module in modules.items():
        outputs = macs[name] / module.weight.numel()
        if isinstance(module, nn.Linear):
            every[name] = Place(name, module, macs[name], outputs, outputs)
            continue
        axes = len(module.kernel_size)
        before = values[tensor_inputs(nodes[name])[0].name].shape[-axes:]
        after = values[nodes[name].name].shape[-axes:]
        each = outputs / math.prod(after)
        between = tuple(each * math.prod((*after[: i + 1], *before[i + 1 :])) for i in range(axes))
        every[name] = Place(name, module, macs[name], each * math.prod(before), outputs, between)
    return every


def priced(place: Place, form: str, ranks: Sequence[int], energy: float) -> Candidate:
    """The candidate with what it costs."""
    out, inputs, taps = place.sizes
    if form == "svd":
        (rank,) = ranks
        parts = [(rank * inputs * taps, place.outputs), (out * rank, place.outputs)]
    elif form == "tucker":
        reduced, core = ranks
        parts = [(reduced * inputs, place.inputs)] * (reduced < inputs)
        parts += [(core * reduced * taps, place.outputs)]
        parts += [(out * core, place.outputs)] * (core < out)
    else:
        (rank,) = ranks
        parts = [(rank * inputs, place.inputs), (out * rank, place.outputs)]
        along = zip(place.module.kernel_size, place.between, strict=True)
        parts += [(rank * size, positions) for size, positions in along if size > 1]
    macs = sum(weights * positions for weights, positions in parts)
    return Candidate(form, tuple(ranks), energy, macs, sum(weights for weights, _ in parts))


def forms_of(module: Any, methods: Sequence[str]) -> tuple[str, ...]:
    """The forms that a layer can have, of those that are allowed."""
    pointwise = module.weight.dim() == 2 or module.weight[0, 0].numel() == 1
    if pointwise:
        return ("svd",) if "svd" in methods else ()
    axes = zip(module.kernel_size, module.stride, _padding(module), strict=True)
    splits = all(size > 1 or (stride, padding) == (1, 0) for size, stride, padding in axes)
    return tuple(form for form in ("tucker", "cp") if form in methods and (form != "cp" or splits))


def _padding(module: Any) -> Sequence[int]:
    return [0] * len(module.kernel_size) if isinstance(module.padding, str) else module.padding


def multiple(size: int, round_to: int) -> int:
    """What the ranks of an axis of this size are a multiple of: `round_to`, less where the axis is short.

    >>> multiple(64, 16), multiple(24, 16), multiple(3, 8)
    (16, 4, 1)
    """
    while round_to > 1 and size < 4 * round_to:
        round_to //= 2
    return max(1, round_to)


def candidates(place: Place, basis: Basis, form: str, round_to: int) -> list[Candidate]:
    """All ranks of a form that save multiply-accumulates and parameters.

    Args:
        place: The layer.
        basis: Of its inputs.
        form: One that the layer can have.
        round_to: The ranks are multiples of this.
    """
    out, inputs, _ = place.sizes
    weight = place.weight
    every: list[Candidate] = []
    if form == "svd":
        energies = svd.energies(weight, basis)
        step = multiple(len(energies) - 1, round_to)
        every = [priced(place, form, (r,), float(energies[r])) for r in range(step, len(energies), step)]
    elif form == "tucker":
        of_ranks = tucker.energies(weight, basis)
        narrow, wide = multiple(inputs, round_to), multiple(out, round_to)
        for reduced in {*range(narrow, inputs, narrow), inputs}:
            for core in {*range(wide, out, wide), out}:
                if reduced < inputs or core < out:
                    every.append(priced(place, form, (reduced, core), float(of_ranks[reduced, core])))
    else:
        one = priced(place, form, (1,), 0.0)
        step = multiple(max(out, inputs), round_to)
        ranks = {max(1, round(share * place.macs / one.macs / step)) * step for share in CP_SHARES}
        for rank in sorted(r for r in ranks if r <= place.params // max(out, inputs)):
            if gains(place, priced(place, form, (rank,), 0.0)):
                every.append(priced(place, form, (rank,), cp.factors(weight, basis, rank)[1]))
    return [candidate for candidate in every if gains(place, candidate)]


def gains(place: Place, candidate: Candidate) -> bool:
    """Whether it saves multiply-accumulates and parameters."""
    return candidate.macs < place.macs and candidate.params < place.params


def by_noise(place: Place, form: str, round_to: int) -> tuple[int, ...]:
    """The ranks at which the weight stands out of its noise, rounded up: see `penjing.numerics.vbmf`; at least 1."""
    weight = place.weight
    out, inputs, _ = place.sizes
    if form == "svd":
        most = min(weight.flatten(1).shape)
        return (_rounded(vbmf.rank(weight.flatten(1).numpy()), most, round_to),)
    own, other = (vbmf.rank(weight.movedim(axis, 0).flatten(1).numpy()) for axis in (1, 0))
    if form == "tucker":
        return _rounded(own, inputs, round_to), _rounded(other, out, round_to)
    return (_rounded(max(own, other), place.params // max(out, inputs), round_to),)


def _rounded(rank: int, most: int, round_to: int) -> int:
    step = multiple(most, round_to)
    return min(most, max(1, math.ceil(rank / step)) * step)


def factors(place: Place, basis: Basis, candidate: Candidate) -> tuple[torch.Tensor, ...]:
    """The weights of the layers that a candidate stands for, in float64, in the order of execution."""
    weight = place.weight
    if candidate.form == "svd":
        return svd.factors(weight, basis, candidate.ranks[0])
    if candidate.form == "tucker":
        return tucker.factors(weight, basis, candidate.ranks)
    return cp.factors(weight, basis, candidate.ranks[0])[0]


__all__ = [
    "Candidate", "Place", "by_noise", "candidates", "factors", "forms_of", "gains", "multiple", "places", "priced",
]  # fmt: skip
