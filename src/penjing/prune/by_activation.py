"""Importance score of a channel by its activations: Hu et al., "Network Trimming", 2016.

| name | a unit's score |
|---|---|
| ``activation`` | the mean absolute activation that its readers see, summed over them |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from penjing.analyze.channel_statistics import MEAN_SIZES, shared
from penjing.analyze.coupling import Coupling, Group
from penjing.prune.scoring import Criterion, Evidence, Scores, per_unit, readers


def _activation(evidence: Evidence, coupling: Coupling) -> Scores:
    network = evidence.network
    members = [m for group in coupling.groups.values() for m in readers(group) if m.role == "its inputs"]
    names = dict.fromkeys(m.tensor.rpartition(".")[0] for m in members)
    layers = {name: network.get_submodule(name) for name in names}
    layers = {n: m for n, m in layers.items() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    sums = shared(network, layers, evidence.context, MEAN_SIZES, batches=evidence.batches, label="activations")
    return {name: _mean_size(group, sums) for name, group in coupling.groups.items()}


def _mean_size(group: Group, sums: dict[str, torch.Tensor]) -> np.ndarray:
    sums_per_unit = torch.zeros(group.units, dtype=torch.float64)
    for member in readers(group):
        sizes = sums.get(member.tensor.rpartition(".")[0])
        if sizes is not None and member.positions.max() < len(sizes):
            sums_per_unit += per_unit(member, sizes[torch.from_numpy(member.positions)], group.units)
    return sums_per_unit.numpy()


ACTIVATION = Criterion(name="activation", needs="calibration", units=_activation)
