"""Training a network whose weights have two or three levels, through straight-through gradients.

The weights that are trained keep their names and their floating-point values; what a layer multiplies with are their
levels. At the end the levels take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from penjing.analyze.samples import batches
from penjing.distill import Outputs
from penjing.errors import QuantizationError
from penjing.network.graph import sites
from penjing.network.selection import named
from penjing.numerics.signs import Levels, binary, in_bytes, ternary
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import Sign, mark_codebooks, sign_inputs
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train

SAMPLES = 256  # of the calibration data, from which the first thresholds are taken
REACH = 1.5  # standard deviations from the threshold within which a gradient passes


class _Conv2d(nn.Conv2d):
    levels: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = Levels.apply(self.weight, self.levels)  # type: ignore[no-untyped-call]
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Linear(nn.Linear):
    levels: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = Levels.apply(self.weight, self.levels)  # type: ignore[no-untyped-call]
        return F.linear(input, weight, self.bias)


_TRAINED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}


def chosen(network: fx.GraphModule, layers: Sequence[str], keep: Sequence[str], edges: bool) -> list[str]:
    """The layers whose weights get levels, in execution order.

    Those are convolutions in two dimensions without groups and linear layers, each called once and with weights of its
    own. Left out are `keep`, convolutions of a single tap (they are the projections of shortcuts, and hold few
    weights), and, unless `edges`, the first and the last layer with weights; `layers` names what is taken even so.

    Raises:
        RecipeError: `layers` or `keep` names what does not exist.
        QuantizationError: No layer is left.
    """
    parameters = [id(p) for _, p in network.named_parameters(remove_duplicate=False)]
    weighted: list[str] = []
    for name, node in sites(network).items():
        module: Any = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) in _TRAINED and sum(n.target == node.target for n in network.graph.nodes) == 1:
            weighted.append(name)
    fitting = []
    for name in weighted:
        layer: Any = network.get_submodule(name)
        taps = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 2
        own = parameters.count(id(layer.weight)) == 1 and getattr(layer, "groups", 1) == 1
        zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
        if own and zeros and (taps > 1 or layers) and (edges or layers or name not in (weighted[0], weighted[-1])):
            fitting.append(name)
    owners = dict.fromkeys(fitting)
    names = named(owners, network, layers) if layers else set(fitting)
    names -= named(owners, network, keep) if keep else set()
    if not names:
        raise QuantizationError(
            "no layer is left whose weights can have two or three levels",
            code="no-layer",
            got=f"{len(weighted)} linear layers and convolutions, layers={tuple(layers)}, keep={tuple(keep)}",
            expected="a layer between the first and the last: linear, or a 2-D convolution of several taps, no groups",
            remedy="name layers with layers=(...); convolutions of one tap are taken where they are named",
        )
    return [name for name in fitting if name in names]


def train_levels(
    draft: Draft,
    context: Context,
    layers: Sequence[str],
    finetune: Finetune,
    *,
    threshold: float,
    activations: bool,
    rest_in_bytes: bool = False,
) -> Draft:
    """Return a draft whose layers have weights of two or three levels.

    Args:
        draft: In floating point.
        context: Has the task, the source network and the seed.
        layers: Of `chosen`.
        finetune: The settings of the training.
        threshold: Of `penjing.numerics.signs.ternary`; 0 is two levels.
        activations: Whether the layers read the signs of their inputs.
        rest_in_bytes: Whether other layers get weights that are whole multiples of a step, after the training.

    Raises:
        QuantizationError: There are two levels, and weights that were removed.
    """
    removed = [name for name in layers if f"{name}.weight" in draft.sparse]
    if removed and not threshold:
        raise QuantizationError(
            "weights that were removed would come back: binary weights have no 0",
            code="sparse",
            got=", ".join(removed),
            expected="layers whose weights are all kept",
            remedy="take quantize.Ternary, whose weights can be 0, or leave out the step that removes weights",
        )
    draft = draft.copy()
    network = draft.network
    edits = [sign_inputs(network, layers)] if activations else []
    for name in layers:
        _replace(network, name, threshold)
    if activations:
        _calibrate(network, context)
    settings = replace(
        finetune,
        distill=(Outputs(),) if finetune.distill == "auto" else finetune.distill,
        clip=finetune.clip or Clip(),
    )
    teacher = context.source if context.source is not None else draft.network
    network = train(network, replace(context, source=teacher), settings, draft.sparse)
    with torch.no_grad():
        for name in layers:
            _replace(network, name, None)
            layer: Any = network.get_submodule(name)
            layer.weight.copy_(ternary(layer.weight, threshold) if threshold else binary(layer.weight))
        if rest_in_bytes:
            for layer in set(network.modules()) - set(map(network.get_submodule, layers)):
                if type(layer) in _TRAINED:
                    layer.weight.copy_(in_bytes(layer.weight))
    edits += [mark_codebooks(network, [f"{name}.weight"], rows=1, proportional=True) for name in layers]
    return replace(draft, network=network, edits=(*draft.edits, *edits))


def _replace(network: fx.GraphModule, name: str, threshold: float | None) -> None:
    """Give a layer the class that is trained, with its threshold; with None its own again."""
    layer: Any = network.get_submodule(name)
    if threshold is None:
        layer.__class__ = type(layer).__bases__[0]
        del layer.levels
    else:
        layer.__class__ = _TRAINED[type(layer)]
        layer.levels = threshold


def _calibrate(network: fx.GraphModule, context: Context) -> None:
    """Set thresholds to the mean of every channel, layer by layer as inputs become signs."""
    handles = []

    def measure(sign: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(sign, Sign)
        axis = -1 if len(sign.shape) == 1 else 1
        rows = args[0].movedim(axis, 0).flatten(1).float()
        sign.threshold.copy_(rows.mean(1))
        sign.reach.copy_(REACH * rows.std(1, correction=0) + 1e-3)

    for module in network.modules():
        if isinstance(module, Sign):
            handles.append(module.register_forward_pre_hook(measure))
    calls = list(batches(context, SAMPLES))
    args, kwargs = calls[0]
    varies = context.task.dynamic is None or any(0 in axes for axes in context.task.dynamic.values())
    same = all(call[0][0].shape[1:] == args[0].shape[1:] for call in calls) if args else False
    if varies and same and not kwargs and len(args) == 1:
        args = (torch.cat([call[0][0] for call in calls]),)  # else the first batch has to do
    with torch.no_grad():
        network(*args, **kwargs)
    for handle in handles:
        handle.remove()


__all__ = ["chosen", "train_levels"]
