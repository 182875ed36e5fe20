"""Gated units, maxout units and attention heads, in the forms that people write them in."""

import torch
import torch.nn.functional as F
from torch import nn


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(F.glu(self.a(x), -1))


class GluConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(F.glu(self.n(self.a(x)), 1))


class Swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        v, g = self.a(x).chunk(2, -1)
        return self.b(F.silu(g) * v)


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        h = self.a(x)
        return self.b(h[..., :32] * F.gelu(h[..., 32:]))


class Selected(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        h = self.a(x).view(-1, 2, 32)
        return self.b(h[:, 0] * F.gelu(h[:, 1]))


class EverySecond(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        h = self.a(x)
        return self.b(h[..., ::2] * F.gelu(h[..., 1::2]))


class Unbound(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32, 4)

    def forward(self, x):
        v, g = self.a(x).unflatten(-1, (32, 2)).unbind(-1)
        return self.b(v * F.gelu(g))


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        return self.o(self.a(x).view(-1, 10, 2, 8, 8).max(2)[0])


class MaxoutFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.o(self.a(x).view(-1, 5, 4, 8, 8).amax(1))


class MaxoutLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(5, 20), nn.Linear(4, 4)

    def forward(self, x):
        return self.o(self.a(x).view(-1, 4, 5).max(-1).values)


class MaximumOfHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(5, 20), nn.Linear(10, 4)

    def forward(self, x):
        a, b = self.a(x).chunk(2, 1)
        return self.o(torch.maximum(a, b))


class TorchAttention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.i, self.a, self.o = (
            nn.Linear(6, 24),
            nn.MultiheadAttention(24, 4, batch_first=True, **settings),
            nn.Linear(24, 4),
        )

    def forward(self, x):
        x = self.i(x)
        return self.o(x + self.a(x, x, x, need_weights=False)[0])


class TorchAttentionWeights(TorchAttention):
    def forward(self, x):
        x = self.i(x)
        y, w = self.a(x, x, x)
        return self.o(x + y)


class TorchAttentionLengthFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.a, self.o = nn.Linear(6, 24), nn.MultiheadAttention(24, 4), nn.Linear(24, 4)

    def forward(self, x):
        x = self.i(x).transpose(0, 1)
        return self.o(x + self.a(x, x, x, need_weights=False)[0]).transpose(0, 1)


class OtherWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.j, self.a, self.o = (
            nn.Linear(6, 24),
            nn.Linear(6, 10),
            nn.MultiheadAttention(24, 4, batch_first=True, kdim=10, vdim=10),
            nn.Linear(24, 4),
        )

    def forward(self, x):
        y = self.j(x[:, :5])
        x = self.i(x)
        return self.o(x + self.a(x, y, y, need_weights=False)[0])


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.j, self.a, self.o = (
            nn.Linear(6, 24),
            nn.Linear(6, 24),
            nn.MultiheadAttention(24, 4, batch_first=True),
            nn.Linear(24, 4),
        )

    def forward(self, x):
        y = self.j(x[:, :5])
        x = self.i(x)
        return self.o(x + self.a(x, y, y, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(6, 24)
        self.e = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, norm_first=True), 2)
        self.o = nn.Linear(24, 4)

    def forward(self, x):
        return self.o(self.e(self.i(x)))


class Packed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv, self.o = nn.Linear(6, 72), nn.Linear(24, 4)

    def forward(self, x):
        n, t, _ = x.shape
        h = self.qkv(x)
        how = self.how
        if how == "chunk":
            q, k, v = (u.view(n, t, 4, 6).transpose(1, 2) for u in h.chunk(3, -1))
        if how == "split":
            q, k, v = (u.unflatten(-1, (4, 6)).transpose(1, 2) for u in h.split(24, -1))
        if how == "unflatten3":
            q, k, v = (u.view(n, t, 4, 6).transpose(1, 2) for u in h.unflatten(-1, (3, 24)).unbind(2))
        if how == "select3":
            h = h.unflatten(-1, (3, 24))
            q, k, v = (h[:, :, i].view(n, t, 4, 6).transpose(1, 2) for i in range(3))
        if how == "timm":
            q, k, v = h.reshape(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if how == "timm2":
            h = h.reshape(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4)
            q, k, v = h[0], h[1], h[2]
        if how == "neox":
            q, k, v = h.view(n, t, 4, 18).transpose(1, 2).chunk(3, -1)
        if how == "bloom":
            h = h.view(n, t, 4, 3, 6)
            q, k, v = (h[..., i, :].transpose(1, 2) for i in range(3))
        if how == "swap":
            q, k, v = h.view(n, t, 4, 6, 3).permute(4, 0, 2, 1, 3).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, t, 24))


class SharedKeys(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.kv, self.o = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 6).transpose(1, 2)
        k, v = (u.view(n, t, 2, 6).transpose(1, 2) for u in self.kv(x).chunk(2, -1))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.how == "ri":
                k, v = (u.repeat_interleave(2, 1) for u in (k, v))
            else:
                k, v = (u[:, :, None].expand(n, 2, 2, t, 6).reshape(n, 4, t, 6) for u in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, t, 24))


