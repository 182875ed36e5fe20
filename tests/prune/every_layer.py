"""One small network with every kind of layer whose weights are pruned, and its task."""

import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.tasks.task import Task


class Net(nn.Module):
    """Convolutions with and without groups, a transposed one, a norm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.up(F.relu(self.grouped(x)))).mean((2, 3)))


LAYERS = ("stem", "grouped", "up", "head")


COUNT = 8 * 27 + 12 * 36 + 12 * 8 + 30


def images(count, seed=0):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


TRAIN = [(images(8, seed), torch.arange(8) % 5) for seed in range(3)]


TASK = Task(example=images(1), calibration=[x for x, _ in TRAIN], train=TRAIN, loss=F.cross_entropy)


def draft(seed=0):
    torch.manual_seed(seed)
    return Draft(capture_network(Net().eval(), (images(2),)))


def zeros(pruned, name):
    return int((pruned.network.get_parameter(f"{name}.weight") == 0).sum())


def total(pruned):
    return sum(zeros(pruned, name) for name in LAYERS)


def bits(any_draft):
    return {k: v.clone() for k, v in any_draft.network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
