"""Small students and their teacher, on digits."""

import os
import signal
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from penjing import distill
from penjing.network.capture import capture_network
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune

SHORT = Finetune(epochs=2, learning_rate=0.05, autocast="off", save_every_s=1e-9)


class Small(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


def captured(width=6, seed=0):
    torch.manual_seed(seed)
    return capture_network(Small(width), (torch.zeros(2, 1, 8, 8),))


def task(**fields):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x[:400] - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y[:400])
    pairs = list(zip(x.split(50), y.split(50), strict=True))
    fields = {"train": pairs, "loss": F.cross_entropy, "calibration": [a for a, _ in pairs]} | fields
    return Task(example=torch.zeros(2, 1, 8, 8), **fields)


def context(teacher, **fields):
    return Context(task=task(**fields), source=teacher)


def agreement(student, teacher):
    x = torch.cat(task().calibration)
    with torch.no_grad():
        return float((student(x).argmax(1) == teacher(x).argmax(1)).float().mean())


WAYS = [
    distill.Logits(),
    distill.HardLabels(),
    distill.DIST(),
    distill.Hints(features=("conv",)),
    distill.AttentionTransfer(features=(("norm", "conv"),), weight=10),
    distill.RKD(),
    distill.SimilarityPreserving(),
    distill.CRD(negatives=128),
    distill.Outputs(),
]

RESUMED = replace(SHORT, distill=(distill.Logits(), distill.Hints(features=("conv",))))  # of two terms, and an adapter


@dataclass(frozen=True)
class Kill:
    """A hook that ends its process behind an update, before its state is saved; at any step it is the same hook."""

    step: int | None = None

    def __call__(self, moment):
        if moment.name == "step" and moment.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def to_data(self):
        return "Kill"
