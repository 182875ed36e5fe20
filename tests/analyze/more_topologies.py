"""Blocks of known architectures, and weights that two operators read or that are computed."""

import torch
import torch.nn.functional as F
from torch import nn


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(20, 12)
        self.a, self.b = nn.Linear(12, 30), nn.Linear(30, 12)
        self.h = nn.Linear(12, 20, bias=False)
        self.h.weight = self.e.weight

    def forward(self, x):
        y = self.e(x)
        return self.h(y + self.b(F.relu(self.a(y))))


class TiedFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(20, 12)
        self.a = nn.Linear(12, 12)

    def forward(self, x):
        return F.linear(F.relu(self.a(self.e(x))), self.e.weight)


class TiedAutoencoder(nn.Module):
    "autoencoder whose decoder is the transpose of its encoder"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 24)
        self.b = nn.Linear(24, 10)
        self.bias = nn.Parameter(torch.randn(16))
        self.bias2 = nn.Parameter(torch.randn(24))

    def forward(self, x):
        h = F.relu(self.b(F.relu(self.a(x))))
        h = F.linear(h, self.b.weight.t(), self.bias2)
        return F.linear(h, self.a.weight.t(), self.bias)


class TiedConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.m = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.conv_transpose2d(self.m(F.relu(self.a(x))), self.a.weight)


class MixedKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 10, 1)
        self.k = nn.Linear(10, 4)
        self.w = nn.Parameter(torch.randn(4, 8, 10, 3, 3))
        self.o = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        c = self.k(x.mean((0, 2, 3))).softmax(-1)
        w = (c.view(4, 1, 1, 1, 1) * self.w).sum(0)
        return self.o(F.relu(F.conv2d(x, w, padding=1)))


class MixedByEinsum(MixedKernels):
    def forward(self, x):
        x = F.relu(self.a(x))
        c = self.k(x.mean((0, 2, 3))).softmax(-1)
        return self.o(F.relu(F.conv2d(x, torch.einsum("k,koihw->oihw", c, self.w), padding=1)))


class MixedByProduct(MixedKernels):
    def forward(self, x):
        x = F.relu(self.a(x))
        c = self.k(x.mean((0, 2, 3))).softmax(-1)
        return self.o(F.relu(F.conv2d(x, (c @ self.w.view(4, -1)).view(8, 10, 3, 3), padding=1)))


class PerSample(MixedKernels):
    def forward(self, x):
        "per sample, as groups of one wide convolution"
        x = F.relu(self.a(x))
        n = x.shape[0]
        c = self.k(x.mean((2, 3))).softmax(-1)
        w = (c @ self.w.view(4, -1)).view(-1, 10, 3, 3)
        return self.o(F.relu(F.conv2d(x.view(1, -1, 8, 8), w, padding=1, groups=n).view(n, 8, 8, 8)))


