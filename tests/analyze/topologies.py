"""One tiny network for every pattern in which channels belong together."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(torch.sigmoid(self.norm(self.a(x)))))
        return self.out(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(17)
        self.c = nn.Conv2d(17, 9, 1)
        self.out = nn.Linear(9 * 36, 4)

    def forward(self, x):
        x = torch.cat([self.a(x), x, self.b(x)], 1)
        return self.out(torch.flatten(F.relu(self.c(self.norm(x))), 1))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.a, self.b, self.c = nn.Conv2d(6, 8, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(2, 8, 1)
        self.gate = nn.Conv2d(8, 10, 1)
        self.out = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        a, b, c = self.stem(x).split([6, 4, 2], 1)
        left, right = self.gate(self.a(a) * self.b(b) + self.c(c)).chunk(2, 1)
        return self.out(left * torch.sigmoid(right))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.wide = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(3, 24)
        self.many = nn.Conv2d(24, 24, 3, padding=1, groups=12)
        self.depthwise = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.out = nn.Conv2d(48, 4, 1)

    def forward(self, x):
        return self.out(self.depthwise(F.relu(self.many(self.norm(self.wide(self.stem(x)))))))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            unchanged, changed = x.chunk(2, 1)
            x = torch.cat([unchanged, F.relu(block(changed))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.fused = fused
        self.tokens = nn.Conv2d(3, 16, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 10, 16))
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        if fused:
            self.qkv = nn.Linear(16, 48)
        else:
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.project = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.tokens(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm(x)
        n, length, width = y.shape
        if self.fused:
            q, k, v = self.qkv(y).reshape(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (f(y).view(n, length, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        x = x + self.project(y.transpose(1, 2).reshape(n, length, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x[:, 0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 14), nn.Linear(14, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(x + self.down(torch.tanh(self.up(x))))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.layer = nn.Linear(10, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(self.layer(x))
        return self.out(x)


class Recurrent(nn.Module):
    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.cell = cell(6, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(20, 4)

    def forward(self, ids):
        return self.out(self.cell(self.embed(ids))[0])


class UpAndDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.grouped = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
        self.join = nn.Conv2d(16, 16, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down(x))
        x = self.up(F.relu(self.deep(F.max_pool2d(skip, 2))))
        x = torch.cat([skip, F.interpolate(self.grouped(x), size=skip.shape[2:])], 1)
        return self.out(F.pixel_shuffle(self.join(x), 2))


class Padded(nn.Module):
    """A shortcut without weights: channels are padded with zeros, as in the ResNet paper's option A."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + F.pad(x, (0, 0, 0, 0, 4, 4)))
        return self.out(x.mean((2, 3)))


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.scale = nn.Parameter(torch.randn(12))
        self.a, self.b = nn.Linear(7, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x) * self.scale
        y = self.a(x[:, :7]) + self.b(x[:, 7:])
        return self.out(y) + x[:, 3:4]


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(12)
        self.mix = nn.Linear(12, 12)
        self.weight = nn.Parameter(torch.rand(12))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        x = x + self.mix(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.out(x) + x.amax(-1, keepdim=True)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
        self.table = nn.Parameter(torch.randn(8, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        left, right = torch.sigmoid(self.a(x)), torch.sigmoid(self.b(x))
        mixed = torch.einsum("nlc,nmc->nlm", left, right)
        return self.out(mixed @ left @ self.table)


class GroupedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        n, length, _ = x.shape
        q = self.q(x).view(n, length, 8, 3).transpose(1, 2)
        k, v = (f(x).view(n, length, 4, 3).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t[:, :, None].expand(n, 4, 2, length, 3).reshape(n, 8, length, 3) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, length, 24))


class Windows(nn.Module):
    """Swin: attention inside windows of 3 × 3 pixels, with a learned bias for every head and distance."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.q, self.k, self.v, self.project = (nn.Linear(12, 12) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(25, 4))
        place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        apart = place[:, None] - place + 2
        self.register_buffer("distance", apart[..., 0] * 5 + apart[..., 1])
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        n = x.shape[0]
        y = x.view(n, 2, 3, 2, 3, 12).transpose(2, 3).contiguous().view(-1, 9, 12)
        q, k, v = (f(y).view(4 * n, 9, -1, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = self.bias[self.distance.view(-1)].view(9, 9, -1).permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = self.project(y.transpose(1, 2).reshape(4 * n, 9, -1))
        y = y.view(-1, 2, 2, 3, 3, 12).transpose(2, 3).contiguous().view(-1, 6, 6, 12)
        return self.out(x + y)


class Distances(nn.Module):
    """T5: a norm of squares alone, and one table of biases by distance that every layer's heads share."""

    def __init__(self):
        super().__init__()
        self.embed, self.table = nn.Embedding(20, 12), nn.Embedding(5, 4)
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(12)) for _ in range(2))
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(12, 16, bias=False) for _ in range(3)) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(16, 12, bias=False) for _ in range(2))
        self.out = nn.Linear(12, 3)

    def forward(self, ids):
        x = self.embed(ids)
        n, length, _ = x.shape
        apart = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-2, 2) + 2
        bias = self.table(apart).permute(2, 0, 1).unsqueeze(0)
        for scale, qkv, project in zip(self.scales, self.qkv, self.project, strict=True):
            y = scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            q, k, v = (f(y).view(n, length, -1, 4).transpose(1, 2) for f in qkv)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            x = x + project(y.transpose(1, 2).reshape(n, length, -1))
        return self.out(x)


class Patches(nn.Module):
    """MobileViT: channels and batch are one axis while images are cut into patches and put together again."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.join = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        n, c, _, _ = x.shape
        x = x.reshape(n * c * 3, 2, 3, 2).transpose(1, 2).reshape(n, c, 9, 4)
        x = x.transpose(1, 3).reshape(n * 4, 9, -1)
        x = (x + self.mix(self.norm(x))).view(n, 4, 9, -1).transpose(1, 3)
        x = x.reshape(n * c * 3, 3, 2, 2).transpose(1, 2).reshape(n, c, 6, 6)
        return self.out(F.relu(self.join(x)).mean((2, 3)))


def image():
    return torch.randn(2, 3, 6, 6)


def ids():
    return torch.randint(0, 20, (2, 7))


TOPOLOGIES = {
    "residual": (Residual, image),
    "concat": (Concat, image),
    "split": (Split, image),
    "grouped": (Grouped, image),
    "shuffle": (Shuffle, image),
    "fused attention": (Attention, image),
    "attention of products": (lambda: Attention(fused=False), image),
    "grouped queries": (GroupedQueries, lambda: torch.randn(2, 5, 12)),
    "tied": (Tied, ids),
    "shared": (Shared, lambda: torch.randn(2, 6)),
    "lstm": (Recurrent, ids),
    "gru": (lambda: Recurrent(nn.GRU), ids),
    "rnn": (lambda: Recurrent(nn.RNN), ids),
    "up and down": (UpAndDown, image),
    "padded": (Padded, image),
    "slices": (Slices, lambda: torch.randn(2, 5)),
    "normalised": (Normalised, lambda: torch.randn(2, 5)),
    "products": (Products, lambda: torch.randn(2, 4, 5)),
    "windows": (Windows, image),
    "distances": (Distances, ids),
    "patches": (Patches, image),
}


def scattered(network):
    """The network with norms that are not at their start, so that a wrong channel shows."""
    for module in network.modules():
        for role, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_floating_point() and tensor.dim() == 1:
                with torch.no_grad():
                    tensor.uniform_(0.5, 1.5) if role in ("weight", "running_var") else tensor.normal_(0, 0.3)
    return network.eval()
