"""Importance score by the curvature of the loss: its second-order change, for minima where the gradient vanishes.

| name | a unit's score | a weight's score | source |
|---|---|---|---|
| ``hessian`` | trace of its block / (2 weights) · norm² of its weights | w²·∂²L/∂w² / 2 | Yu et al., "Hessian-Aware Pruning", WACV 2022; LeCun et al., "Optimal Brain Damage", 1990 |

The diagonal is Hutchinson's estimate E[z⊙Hz] with random signs z, one draw per batch; negative estimates count as 0.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from penjing.analyze.coupling import Coupling
from penjing.analyze.output_gradients import all_trainable
from penjing.modes import in_eval_mode
from penjing.prune.by_gradient import losses
from penjing.prune.scoring import Criterion, Evidence, Scores, WeightScores, per_unit, rows, zeros_last


def diagonal(evidence: Evidence, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Parameter → the estimated diagonal of the Hessian of the mean loss, in the parameter's shape.

    Args:
        evidence: Has the network and its labelled data.
        names: The parameters.
    """
    network, generator = evidence.network, evidence.generator()
    parameters = {name: network.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    # The fused kernels of attention have no second derivative.
    with in_eval_mode(network), all_trainable(network), sdpa_kernel(SDPBackend.MATH):
        for loss in losses(evidence):
            count += 1
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
            signs = [torch.randint(0, 2, s.shape, generator=generator).to(s) * 2 - 1 for s in gradients]
            along = torch.stack([(s * z).sum() for s, z in zip(gradients, signs, strict=True)]).sum()
            if not along.requires_grad:  # the loss is linear in all of them
                continue
            curvature = torch.autograd.grad(along, list(parameters.values()), materialize_grads=True)
            for name, z, product in zip(parameters, signs, curvature, strict=True):
                sums[name] += z * product
    return {name: value / max(count, 1) for name, value in sums.items()}


def _units(evidence: Evidence, coupling: Coupling) -> Scores:
    parameters = dict(evidence.network.named_parameters())
    members = {
        name: [m for m in group.members if m.tensor in parameters and parameters[m.tensor].dim() > 1]
        for name, group in coupling.groups.items()
    }
    curvature = diagonal(evidence, tuple(dict.fromkeys(m.tensor for of_group in members.values() for m in of_group)))
    scores = {}
    for name, group in coupling.groups.items():
        trace, squares, weights = (torch.zeros(group.units, dtype=torch.float64) for _ in range(3))
        for member in members[name]:
            values = rows(member, parameters[member.tensor])
            trace += per_unit(member, rows(member, curvature[member.tensor]).sum(1), group.units)
            squares += per_unit(member, values.square().sum(1), group.units)
            weights += per_unit(member, torch.full((len(values),), float(values.shape[1])).double(), group.units)
        scores[name] = (trace.clamp(min=0) * squares / (2 * weights.clamp(min=1))).numpy()
    return scores


def _weights(evidence: Evidence, modules: Mapping[str, Any]) -> WeightScores:
    curvature = diagonal(evidence, tuple(f"{name}.weight" for name in modules))
    scores = {
        name: module.weight.detach().square() * curvature[f"{name}.weight"].clamp(min=0) / 2
        for name, module in modules.items()
    }
    return zeros_last(scores, modules)


HESSIAN = Criterion(name="hessian", needs="labels", units=_units, weights=_weights, estimates_loss=True)
