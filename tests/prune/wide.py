"""Networks of channels to prune, and their task."""

import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.tasks.task import Task
from tests.analyze.topologies import scattered


def images(count, seed=0):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


TASK = Task(
    example=images(1),
    calibration=[images(8)],
    train=[(images(8), torch.arange(8) % 3)],
    loss=F.cross_entropy,
)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
        self.norm = nn.BatchNorm2d(48)
        self.c = nn.Conv2d(48, 24, 1)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(F.relu(self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))).mean((2, 3)))


def draft(model, seed=0):
    torch.manual_seed(seed)
    return Draft(capture_network(scattered(model), (images(2),)))


def left(before, after, what):
    a, b = (totals(cost(d.network, TASK.call())) for d in (before, after))
    return getattr(b, what) / getattr(a, what)
