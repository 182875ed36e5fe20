"""Importance score of a channel by what is read from it: Hu et al., "Network Trimming", 2016.

| name | a unit's score |
|---|---|
| ``activation`` | the mean size of what is read from it |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from penjing.analyze.coupling import Coupling, Group
from penjing.modes import in_eval_mode
from penjing.prune.scoring import Criterion, Evidence, Scores, per_unit, readers
from penjing.tasks.task import calibration_calls


def _activation(evidence: Evidence, coupling: Coupling) -> Scores:
    network = evidence.network
    members = [m for group in coupling.groups.values() for m in readers(group) if m.role == "its inputs"]
    reads = dict.fromkeys(m.tensor.rpartition(".")[0] for m in members)
    sums: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        layer: Any = network.get_submodule(name)
        axis = 1 if hasattr(layer, "kernel_size") else -1

        def hook(_: nn.Module, inputs: Any) -> None:
            sizes = inputs[0].detach().abs().double().movedim(axis, 0).flatten(1).mean(1)
            sums[name] = sums.get(name, torch.zeros_like(sizes)) + sizes

        return hook

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(note(name))
        for name in reads
        if isinstance(network.get_submodule(name), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    try:
        with in_eval_mode(network), torch.no_grad():
            for args, kwargs in calibration_calls(evidence.context.task, limit=evidence.batches):
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _mean_size(group, sums) for name, group in coupling.groups.items()}


def _mean_size(group: Group, sums: dict[str, torch.Tensor]) -> np.ndarray:
    found = torch.zeros(group.units, dtype=torch.float64)
    for member in readers(group):
        sizes = sums.get(member.tensor.rpartition(".")[0])
        if sizes is not None and member.positions.max() < len(sizes):
            found += per_unit(member, sizes[torch.from_numpy(member.positions)], group.units)
    return found.numpy()


ACTIVATION = Criterion(name="activation", needs="calibration", units=_activation)
