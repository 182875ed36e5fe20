"""Clipping: gradients or weights whose norm exceeds a threshold are scaled down to it.

Gradients: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013; adaptive: Brock et al.,
"High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021. Weights: Srivastava et al.,
"Dropout", JMLR 2014, section 5.1; adaptive: Elsayed et al., "Weight Clipping for Deep Continual and Reinforcement
Learning", RLC 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from penjing.errors import RecipeError
from penjing.steps.settings import FLAG, above, check, one_of, optional

ORDERS = {"l1": 1.0, "l2": 2.0, "max": math.inf}
LEAST = 1e-3  # the norm that a layer's weights are taken to have at least, or zeros would never learn (Brock et al.)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Keep gradients, or weights, within a norm. A setting of `penjing.Finetune(clip=...)`.

    In "l1" and "l2" all values of a whole are scaled alike; in "max" each value is cut by itself.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        what: "gradients", before every update; "weights" of two and more dimensions, after it.
        norm: "l1", "l2" or "max".
        threshold: The norm that is allowed; a factor where `adaptive`. None is 1; of weights, whose length depends on
            the network, only where `adaptive`.
        per: "network" takes all for one whole, "layer" each layer by itself.
        adaptive: The threshold is a factor. Of gradients: times the same norm of the weights that they change. Of
            weights: times the norm of values that are all 1/√fan_in, the bound that layers are drawn from.
    """

    what: Literal["gradients", "weights"] = "gradients"
    norm: Literal["l1", "l2", "max"] = "l2"
    threshold: float | None = None
    per: Literal["network", "layer"] = "network"
    adaptive: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            what=one_of("gradients", "weights"),
            norm=one_of(*ORDERS),
            threshold=optional(above(0)),
            per=one_of("network", "layer"),
            adaptive=FLAG,
        )
        if self.what == "weights" and self.threshold is None and not self.adaptive:
            raise RecipeError(
                "clipping weights needs a threshold",
                code="no-threshold",
                got="Clip(what='weights') alone",
                expected="the norm that is allowed, or adaptive=True",
                remedy="Clip(what='weights', per='layer', adaptive=True) bounds every layer by what it was drawn from",
            )

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> float:
        """Clip in place.

        Args:
            named: A network's parameters by name, with their gradients.

        Returns:
            The longest whole's norm over what is allowed: above 1 something was clipped.
        """
        wholes: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad and (parameter.dim() > 1 if self.what == "weights" else True):
                layer = name.rpartition(".")[0] if self.per == "layer" else ""
                if self.what == "weights" or parameter.grad is not None:
                    wholes.setdefault(layer, []).append(parameter)
        with torch.no_grad():
            return max((self._clip(parameters) for parameters in wholes.values()), default=0.0)

    def _clip(self, parameters: Sequence[nn.Parameter]) -> float:
        tensors = [p.data if self.what == "weights" else p.grad for p in parameters]
        values = [value for value in tensors if value is not None]
        order = ORDERS[self.norm]
        length = float(nn.utils.get_total_norm(values, order))
        allowed = 1.0 if self.threshold is None else self.threshold
        if self.adaptive:
            allowed *= self._reference(parameters)
        if length > allowed:
            if self.norm == "max":
                torch._foreach_clamp_min_(values, -allowed)
                torch._foreach_clamp_max_(values, allowed)
            else:
                torch._foreach_mul_(values, allowed / (length + 1e-6))
        return length / allowed

    def _reference(self, parameters: Sequence[nn.Parameter]) -> float:
        """What an adaptive threshold is a factor of."""
        if self.what == "gradients":
            return max(LEAST, float(nn.utils.get_total_norm([p.data for p in parameters], ORDERS[self.norm])))
        bounds = torch.tensor([1 / math.sqrt(p.numel() / p.shape[0]) for p in parameters])
        counts = torch.tensor([float(p.numel()) for p in parameters])
        if self.norm == "max":
            return float(bounds.max())
        return float((counts * bounds ** ORDERS[self.norm]).sum() ** (1 / ORDERS[self.norm]))


class Clips:
    """Every `Clip` of a training, with its statistics since the last event."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._lengths: list[tuple[Clip, list[float]]] = [(clip, []) for clip in clips]

    def apply(self, what: str, network: nn.Module) -> None:
        """Clip a network's "gradients" or "weights", where there is a clip for them."""
        for clip, lengths in self._lengths:
            if clip.what == what:
                lengths.append(clip(network.named_parameters()))

    def tell(self, events: Callable[..., None], step: int) -> None:
        """Emit an event per clip: in how many steps of how many it applied, and the largest norm."""
        for clip, lengths in self._lengths:
            if lengths:
                values = {"what": clip.what, "norm": clip.norm, "step": step}
                over = sum(length > 1 for length in lengths)
                events("clipped", **values, steps=len(lengths), clipped=over, longest=max(lengths))
                lengths.clear()
