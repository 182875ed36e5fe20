"""One small network per pattern, what it is called with, and what has to become integer in it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, **more):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.body(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """Depthwise convolution, concatenation, average pooling; several outputs, nested."""

    def __init__(self):
        super().__init__()
        self.wide = conv(3, 8)
        self.depthwise = conv(8, 8, groups=8)
        self.point = nn.Conv2d(8, 6, 1)
        self.other = conv(3, 6, stride=2)
        self.merge = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        a = F.relu6(self.point(F.relu6(self.depthwise(F.relu(self.wide(x))))))
        merged = torch.cat([F.avg_pool2d(a, 2), F.relu(self.other(x))], 1)
        scores = self.merge(merged)
        return scores, {"mean": scores.mean((2, 3))}


class Tokens(nn.Module):
    """Keyword inputs, 3-D linear layers with a residual addition, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.shift = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens, context):
        h = self.down(F.relu(self.up(tokens))) + tokens
        pooled = h.mean(1) + self.shift(context)
        return {"logits": self.head(pooled), "hidden": h}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = conv(3, 4)
        self.right = conv(1, 4)

    def forward(self, picture, mask):
        return F.relu(self.left(picture) + self.right(mask))


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.hidden(x))))


@dataclass(frozen=True)
class Case:
    """A network with its inputs: `shapes` are those of one sample, by position or by name."""

    build: type[nn.Module]
    shapes: Any
    integer: dict[str, int] = field(default_factory=dict)

    def inputs(self, samples, seed):
        random = torch.Generator().manual_seed(seed)

        def draw(shape):
            return torch.randn(samples, *shape, generator=random)

        if isinstance(self.shapes, dict):
            return {name: draw(shape) for name, shape in self.shapes.items()}
        return tuple(draw(shape) for shape in self.shapes)


CASES = {
    "residual": Case(Residual, ((3, 12, 12),), {"conv": 2, "linear": 1, "add": 1, "avg_pool": 1}),
    "branches": Case(Branches, ((3, 12, 12),), {"conv": 5}),
    "tokens": Case(Tokens, {"tokens": (6, 8), "context": (4,)}, {"linear": 4}),
    "two inputs": Case(TwoInputs, ((3, 8, 8), (1, 8, 8)), {"conv": 2, "add": 1}),
    "perceptron": Case(Perceptron, ((12,),), {"linear": 2}),
}
