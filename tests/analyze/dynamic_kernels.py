"""Convolutions whose kernels are mixed of experts for every sample, in the forms that people write them in."""

import torch
import torch.nn.functional as F
from torch import nn


class Mixed(nn.Module):
    """Experts (experts, out, in, 3, 3), mixed by a product; all samples are groups of one convolution."""

    out, read, groups = 8, 10, 1

    def __init__(self):
        super().__init__()
        self.a, self.k = nn.Conv2d(3, 10, 1), nn.Linear(10, 4)
        self.w = nn.Parameter(torch.randn(4, self.out, self.read, 3, 3))
        self.n, self.o = nn.BatchNorm2d(self.out), nn.Conv2d(self.out, 3, 1)

    def mixed(self, c):
        return (c @ self.w.view(4, -1)).view(-1, self.read, 3, 3)

    def bias(self, c):
        return None

    def dynamic(self, x):
        n, channels, height, width = x.shape
        c = self.k(x.mean((2, 3))).softmax(-1)
        y = F.conv2d(x.reshape(1, n * channels, height, width), self.mixed(c), self.bias(c), 1, 1, 1, self.groups * n)
        return y.view(n, self.out, height, width)

    def forward(self, x):
        return self.o(F.relu(self.n(self.dynamic(F.relu(self.a(x))))))


class ByEinsum(Mixed):
    def mixed(self, c):
        return torch.einsum("bk,koihw->boihw", c, self.w).reshape(-1, 10, 3, 3)


class BySum(Mixed):
    def mixed(self, c):
        return (c.view(-1, 4, 1, 1, 1, 1) * self.w).sum(1).flatten(0, 1)


class Flat(Mixed):
    """Experts (experts, out·in·9), and biases."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 8 * 10 * 9)), nn.Parameter(torch.randn(4, 8))

    def mixed(self, c):
        return (c @ self.w).view(-1, 10, 3, 3)

    def bias(self, c):
        return (c @ self.b).view(-1)


class FlatBySum(Flat):
    def mixed(self, c):
        return (c[:, :, None] * self.w).sum(1).view(-1, 10, 3, 3)

    def bias(self, c):
        return (c[:, :, None] * self.b).sum(1).flatten()


class FlatInTwoSteps(Flat):
    def mixed(self, c):
        return (c @ self.w).view(c.shape[0], 8, 10, 3, 3).reshape(-1, 10, 3, 3)


class Made(Mixed):
    """A layer makes the kernels."""

    def __init__(self):
        super().__init__()
        self.h = nn.Linear(4, 8 * 10 * 9)
        del self.w

    def mixed(self, c):
        return self.h(c).view(-1, 10, 3, 3)


class Grouped(Mixed):
    read, groups = 5, 2


class Depthwise(Mixed):
    out, read, groups = 10, 1, 10


class Residual(Mixed):
    """Two of them behind each other; what the second gives is added to what it reads, so that both go together."""

    def __init__(self):
        super().__init__()
        self.w2, self.k2 = nn.Parameter(torch.randn(4, 8 * 8 * 9)), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.n(self.dynamic(F.relu(self.a(x)))))
        n, channels, height, width = y.shape
        w = (self.k2(y.mean((2, 3))).softmax(-1) @ self.w2).view(-1, 8, 3, 3)
        z = F.conv2d(y.reshape(1, -1, height, width), w, padding=1, groups=n)
        return self.o(y + z.view(n, channels, height, width))


class ByTheBatch(Mixed):
    """One kernel for all samples, of flat experts."""

    def dynamic(self, x):
        c = self.k(x.mean((0, 2, 3))).softmax(-1)
        return F.conv2d(x, (c @ self.w.view(4, -1)).view(8, 10, 3, 3), padding=1)


def image():
    return torch.randn(2, 3, 8, 8)


FREE = {"a": 10, "k": 4}
KERNELS = {
    "mixed": (Mixed, image, {**FREE, "w_layer": 8}),
    "by einsum": (ByEinsum, image, {**FREE, "w_layer": 8}),
    "by sum": (BySum, image, {**FREE, "w": 8}),
    "flat, with biases": (Flat, image, {**FREE, "b_layer": 8}),
    "flat, by sum": (FlatBySum, image, {**FREE, "b": 8}),
    "flat, in two steps": (FlatInTwoSteps, image, {**FREE, "b_layer": 8}),
    "made by a layer": (Made, image, {**FREE, "h": 8}),
    "in groups": (Grouped, image, {"a": 5, "k": 4, "w_layer": 4}),
    "depthwise": (Depthwise, image, FREE),
    "two, with a residual": (Residual, image, {**FREE, "w_layer": 8, "k2": 4}),
    "one kernel for the batch": (ByTheBatch, image, {**FREE, "w_layer": 8}),
}
"""Name → how it is built, its example, and its groups with their units."""
