"""Single weights that matter least become zeros, by their size or by what a gradient says of them.

| criterion | a weight's score | source |
|---|---|---|
| ``magnitude`` | abs(w) | Han et al., "Learning both Weights and Connections", NeurIPS 2015 |
| ``gradient`` | E[abs(∂L/∂w)] | |
| ``taylor`` | E[abs(w·∂L/∂w)], the change of the loss to first order | Molchanov et al., CVPR 2019 |
| ``fisher`` | w²·E[(∂L/∂w)²], the empirical Fisher | Theis et al., "Faster Gaze Prediction", 2018 |
| ``random`` | a random number: what any criterion has to beat | |

Expectations are over batches: one gradient is that of a batch's mean loss. A weight that is zero already scores zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from penjing.errors import RecipeError, TaskError
from penjing.network.graph import in_eval_mode
from penjing.prune import criteria
from penjing.prune.masks import Pattern, check_scope, fraction, keep_each
from penjing.prune.weights import as_stored, by_output, prunable, with_zeros
from penjing.steps.draft import Draft
from penjing.steps.step import Context

CRITERIA = ("magnitude", "random", "gradient", "taylor", "fisher")


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Set the weights with the smallest scores to zero; biases, norms and embeddings stay.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        sparsity: The fraction of the weights that becomes zero, those included that are zero already; None is what
            the pattern "N:M" says, else one half.
        threshold: Instead of `sparsity`: scores below it go. With "magnitude" that is a weight's size.
        pattern: "free", "N:M" (for example "2:4") or blocks "RxC"; see `penjing.prune.masks`.
        scope: "global" compares the weights of all layers, "tensor" those of one layer, "row" those of one output;
            None is "global" for free weights, else "tensor". "N:M" compares neighbours whatever it says.
        criterion: One of `CRITERIA`; those with gradients need labelled data and a loss.
        layers: Layers, or parts of the network, that take part; empty takes all, the first and the last too.
        keep: Layers, or parts of the network, that stay as they are.
        batches: Batches of data that a criterion reads.
    """

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    sparsity: float | None = None
    threshold: float | None = None
    pattern: str = "free"
    scope: Literal["global", "tensor", "row"] | None = None
    criterion: str = "magnitude"
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    batches: int = 20

    def __post_init__(self) -> None:
        fraction(self.sparsity, self.pattern)
        if self.scope is not None:
            check_scope(self.scope, self.pattern)
        if self.threshold is not None:
            self._check_threshold(self.threshold)
        fine = {
            "criterion": (self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}"),
            "batches": (_whole(self.batches), "a whole number of at least 1"),
            "layers": (not isinstance(self.layers, str), "a tuple of names"),
            "keep": (not isinstance(self.keep, str), "a tuple of names"),
        }
        for name, (good, expected) in fine.items():
            if not good:
                raise RecipeError(f"Magnitude({name}=...) can't be used", got=getattr(self, name), expected=expected)

    def _check_threshold(self, threshold: float) -> None:
        fine = {
            "it stands in the place of sparsity": self.sparsity is None,
            "it is for free weights": Pattern.parse(self.pattern).free,
            "random scores have no scale": self.criterion != "random",
            "it is a number of at least 0": _number(threshold) and threshold >= 0,
        }
        if wrong := [reason for reason, good in fine.items() if not good]:
            raise RecipeError(
                "Magnitude(threshold=...) can't be used",
                got=f"threshold={threshold!r}, sparsity={self.sparsity!r}, pattern={self.pattern!r}",
                expected=wrong[0],
                remedy="for example Magnitude(threshold=0.01), or Magnitude(sparsity=0.5)",
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with zeros.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            TaskError: The criterion needs data that the task does not have.
        """
        modules = prunable(draft.network, self.layers, self.keep)
        found = scores(self.criterion, draft.network, modules, context, self.batches)
        kept = self.kept({name: by_output(modules[name], value) for name, value in found.items()})
        masks = {name: as_stored(modules[name], mask) for name, mask in kept.items()}
        weights = {name: modules[name].weight.detach().masked_fill(~mask, 0) for name, mask in masks.items()}
        return with_zeros(draft, context, "Magnitude", weights)

    def kept(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where weights stay, by their scores; both (out, in, *kernel)."""
        if self.threshold is not None:
            return {name: value >= self.threshold for name, value in found.items()}
        scope = self.scope or ("global" if Pattern.parse(self.pattern).free else "tensor")
        return keep_each(found, fraction(self.sparsity, self.pattern), self.pattern, scope)


def scores(
    criterion: str, network: fx.GraphModule, modules: Mapping[str, Any], context: Context, batches: int
) -> dict[str, torch.Tensor]:
    """Layer → the score of every weight, at least 0, in the layout of its weight; the network stays as it is.

    Args:
        criterion: One of `CRITERIA`.
        network: A raised network.
        modules: Its layers that are scored, by name.
        context: For its labelled data, its loss and its seed.
        batches: How many batches are read.
    """
    weights = {name: module.weight.detach() for name, module in modules.items()}
    if criterion == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if criterion == "random":
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        drawn = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        return {name: value.masked_fill_(weights[name] == 0, 0) for name, value in drawn.items()}
    return _by_gradient(criterion, network, modules, context, batches)


def _by_gradient(
    criterion: str, network: fx.GraphModule, modules: Mapping[str, Any], context: Context, batches: int
) -> dict[str, torch.Tensor]:
    if context.task.train is None or context.task.loss is None:
        raise TaskError(
            f'criterion="{criterion}" needs labelled data and a loss',
            got=f"train is {'missing' if context.task.train is None else 'given'}, loss is "
            f"{'missing' if context.task.loss is None else 'given'}",
            expected="Task(train=loader, loss=torch.nn.functional.cross_entropy)",
            remedy='criterion="magnitude" needs no data, prune.Wanda calibration data alone',
        )
    found = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    count = 0
    with in_eval_mode(network), criteria._all_trainable(network):
        for loss in criteria._losses(network, context, batches):
            network.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            count += 1
            for name, module in modules.items():
                if module.weight.grad is not None:
                    found[name] += _term(criterion, module.weight.detach(), module.weight.grad)
    network.zero_grad(set_to_none=True)
    # A weight that is zero already goes first, whatever its gradient is.
    return {name: (v / max(count, 1)).masked_fill_(modules[name].weight == 0, 0) for name, v in found.items()}


def _term(criterion: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if criterion == "gradient":
        return gradient.abs()
    return (weight * gradient).abs() if criterion == "taylor" else (weight * gradient).square()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


__all__ = ["CRITERIA", "Magnitude", "scores"]
