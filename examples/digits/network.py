"""A small residual network for scikit-learn's digits. Input (batch, 1, 8, 8), output (batch, 10) logits.

It is trained on demand in a few seconds, so it needs neither a download nor a checkpoint.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

from examples.digits.task import task
from penjing.architectures import build
from penjing.tasks.task import Task


def untrained() -> nn.Module:
    """Build a ResNet-20 of half the usual width with random weights from torch's global generator."""
    return build("resnet20", in_channels=1, classes=10, width=8)


def train(network: nn.Module, task: Task, epochs: int = 12, rate: float = 0.01) -> nn.Module:
    """Train in place on the task's batches and loss (AdamW, one learning-rate cycle), and return in eval mode."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=len(task.train))
    network.train()
    for _ in range(epochs):
        for images, labels in task.train:
            optimizer.zero_grad()
            task.loss(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def trained() -> nn.Module:
    """Return the trained network in eval mode; the same on every call, leaving torch's global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return train(untrained(), task())
