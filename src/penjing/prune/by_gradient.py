"""Importance scores from gradients.

| name | a unit's score | a weight's score | source |
|---|---|---|---|
| ``gradient`` | the squared norm of the loss gradient with respect to its weights | E[abs(∂L/∂w)] | |
| ``taylor`` | the squared change of the loss, to first order | E[abs(w·∂L/∂w)] | Molchanov et al., CVPR 2019 |
| ``fisher`` | | w²·E[(∂L/∂w)²], the empirical Fisher | Theis et al., "Faster Gaze Prediction", 2018 |
| ``jacobian`` | the squared change of the outputs, to first order; needs no labels | | |

Expectations are over batches: each gradient is that of a batch's mean loss. The change of the loss is computed where a
unit is *read*: Σ w·∂loss/∂w over the weights that multiply it is the derivative with respect to a gate on the unit,
placed after whatever function lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from penjing.analyze.coupling import Coupling
from penjing.analyze.output_gradients import all_trainable, projected
from penjing.errors import TaskError
from penjing.modes import in_eval_mode
from penjing.prune.scoring import Criterion, Evidence, Scores, WeightScores, per_unit, readers, rows, zeros_last
from penjing.tasks.call import as_call, to_tensors
from penjing.tasks.outputs import to_tensor
from penjing.tasks.task import calibration_calls


def _units(evidence: Evidence, coupling: Coupling, changes: Iterator[torch.Tensor], squared: bool) -> Scores:
    """Sums over batches of the squared first-order changes, or of the squared gradient norms."""
    network = evidence.network
    scores = {name: torch.zeros(group.units, dtype=torch.float64) for name, group in coupling.groups.items()}
    tensors = dict(network.named_parameters())
    with in_eval_mode(network), all_trainable(network):
        for change in changes:
            network.zero_grad(set_to_none=True)
            change.backward()  # type: ignore[no-untyped-call]
            for name, group in coupling.groups.items():
                total = torch.zeros(group.units, dtype=torch.float64)
                for member in readers(group):
                    tensor = tensors.get(member.tensor)
                    if tensor is None or tensor.grad is None:
                        continue
                    gradient = rows(member, tensor.grad)
                    factor = rows(member, tensor) if squared else gradient
                    total += per_unit(member, (gradient * factor).sum(1), group.units)
                scores[name] += total.pow(2) if squared else total
    network.zero_grad(set_to_none=True)
    return {name: value.numpy() for name, value in scores.items()}


def _weights(
    evidence: Evidence, modules: Mapping[str, Any], term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> WeightScores:
    """Means over batches of a function of weight and gradient."""
    network = evidence.network
    scores = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    count = 0
    with in_eval_mode(network), all_trainable(network):
        for loss in losses(evidence):
            network.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            count += 1
            for name, module in modules.items():
                if module.weight.grad is not None:
                    scores[name] += term(module.weight.detach(), module.weight.grad)
    network.zero_grad(set_to_none=True)
    return zeros_last({name: value / max(count, 1) for name, value in scores.items()}, modules)


def losses(evidence: Evidence) -> Iterator[torch.Tensor]:
    """The task's loss on every labelled batch.

    Raises:
        TaskError: The task has no labelled data, or no loss.
    """
    network, task = evidence.network, evidence.context.task
    if task.train is None or task.loss is None:
        raise TaskError(
            "this criterion needs labelled data and a loss",
            code="no-training-data" if task.train is None else "no-loss",
            got=f"train is {'missing' if task.train is None else 'given'}, loss is "
            f"{'missing' if task.loss is None else 'given'}",
            expected="Task(train=loader, loss=torch.nn.functional.cross_entropy)",
            remedy='"jacobian" of Channels and prune.Wanda need only calibration data, "l2" and "magnitude" no data',
        )
    loss = task.loss
    for _, (inputs, target) in zip(range(evidence.batches), task.train, strict=False):
        args, kwargs = to_tensors(as_call(inputs))
        truth = pytree.tree_map_only(np.ndarray, to_tensor, target)
        yield loss(network(*args, **kwargs), truth)


def directions(evidence: Evidence) -> Iterator[torch.Tensor]:
    """Outputs projected on random signs: the expected squared derivative is the mean over all outputs."""
    generator = evidence.generator()
    for args, kwargs in calibration_calls(evidence.context.task, limit=evidence.batches):
        yield projected(evidence.network(*args, **kwargs), generator)


GRADIENT = Criterion(
    name="gradient",
    needs="labels",
    units=lambda evidence, coupling: _units(evidence, coupling, losses(evidence), squared=False),
    weights=lambda evidence, modules: _weights(evidence, modules, lambda weight, gradient: gradient.abs()),
)
TAYLOR = Criterion(
    name="taylor",
    needs="labels",
    units=lambda evidence, coupling: _units(evidence, coupling, losses(evidence), squared=True),
    weights=lambda evidence, modules: _weights(evidence, modules, lambda weight, gradient: (weight * gradient).abs()),
    estimates_loss=True,
)
FISHER = Criterion(
    name="fisher",
    needs="labels",
    weights=lambda evidence, modules: _weights(
        evidence, modules, lambda weight, gradient: (weight * gradient).square()
    ),
    estimates_loss=True,
)
JACOBIAN = Criterion(
    name="jacobian",
    needs="calibration",
    units=lambda evidence, coupling: _units(evidence, coupling, directions(evidence), squared=True),
    estimates_loss=True,
)
