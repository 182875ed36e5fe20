"""Short trainings on digits, with everything that makes a resume hard."""

import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune, train

EVERY_STEP = 1e-9  # seconds between two saved states


class Net(nn.Module):
    """Everything that makes a resume hard: statistics, dropout, and weights that keep a momentum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(self.drop(x.flatten(1)))


class Shuffled:
    """Batches in a new order at every pass, shifted, scaled and noisy: one draw from each global generator."""

    def __init__(self, x, y, size):
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            rows = order[i * self.size : (i + 1) * self.size]
            images = torch.roll(self.x[rows], random.randint(-1, 1), dims=-1) * np.random.uniform(0.9, 1.1)
            yield images.float() + 0.01 * torch.randn(1), self.y[rows]


def digits(count=400, size=100):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor((x - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Shuffled(x[:count], torch.tensor(y[:count]), size)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def context_of(data=None, *, loss=F.cross_entropy, **fields):
    data = digits() if data is None else data
    return Context(task=Task(example=torch.zeros(1, 1, 8, 8), train=data, loss=loss), **fields)


def trained(settings, context=None, network=None):
    return train(net() if network is None else network, context or context_of(), settings)


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    one, other = (x if isinstance(x, dict) else bits(x) for x in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


SHORT = Finetune(epochs=2.5, learning_rate=0.05, autocast="off", save_every_s=EVERY_STEP)  # 10 steps of 4 an epoch
LONGER = replace(SHORT, epochs=5)


class Stop(Exception):
    pass


class Interrupt:
    """A hook that stops the training at one moment, as a crash would."""

    def __init__(self, name=None, step=None):
        self.name, self.step = name, step

    def __call__(self, moment):
        if moment.name == self.name and moment.step == self.step:
            raise Stop
