"""Low rank: layers are replaced by products of smaller ones, their ranks chosen for all layers together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from penjing.analyze import meter
from penjing.analyze.least_squares import samples
from penjing.analyze.lockstep import countable
from penjing.analyze.samples import batches
from penjing.decompose import moments, ranks
from penjing.decompose.allocation import Chosen
from penjing.decompose.candidates import factors
from penjing.decompose.eligible import Eligible, eligible
from penjing.decompose.moments import Basis
from penjing.decompose.ranks import Problem
from penjing.decompose.refit import Factored, refitted
from penjing.errors import CalibrationError, RecipeError
from penjing.steps.draft import Draft
from penjing.steps.settings import FLAG, NAMES, Rule, check, number, optional, whole
from penjing.steps.step import Context
from penjing.surgery import factorize

BUDGETS = ("macs", "params", "size", "latency")
WAYS = ("energy", "ranks", *BUDGETS)
METHODS = ("svd", "tucker", "cp")
FRACTION_KEPT = number(above=0, most=1, called="the fraction to keep,")


def _ranks(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return bool(value == "vbmf")
    return bool(value) and all(
        isinstance(name, str) and bool(one) and all(whole().holds(rank) for rank in one)
        for name, one in ((name, of if isinstance(of, tuple | list) else (of,)) for name, of in value.items())
    )


RANKS = Rule(_ranks, "'vbmf', or ranks by layer: {'fc': 32, 'conv': (16, 24)}")
CHOICE = Rule(
    lambda value: isinstance(value, tuple | list) and bool(value) and all(word in METHODS for word in value),
    "a tuple of 'svd', 'tucker' and 'cp'",
)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Replace layers by products of smaller ones: linear layers and 1×1 convolutions by two, others by three or four.

    Denton et al., NeurIPS 2014 (SVD); Kim et al., ICLR 2016 (Tucker-2, VBMF); Lebedev et al., ICLR 2015 (CP).

    Exactly one of the first six settings is given. A layer stays as it is where no rank saves multiply-accumulates and
    parameters, and with `latency` where its factors were measured to be slower.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        macs: The fraction of multiply-accumulates that is kept, solved for all layers together.
        params: The fraction of parameters.
        size: The fraction of the bytes of parameters and buffers.
        latency: The fraction of the latency, measured in the target runtime.
        energy: The part of the energy of every layer's outputs that is kept, at the lowest cost.
        ranks: "vbmf" counts the components that stand out of the weights' noise (Nakajima et al., JMLR 2013); or ranks
            by layer, a number for SVD and CP, (r_in, r_out) for Tucker: other layers stay.
        methods: "svd" for linear layers and 1×1 convolutions; "tucker" and "cp" for other convolutions, of which each
            takes the better one where both are named.
        activations: Weight errors by the second moments of the layers' inputs, so that the error of the outputs is
            small, not that of the weights; None does so where the task has calibration data.
        refit: Fit the factors by least squares to the outputs that the layers had, without labels; None does so where
            the task has calibration data.
        reconstruct: Fit the layers that stay whole and read decomposed ones too, as `prune.Channels` fits those behind
            removed channels. Sparse layers, whose zeros have to stay, are not fitted.
        round_to: Ranks are multiples of this; None takes the multiple that the runtime is fast with, or 8.
        layers: Layers, or parts of the network, that are decomposed; empty takes all.
        keep: Layers, or parts of the network, that stay.
        samples: At most so many calibration samples are read.
        precision: The precision at which the latency is measured.
    """

    stage: ClassVar[str] = "structure"
    for_floats: ClassVar[bool] = True

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    energy: float | None = None
    ranks: str | Mapping[str, int | tuple[int, ...]] | None = None
    methods: tuple[str, ...] = ("svd", "tucker")
    activations: bool | None = None
    refit: bool | None = None
    reconstruct: bool = False
    round_to: int | None = None
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    samples: int = 512
    precision: str = "fp32"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in WAYS if getattr(self, name) is not None}
        check(self, **{name: FRACTION_KEPT for name in given if name in BUDGETS})
        check(
            self,
            energy=optional(number(above=0, most=1)),
            ranks=optional(RANKS),
            methods=CHOICE,
            activations=optional(FLAG),
            refit=optional(FLAG),
            reconstruct=FLAG,
            round_to=optional(whole()),
            layers=NAMES,
            keep=NAMES,
            samples=whole(),
        )
        if len(given) != 1:
            raise RecipeError(
                "LowRank takes exactly one way of choosing the ranks",
                code="one-target",
                got=", ".join(f"{k}={v}" for k, v in given.items()) or "none",
                expected=" or ".join(f"{name}=" for name in WAYS),
                remedy="for example LowRank(macs=0.5) keeps half of the multiply-accumulates",
            )

    @property
    def unit(self) -> str:
        """The way in which ranks are chosen, one of `WAYS`."""
        return next(name for name in WAYS if getattr(self, name) is not None)

    @property
    def per_runtime(self) -> bool:
        """Whether the ranks depend on the runtime."""
        return self.latency is not None

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with smaller layers.

        Raises:
            RecipeError: A layer does not exist, or a rank does not fit it.
            DecompositionError: No layer can be decomposed, or the target can't be reached.
            CalibrationError: Calibration data is needed, and there is none.
            MissingDependency: tensorly is not installed.
        """
        layers = eligible(draft, context.task.call(), self.layers, self.keep, self.methods)
        data = self._data(context)
        weighed = data if self.activations is not False else None
        bases = self._bases(draft, layers, weighed)
        round_to = self.round_to or (context.capabilities.channel_multiple if context.capabilities else 8)
        chosen = self._chosen(Problem(draft, context, layers, bases, round_to, weighed))
        if lost := [name for name in chosen if f"{name}.weight" in draft.sparse]:
            text = f"the zeros of {len(lost)} pruned layers are lost in their factors; prune weights after LowRank"
            context.events("warning", text=text)
        factored = _factored(context, layers, bases, chosen)
        network = copy.deepcopy(draft.network)
        if factored and data is not None and (self.refit is not False or self.reconstruct):
            factored, whole = refitted(
                draft.network,
                factored,
                samples(data, draft.network),
                factors=self.refit is not False,
                behind=self._behind(draft) if self.reconstruct else (),
            )
            for parameter, value in whole.items():
                network.get_parameter(parameter).data.copy_(value)
        edits = [
            factorize(network, name, each.candidate.form, each.candidate.ranks, each.weights, each.bias)
            for name, each in factored.items()
        ]
        decomposed = replace(draft, network=network, edits=(*draft.edits, *edits))
        left = meter.fraction_left(lambda d: meter.amount("macs", d.network, context.task.call()), draft)
        context.events(
            "decomposed",
            step="LowRank",
            layers={name: each.candidate.text for name, each in factored.items()},
            refused=layers.refused,
            macs=left(decomposed),
        )
        return decomposed

    def _behind(self, draft: Draft) -> set[str]:
        """The layers that may be fitted without being decomposed."""
        return {name for name in countable(draft.network) if f"{name}.weight" not in draft.sparse}

    def _data(self, context: Context) -> Context | None:
        """The context with the samples that are read, in memory; None where data are not wanted or there are none."""
        asked = self.activations or self.refit or self.reconstruct
        unwanted = self.activations is False and self.refit is False and not self.reconstruct
        if unwanted or (not asked and context.task.calibration is None):
            return None
        try:
            calls = list(batches(context, self.samples))
        except CalibrationError as error:
            if asked:
                raise
            context.events("warning", text=f"decomposed without data: {error.what}")
            return None
        return replace(context, task=replace(context.task, calibration=[call[1] or call[0] for call in calls]))

    def _bases(self, draft: Draft, layers: Eligible, data: Context | None) -> dict[str, Basis]:
        """Layer → the basis of its inputs."""
        plain = {name: moments.plain(place.module) for name, place in layers.places.items()}
        if data is None:
            return plain
        data.events("progress", label="second moments", done=0, total=1)
        modules = {name: place.module for name, place in layers.places.items()}
        measured = moments.bases(draft.network, modules, list(batches(data, self.samples)))
        data.events("progress", label="second moments", done=1, total=1)
        return {**plain, **measured}

    def _chosen(self, problem: Problem) -> Chosen:
        if isinstance(self.ranks, Mapping):
            return ranks.named(problem, self.ranks)
        if self.ranks is not None:
            return ranks.by_vbmf(problem)
        if self.energy is not None:
            return ranks.by_energy(problem, self.energy)
        return ranks.by_budget(problem, self.unit, float(getattr(self, self.unit)), self.precision)


def _factored(context: Context, layers: Eligible, bases: Mapping[str, Basis], chosen: Chosen) -> dict[str, Factored]:
    """The weights of everything that is replaced, in execution order."""
    factored: dict[str, Factored] = {}
    for name, place in layers.places.items():
        if name not in chosen:
            continue
        context.events("progress", label="factors", done=len(factored), total=len(chosen))
        weights = tuple(w.to(place.module.weight) for w in factors(place, bases[name], chosen[name]))
        bias = place.module.bias
        factored[name] = Factored(chosen[name], weights, None if bias is None else bias.detach().clone())
    return factored


__all__ = ["LowRank"]