class MixedOutputs(MixedKernels):
    "sum of experts' outputs"

    def __init__(self):
        super().__init__()
        self.ex = nn.ModuleList(nn.Conv2d(10, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.a(x))
        c = self.k(x.mean((2, 3))).softmax(-1)
        return self.o(sum(c[:, i, None, None, None] * e(x) for i, e in enumerate(self.ex)))


class StackedExperts(MixedKernels):
    "experts as a stacked convolution, mixed"

    def __init__(self):
        super().__init__()
        self.ex = nn.Conv2d(10, 32, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.a(x))
        c = self.k(x.mean((2, 3))).softmax(-1)
        return self.o((self.ex(x).view(-1, 4, 8, 8, 8) * c[:, :, None, None, None]).sum(1))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Linear(12, 4)
        self.u, self.d = nn.Parameter(torch.randn(4, 12, 20)), nn.Parameter(torch.randn(4, 20, 6))
        self.i, self.o = nn.Linear(6, 12), nn.Linear(6, 3)

    def forward(self, x):
        x = self.i(x)
        g = self.g(x).softmax(-1)
        h = F.silu(torch.einsum("bd,edh->beh", x, self.u))
        y = torch.einsum("beh,eho->beo", h, self.d)
        return self.o((y * g[..., None]).sum(1))


class ExpertsByProduct(Experts):
    def forward(self, x):
        x = self.i(x)
        g = self.g(x).softmax(-1)
        h = F.silu(x.expand(4, -1, -1) @ self.u) @ self.d
        return self.o((h * g.t()[..., None]).sum(0))


class AdaptiveMaximum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.f = nn.Linear(8 * 9, 10)
        self.o = nn.Linear(10, 3)

    def forward(self, x):
        return self.o(F.relu(self.f(F.adaptive_max_pool2d(F.relu(self.a(x)), 3).flatten(1))))


class AdaptiveAverage(AdaptiveMaximum):
    def forward(self, x):
        return self.o(F.relu(self.f(F.adaptive_avg_pool2d(F.relu(self.a(x)), (3, 3)).flatten(1))))


class Adaptive1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(6, 8, 3, padding=1)
        self.f = nn.Linear(8 * 3, 10)
        self.o = nn.Linear(10, 3)

    def forward(self, x):
        return self.o(F.relu(self.f(F.adaptive_max_pool1d(F.relu(self.a(x.transpose(1, 2))), 3).flatten(1))))


class Adaptive3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(3, 8, 3)
        self.f = nn.Linear(8 * 8, 10)
        self.o = nn.Linear(10, 3)

    def forward(self, x):
        return self.o(F.relu(self.f(F.adaptive_avg_pool3d(F.max_pool3d(F.relu(self.a(x)), 2), 2).flatten(1))))


class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10))
        self.o = nn.Linear(10, 3)

    def forward(self, x):
        return self.o(F.gelu(torch.addmm(self.b, x.reshape(-1, 6), self.w)))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.r, self.e = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.o = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.o(x * torch.sigmoid(self.e(F.relu(self.r(F.adaptive_avg_pool2d(x, 1))))))


class SpatialAttention(nn.Module):
    "squeeze to one channel: spatial attention"

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.s = nn.Conv2d(2, 1, 3, padding=1)
        self.o = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.o(x * torch.sigmoid(self.s(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))))


class ChannelConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.c = nn.Conv1d(1, 1, 3, padding=1)
        self.o = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        w = self.c(x.mean((2, 3))[:, None])
        return self.o(x * torch.sigmoid(w[:, 0, :, None, None]))


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Conv2d(3, 12, 2, 2)
        self.d = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.n = nn.LayerNorm(12)
        self.u, self.v = nn.Linear(12, 48), nn.Linear(48, 12)
        self.g = nn.Parameter(torch.rand(12))
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        x = self.i(x)
        h = self.d(x).permute(0, 2, 3, 1)
        h = self.g * self.v(F.gelu(self.u(self.n(h))))
        x = x + h.permute(0, 3, 1, 2)
        return self.o(x.mean((2, 3)))


class ResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Linear(6, 20), nn.Linear(20, 5)
        self.g, self.b = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(20))

    def forward(self, x):
        h = F.gelu(self.u(x))
        gx = h.norm(p=2, dim=1, keepdim=True)
        nx = gx / (gx.mean(-1, keepdim=True) + 1e-6)
        return self.v(self.g * (h * nx) + self.b + h)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(6, 12)
        self.n, self.m = nn.LayerNorm(12), nn.LayerNorm(12)
        self.t1, self.t2 = nn.Linear(7, 20), nn.Linear(20, 7)
        self.c1, self.c2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        x = self.i(x)
        x = x + self.t2(F.gelu(self.t1(self.n(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.m(x))))
        return self.o(x.mean(1))


class Ghost(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.o = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        y = F.relu(self.p(x))
        return self.o(torch.cat([y, F.relu(self.c(y))], 1)[:, :12])


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.b2, self.c, self.p = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(3, 5, 5, padding=2),
            nn.Conv2d(3, 4, 1),
        )
        self.n = nn.BatchNorm2d(23)
        self.o = nn.Conv2d(23, 3, 1)

    def forward(self, x):
        return self.o(
            F.relu(
                self.n(
                    torch.cat([self.a(x), self.b2(F.relu(self.b(x))), self.c(x), self.p(F.max_pool2d(x, 3, 1, 1))], 1)
                )
            )
        )


class Capsule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 24, 3, stride=2)
        self.w = nn.Parameter(torch.randn(6, 5, 4, 8))
        self.o = nn.Linear(5 * 8, 3)

    def forward(self, x):
        u = self.a(x).view(-1, 6, 4, 9).mean(-1)
        v = torch.einsum("bic,ioch->bioh", u, self.w).sum(1)
        v = v * v.norm(dim=-1, keepdim=True)
        return self.o(v.flatten(1))


class UNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.u = nn.ConvTranspose2d(12, 8, 2, 2)
        self.m = nn.Conv2d(16, 6, 3, padding=1)
        self.o = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        return self.o(F.relu(self.m(torch.cat([a, self.u(b)], 1))))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 20), nn.Linear(20, 10)
        self.o = nn.Linear(10, 3)

    def forward(self, x):
        a, b = (self.b(F.relu(self.a(u))) for u in (x, x.flip(-1)))
        return self.o((a - b).abs())


class RecurrentHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(6, 10, 3, padding=1)
        self.r = nn.LSTM(10, 8, 2, batch_first=True, bidirectional=True)
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        y, _ = self.r(F.relu(self.c(x.transpose(1, 2))).transpose(1, 2))
        return self.o(y[:, -1])


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.GRU(6, 8, batch_first=True)
        self.q = nn.Linear(8, 12)
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        _, h = self.r(x)
        return self.o(torch.tanh(self.q(h[-1])))


class Tokens(nn.Module):
    "channels last heads and window"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(16 * 7, 9)
        self.o = nn.Linear(9, 3)

    def forward(self, x):
        return self.o(F.relu(self.b(F.relu(self.a(x)).flatten(1))))


class Film(nn.Module):
    "FiLM"

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3)
        self.f = nn.Linear(3, 16)
        self.o = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        g, b = self.f(x.mean((2, 3))).chunk(2, 1)
        return self.o(F.relu(self.c(x) * g[:, :, None, None] + b[:, :, None, None]))


class SelectiveKernels(nn.Module):
    "selective kernels: softmax over branches"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=2)
        self.z, self.f = nn.Linear(8, 6), nn.Linear(6, 16)
        self.o = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        u = torch.stack([self.a(x), self.b(x)], 1)
        w = self.f(F.relu(self.z(u.sum(1).mean((2, 3))))).view(-1, 2, 8).softmax(1)
        return self.o((u * w[..., None, None]).sum(1))


class SplitAttention(nn.Module):
    "ResNeSt"

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.f = nn.Linear(8, 16)
        self.o = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = F.relu(self.a(x))
        n = h.shape[0]
        p = h.view(n, 2, 8, 8, 8)
        w = self.f(p.sum(1).mean((2, 3))).view(n, 1, 2, 8).transpose(1, 2).softmax(1).reshape(n, 16)
        return self.o((h * w[:, :, None, None]).view(n, 2, 8, 8, 8).sum(1))


class MultiQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(24, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 6).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        return self.o((((q @ k.transpose(-1, -2)) / 6**0.5).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 24))


class GatedMlp(nn.Module):
    "gMLP spatial gating unit"

    def __init__(self):
        super().__init__()
        self.u = nn.Linear(6, 24)
        self.n = nn.LayerNorm(12)
        self.p = nn.Conv1d(7, 7, 1)
        self.v = nn.Linear(12, 4)

    def forward(self, x):
        a, b = F.gelu(self.u(x)).chunk(2, -1)
        return self.v(a * self.p(self.n(b)))


class PRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.p, self.b = nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.p(self.a(x))
        return self.o(x + self.b(x))


class SpaceToDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(32, 16, 1)
        self.o = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.o(F.pixel_shuffle(F.relu(self.b(F.pixel_unshuffle(F.relu(self.a(x)), 2))), 2))


