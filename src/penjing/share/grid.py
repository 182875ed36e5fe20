"""Grids for the smallest packed file: every weight becomes a whole number of its tensor's step.

Rate-distortion quantization, Wiedemann et al., "DeepCABAC: A Universal Compression Algorithm for Deep Neural Networks",
IEEE Journal of Selected Topics in Signal Processing, 2020. Weights behind one in its row compensate for its error:
Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.

One bit more lowers the noise at the outputs by the same amount everywhere if each tensor's step is inverse to the root
of the noise that its weights make. That is measured, tensor by tensor; then a single number decides all steps: the
largest with which the limit holds on samples that nothing was computed from. (Derivatives of the outputs in the place
of measured noise were worse on EfficientNet-Lite0, and steps for every row by them much more.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from penjing.analyze import gram, noise
from penjing.analyze.layer_inputs import observe
from penjing.analyze.samples import batches, chunks, split
from penjing.errors import RecipeError, SharingError, TaskError
from penjing.network.graph import kind
from penjing.numerics.quarter_octaves import MOST, nearest_step
from penjing.numerics.rate_distortion import factor, quantized
from penjing.share.weights import matrices
from penjing.steps.draft import Draft
from penjing.steps.settings import NAMES, above, at_least, between, check, number, optional, whole
from penjing.steps.step import Context
from penjing.surgery import fold_batch_norms
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Call

MEASURED = 16  # samples on which the noise of a tensor is measured
MEASURED_STEP = 1 / 48  # of the deviation of its weights: about 8 bits, where the noise is quadratic in every layer
POSITIONS = 256  # of an image that a layer's second moments are taken from
LIMITS = ("snr_db", "agreement", "drop")
UNITS = 8  # of an octave of the steps, in which they are searched
TRIALS = 12


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Give every weight a whole number of its tensor's step, as coarse as a limit allows; `penjing pack` codes these.

    Wiedemann et al., "DeepCABAC", IEEE JSTSP 2020.

    Batch norms are folded first. Biases stay as exact as they were, and take up what the weights' errors add to the
    mean. The network runs as before, with weights in floating point. At least one limit is given; no labels are needed
    for the first two.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        snr_db: Smallest signal-to-noise ratio of the outputs against the network before, on held-out calibration data.
        agreement: Smallest share of equal top-1 predictions, there too; for outputs whose last axis is classes.
        drop: Largest drop of `Task.select`, in the metric's own unit.
        slope: What a bit is worth, in squared steps: a number with fewer bits is taken where that costs less.
        samples: Calibration samples for the moments of the layers' inputs.
        layers: Layers, or parts of the network; empty takes all.
        keep: Layers, or parts of the network, that are left as they are.
    """

    stage: ClassVar[str] = "round"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    snr_db: float | None = None
    agreement: float | None = None
    drop: float | None = None
    slope: float = 0.1
    samples: int = 256
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(
            self,
            snr_db=optional(above(0)),
            agreement=optional(between(0, 1)),
            drop=optional(number()),
            slope=at_least(0),
            samples=whole(2),
            layers=NAMES,
            keep=NAMES,
        )
        if self.snr_db is None and self.agreement is None and self.drop is None:
            raise RecipeError(
                "Grid needs a limit", code="limits", got="no setting", expected="snr_db=, agreement= or drop=",
                remedy="for example Grid(snr_db=30)",
            )  # fmt: skip

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft whose weights lie on grids.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            SharingError: No weight is left, or no steps hold the limit.
            TaskError: `drop` without `Task.select`, or `agreement` without classes.
            CalibrationError: There is no calibration data, or a single sample.
        """
        if self.drop is not None and context.task.select is None:
            raise TaskError(
                "a limit on the drop needs a metric",
                code="no-metric",
                got="Task.select is None",
                expected="select(predict) -> float, on data that the verdict does not use",
                remedy="give Task(select=...), or limit agreement, which needs no labels",
            )
        draft = draft.copy()
        network = draft.network.eval()
        edits = fold_batch_norms(network)
        fitting, held_out = split(context)
        if self.agreement is not None:
            noise.agreement(network, network, held_out[:1])  # refused here where there are no classes
        layers = _layers(network, matrices(network, self.layers, self.keep), fitting, self.samples)
        trials: dict[int, tuple[bool, dict[str, float]]] = {}

        def on_grids(place: int) -> fx.GraphModule:
            changed = copy.deepcopy(network)
            for layer in layers:
                layer.write(changed, 2 ** (place / UNITS), self.slope)
            return changed

        def holds(place: int) -> bool:
            if place not in trials:
                trials[place] = self._judged(network, on_grids(place), held_out, context, place)
            return trials[place][0]

        chosen = _coarsest(
            holds, lambda place: trials[place][1]["snr_db"], _first(layers, self.snr_db or 30.0), self.snr_db
        )
        if not holds(chosen):
            raise SharingError(
                "no grid that was tried holds the limit",
                code="unreachable",
                got=", ".join(f"{name} {value:.4g}" for name, value in trials[chosen][1].items()),
                expected=", ".join(
                    f"{name}={value:g}" for name in LIMITS if (value := getattr(self, name)) is not None
                ),
                remedy="allow more, or leave layers out with keep=",
            )
        return replace(draft, network=on_grids(chosen), edits=(*draft.edits, *edits))

    def _judged(
        self, before: fx.GraphModule, after: fx.GraphModule, held_out: list[Call], context: Context, place: int
    ) -> tuple[bool, dict[str, float]]:
        """Whether the limits hold, and the figures that they are on."""
        figures = {"snr_db": noise.signal_to_noise(before, after, held_out)}
        holds = self.snr_db is None or figures["snr_db"] >= self.snr_db
        if self.agreement is not None:
            figures["agreement"] = noise.agreement(before, after, held_out)
            holds = holds and figures["agreement"] >= self.agreement
        if self.drop is not None and context.task.select is not None:
            old, new = (context.task.select(numpy_predictor(n)) for n in (before, after))
            figures["drop"] = old - new if context.task.higher_is_better else new - old
            holds = holds and figures["drop"] <= self.drop
        context.events("grid", step=2 ** (place / UNITS), met=holds, **figures)
        return holds, figures


@dataclass(frozen=True)
class _Layer:
    """A weight in the form (groups, rows, columns), and what its errors count."""

    name: str
    bias: str | None
    weight: torch.Tensor
    upper: torch.Tensor  # `factor` of its inputs' covariances
    means: torch.Tensor  # of its inputs, (groups, columns)
    root: float = 1.0  # of the noise over signal that a weight makes, for a step of 1

    def write(self, network: fx.GraphModule, size: float, slope: float) -> None:
        """Give the parameter values on a grid with the step `size / root`, and the bias what their errors add."""
        least = float(self.weight.abs().max()) / (MOST - 1)
        step = float(nearest_step(np.array(max(size / self.root, 2 * least, 1e-30))))
        exact = quantized(self.weight, self.upper, step, slope, MOST) * step
        parameter = network.get_parameter(self.name)
        with torch.no_grad():
            parameter.copy_(exact.reshape(parameter.shape))
            if self.bias is not None:
                bias = network.get_parameter(self.bias)
                bias.add_(((self.weight - exact) @ self.means[:, :, None]).reshape(bias.shape).to(bias.dtype))

    def measured(self, network: fx.GraphModule, calls: list[Call]) -> _Layer | None:
        """The same with its root; None if it does not move the outputs."""
        size = float(self.weight.std(correction=0)) * MEASURED_STEP
        if size == 0:
            return None
        changed = copy.deepcopy(network)
        self.write(changed, size, 0.0)
        power = 10 ** (-noise.signal_to_noise(network, changed, calls) / 10)
        return replace(self, root=(power / self.weight.numel()) ** 0.5 / size) if power > 0 else None


def _layers(network: fx.GraphModule, names: Iterable[str], context: Context, samples: int) -> list[_Layer]:
    """The weights that get grids; those that do not move the outputs are left as they are."""
    modules = {
        str(node.target): network.get_submodule(str(node.target))
        for node in network.graph.nodes
        if node.op == "call_module" and kind(network, node) in ("conv", "linear")
    }
    names = list(names)
    modules = {n: m for n, m in modules.items() if f"{n}.weight" in names and _measurable(m)}
    sums = {n: gram.Gram(gram.columns_of(m)[1], groups=gram.columns_of(m)[0], means=True) for n, m in modules.items()}

    def watch(name: str, x: torch.Tensor) -> None:
        for piece in gram.pieces(modules[name], x):
            sums[name].add(gram.patches(modules[name], piece, positions=POSITIONS))

    observe(network, modules, chunks(context, network, samples), watch)
    few = list(batches(context, MEASURED))
    layers = []
    for done, name in enumerate(names, 1):
        layer = _layer(network, name, sums.get(name.rpartition(".")[0])).measured(network, few)
        layers += [layer] if layer is not None else []
        context.events("progress", label="noise of each tensor", done=done, total=len(names))
    return layers


def _layer(network: fx.GraphModule, name: str, moments: gram.Gram | None) -> _Layer:
    """A weight with the moments of its inputs, where they are known."""
    weight, bias = network.get_parameter(name).detach(), f"{name.rpartition('.')[0]}.bias"
    if moments is None or not moments.count:
        form = weight.double().reshape(1, len(weight), -1)
        return _Layer(name, None, form, torch.eye(form.shape[2], dtype=torch.float64)[None], form.new_zeros(1, 1))
    groups = moments.own.shape[0]
    form = weight.double().reshape(groups, len(weight) // groups, -1)
    has_bias = bias in dict(network.named_parameters())
    return _Layer(name, bias if has_bias else None, form, factor(moments.covariances()[0]), moments.means())


def _measurable(module: Any) -> bool:
    """Whether the columns of its inputs' moments are those of its weight."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


def _first(layers: Iterable[_Layer], snr_db: float) -> int:
    """The place of the steps that should give this signal-to-noise ratio, if the errors of tensors are independent."""
    values = sum(layer.weight.numel() for layer in layers)
    return round(UNITS / 2 * math.log2(10 ** (-snr_db / 10) / max(1, values)))


def _coarsest(holds: Callable[[int], bool], snr_of: Callable[[int], float], place: int, snr_db: float | None) -> int:
    """The place of the largest steps with which the limit holds, or of ones that were tried where none do."""
    if not holds(place) and snr_db is not None:
        place -= max(0, round(UNITS * (snr_db - snr_of(place)) / 6.02) - 1)
    low: int | None = None
    high: int | None = None
    stride = 2
    for _ in range(TRIALS):
        if holds(place):
            low = place
        else:
            high = place
        if low is not None and high is not None:
            if high - low <= 1:
                break
            place = (low + high) // 2
        else:
            place += stride if high is None else -stride
            stride *= 2
    return place if low is None else low
