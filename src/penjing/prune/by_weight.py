"""Data-free importance scores: weight norms, batch-norm scales, distances between filters, and random scores.

| name | a unit's score | a weight's score | source |
|---|---|---|---|
| ``l1``, ``l2`` | the norm of all its weights | | Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 |
| ``bn_scale`` | the scales of its batch norms | | Liu et al., "Network Slimming", ICCV 2017 |
| ``geometric_median`` | the summed distance of its filters to all others | | He et al., "FPGM", CVPR 2019 |
| ``magnitude`` | | abs(w) | Han et al., "Learning both Weights and Connections", NeurIPS 2015 |
| ``random`` | a random number | a random number | the baseline |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from penjing.analyze.coupling import Coupling, Group
from penjing.prune.scoring import Criterion, Evidence, Scores, WeightScores, per_unit, rows, zeros_last


def _tensors(evidence: Evidence) -> dict[str, torch.Tensor]:
    return {**dict(evidence.network.named_parameters()), **dict(evidence.network.named_buffers())}


def _norm(group: Group, tensors: dict[str, torch.Tensor], power: int) -> np.ndarray:
    members = [m for m in group.members if tensors[m.tensor].dim() > 1] or group.members
    each = [per_unit(m, rows(m, tensors[m.tensor]).abs().pow(power).sum(1), group.units) for m in members]
    return torch.stack(each).sum(0).pow(1 / power).numpy()


def _l1(evidence: Evidence, coupling: Coupling) -> Scores:
    tensors = _tensors(evidence)
    return {name: _norm(group, tensors, 1) for name, group in coupling.groups.items()}


def _l2(evidence: Evidence, coupling: Coupling) -> Scores:
    tensors = _tensors(evidence)
    return {name: _norm(group, tensors, 2) for name, group in coupling.groups.items()}


def _bn_scale(evidence: Evidence, coupling: Coupling) -> Scores:
    tensors = _tensors(evidence)
    scores = {}
    for name, group in coupling.groups.items():
        scales = [m for m in group.members if m.role == "one of every channel" and m.tensor.endswith("weight")]
        each = [per_unit(m, rows(m, tensors[m.tensor]).abs().sum(1), group.units) for m in scales]
        # A group without a batch norm is scored by the norm of its weights.
        scores[name] = torch.stack(each).sum(0).numpy() if each else _norm(group, tensors, 2)
    return scores


def _geometric_median(evidence: Evidence, coupling: Coupling) -> Scores:
    tensors = _tensors(evidence)
    scores = {}
    for name, group in coupling.groups.items():
        weights = [m for m in group.members if tensors[m.tensor].dim() > 1]
        makers = [m for m in weights if m.role == "its outputs"] or weights[:1] or group.members[:1]
        filters = torch.cat([rows(m, tensors[m.tensor]).reshape(group.units, -1) for m in makers], dim=1)
        scores[name] = torch.cdist(filters, filters).sum(1).numpy()
    return scores


def _random_units(evidence: Evidence, coupling: Coupling) -> Scores:
    generator = evidence.generator()
    return {
        name: torch.rand(group.units, generator=generator).double().numpy() for name, group in coupling.groups.items()
    }


def _random_weights(evidence: Evidence, modules: Mapping[str, Any]) -> WeightScores:
    generator = evidence.generator()
    drawn = {name: torch.rand(module.weight.shape, generator=generator) for name, module in modules.items()}
    return zeros_last(drawn, modules)


def _magnitude(evidence: Evidence, modules: Mapping[str, Any]) -> WeightScores:
    return {name: module.weight.detach().abs() for name, module in modules.items()}


L1 = Criterion(name="l1", units=_l1)
L2 = Criterion(name="l2", units=_l2)
BN_SCALE = Criterion(name="bn_scale", units=_bn_scale)
GEOMETRIC_MEDIAN = Criterion(name="geometric_median", units=_geometric_median)
MAGNITUDE = Criterion(name="magnitude", weights=_magnitude)
RANDOM = Criterion(name="random", units=_random_units, weights=_random_weights, has_scale=False)