class PerSampleKernels(MixedKernels):
    def forward(self, x):
        x = F.relu(self.a(x))
        n = x.shape[0]
        c = self.k(x.mean((2, 3))).softmax(-1)
        w = (c.view(n, 4, 1, 1, 1, 1) * self.w).sum(1).view(n * 8, 10, 3, 3)
        return self.o(F.relu(F.conv2d(x.view(1, n * 10, 8, 8), w, padding=1, groups=n).view(n, 8, 8, 8)))


def vector():
    return torch.randn(2, 16)


def six():
    return torch.randn(3, 6)


def image():
    return torch.randn(2, 3, 8, 8)


class TorchShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 3, padding=1, groups=3)
        self.h, self.o = nn.Conv2d(48, 24, 1, groups=3), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.o(F.relu(self.h(F.channel_shuffle(self.g(F.relu(self.a(x))), 3))))


class Unfolded(nn.Module):
    """Windows laid out, weighed and added up again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        windows = F.unfold(y, 3, padding=1) * F.unfold(y, 3, padding=1).mean(2, keepdim=True)
        y = self.b(F.fold(windows, (8, 8), 3, padding=1))
        return self.o(F.relu(y).unfold(2, 3, 2).amax(-1))


class LambdaLayer(nn.Module):
    """A convolution reads heads times values, which both may change."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.k = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 1), nn.Conv2d(12, 4, 1)
        self.v, self.o = nn.Conv2d(12, 10, 1), nn.Conv2d(40, 3, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        n = x.shape[0]
        q, k, v = self.q(x).view(n, 4, 4, 64), self.k(x).flatten(2).softmax(-1), self.v(x).flatten(2)
        y = torch.einsum("bhkn,bkv->bhvn", q, torch.einsum("bkm,bvm->bkv", k, v))
        return self.o(y.reshape(n, 40, 8, 8))


def sequence():
    return torch.randn(2, 7, 6)


def volume():
    return torch.randn(2, 3, 8, 8, 8)


def ids():
    return torch.randint(0, 20, (2, 7))


MORE = {
    "torch's shuffle": (TorchShuffle, image),
    "unfolded": (Unfolded, image),
    "lambda layer": (LambdaLayer, image),
    "siamese": (Siamese, vector),
    "tied language model": (TiedLanguageModel, ids),
    "tied function": (TiedFunction, ids),
    "tied autoencoder": (TiedAutoencoder, vector),
    "tied convolution": (TiedConvolution, image),
    "mixed kernels": (MixedKernels, image),
    "mixed by einsum": (MixedByEinsum, image),
    "mixed by product": (MixedByProduct, image),
    "per sample": (PerSample, image),
    "per sample kernels": (PerSampleKernels, image),
    "mixed outputs": (MixedOutputs, image),
    "stacked experts": (StackedExperts, image),
    "adaptive maximum": (AdaptiveMaximum, image),
    "adaptive average": (AdaptiveAverage, image),
    "squeeze excite": (SqueezeExcite, image),
    "spatial attention": (SpatialAttention, image),
    "conv ne xt": (ConvNeXt, image),
    "ghost": (Ghost, image),
    "inception": (Inception, image),
    "capsule": (Capsule, image),
    "u network": (UNetwork, image),
    "film": (Film, image),
    "selective kernels": (SelectiveKernels, image),
    "split attention": (SplitAttention, image),
    "p relu": (PRelu, image),
    "space to depth": (SpaceToDepth, image),
    "adaptive1d": (Adaptive1d, sequence),
    "mixer": (Mixer, sequence),
    "response norm": (ResponseNorm, sequence),
    "recurrent head": (RecurrentHead, sequence),
    "last state": (LastState, sequence),
    "tokens": (Tokens, sequence),
    "multi query": (MultiQuery, sequence),
    "gated mlp": (GatedMlp, sequence),
    "experts": (Experts, six),
    "experts by product": (ExpertsByProduct, six),
    "addmm": (Addmm, six),
    "adaptive3d": (Adaptive3d, volume),
}
