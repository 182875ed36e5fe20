"""Optimizers of a training.

Nesterov momentum: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from penjing.train.settings import TrainingSettings


def optimizer(settings: TrainingSettings, network: nn.Module, others: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a training.

    Args:
        settings: For its kind, rate and weight decay, from which tensors of one dimension are spared.
        network: All its weights are known to the optimizer; frozen ones, which have no gradient, stay, until a hook
            unfreezes them.
        others: Trained beside it.
    """
    trained = [*network.parameters(), *others.parameters()]
    weights, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