class OneKey(nn.Module):
    """Four heads of queries that share one of keys and values."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(6, 24), nn.Linear(6, 6), nn.Linear(6, 6)
        self.p, self.o = nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.q(x).view(n, t, 4, 6).transpose(1, 2), self.k(x), self.v(x)
        if self.how == "einsum":
            shares = torch.einsum("bhtd,bsd->bhts", q, k).div(6**0.5).softmax(-1)
            y = torch.einsum("bhts,bsd->bhtd", shares, v)
        elif self.how == "broadcast":
            k, v = k[:, None], v[:, None]
            y = (q @ k.mT / 6**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k[:, None], v[:, None], enable_gqa=True)
        return self.o(F.relu(self.p(y.transpose(1, 2).reshape(n, t, 24))))


class KeysRepeated(SharedKeys):
    """Products written out: of the heads that share a key some may go in every group."""

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 6).transpose(1, 2)
        k, v = (u.view(n, t, 2, 6).transpose(1, 2) for u in self.kv(x).chunk(2, -1))
        if self.how == "groups":
            q = q.reshape(n, 2, 2, t, 6)
            shares = torch.einsum("bkgtd,bksd->bkgts", q, k).div(6**0.5).softmax(-1)
            y = torch.einsum("bkgts,bksd->bkgtd", shares, v).reshape(n, 4, t, 6)
        else:
            k, v = (u[:, :, None].expand(n, 2, 2, t, 6).reshape(n, 4, t, 6) for u in (k, v))
            y = (q @ k.mT / 6**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, 24))


def vector():
    return torch.randn(2, 16)


def five():
    return torch.randn(2, 5)


def image():
    return torch.randn(2, 3, 8, 8)


def sequence():
    return torch.randn(2, 7, 6)


HEADS = {"i": 24, "a.in_proj": 4}
STACK = [("self_attn.in_proj", 4), ("linear1", 32)]
ENCODER = {"i": 24, **{f"e.layers.{layer}.{name}": units for layer in (0, 1) for name, units in STACK}}
CASES = {
    "glu": (Glu, vector, {"a": 32}),
    "swiglu": (Swiglu, vector, {"a": 32}),
    "gate by slices": (Slices, vector, {"a": 32}),
    "gate by select": (Selected, vector, {"a": 32}),
    "every second is a gate": (EverySecond, vector, {"a": 32}),
    "gate by unbind": (Unbound, vector, {"a": 32}),
    "glu of a convolution": (GluConvolution, image, {"a": 8}),
    "maxout": (Maxout, image, {"a": 10}),
    "maxout, pieces first": (MaxoutFirst, image, {"a": 4}),
    "maxout, more pieces than units": (MaxoutLast, five, {"a": 4}),
    "maximum of halves": (MaximumOfHalves, five, {"a": 10}),
    "torch attention": (TorchAttention, sequence, HEADS),
    "torch attention without biases": (lambda: TorchAttention(bias=False), sequence, HEADS),
    "torch attention with a key of its own": (lambda: TorchAttention(add_bias_kv=True), sequence, HEADS),
    "torch attention that may look at nothing": (lambda: TorchAttention(add_zero_attn=True), sequence, HEADS),
    "torch attention, both": (lambda: TorchAttentionWeights(add_zero_attn=True, add_bias_kv=True), sequence, HEADS),
    "torch attention and its weights": (TorchAttentionWeights, sequence, HEADS),
    "torch attention, length first": (TorchAttentionLengthFirst, sequence, HEADS),
    "encoder": (Encoder, sequence, ENCODER),
    "keys of another width": (OtherWidths, sequence, {"i": 24, "j": 10, "a.q_proj": 4}),
    "cross attention": (CrossAttention, sequence, {"i": 24, "j": 24, "a.in_proj_0": 4}),
    **{
        f"query, key and value by {how}": (lambda how=how: Packed(how), sequence, {"qkv": 4})
        for how in ("chunk", "split", "unflatten3", "select3", "timm", "timm2", "neox", "bloom", "swap")
    },
    **{f"shared keys by {how}": (lambda how=how: SharedKeys(how), sequence, {"q": 2}) for how in ("sdpa", "ri", "exp")},
    "queries in groups": (lambda: KeysRepeated("groups"), sequence, {"q": 2}),
    "keys repeated, products": (lambda: KeysRepeated("repeat"), sequence, {"kv": 2, "q": 2}),
}
"""Name → how it is built, its example, and its groups with their units."""
ONE_KEY = {f"one key, {how}": (lambda how=how: OneKey(how), sequence) for how in ("einsum", "broadcast", "sdpa")}
