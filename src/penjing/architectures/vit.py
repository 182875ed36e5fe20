"""Vision transformer: a transformer encoder on image patches, with a class token.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021; the tiny
and the small size and the initialisation are those of Touvron et al., "Training data-efficient image transformers &
distillation through attention", ICML 2021. All inputs are (batch, in_channels, resolution, resolution), all outputs
(batch, classes) logits.

Stochastic depth and dropout are omitted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to all tokens."""
        query, key, value = (self._split(part) for part in self.qkv(x).chunk(3, -1))
        read = F.scaled_dot_product_attention(query, key, value)
        mixed: torch.Tensor = self.output(read.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) to (N, heads, L, width/heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP of 4·width hidden channels, each behind a norm: (N, L, width) to (N, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add each branch to its input."""
        x = x + self.attention(self.norm1(x))
        x = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return x


class VisionTransformer(nn.Module):
    """Patch embedding, class token, learned positions, blocks, norm, linear classifier on the class token.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        width: Embedding dimension of a token.
        heads: Attention heads; None uses one per 64 channels, as in the paper.
        depth: Number of blocks.
        patch: Height and width of a patch.
        resolution: Height and width of the input, a multiple of `patch`.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int,
        heads: int | None,
        depth: int,
        patch: int,
        resolution: int,
    ) -> None:
        super().__init__()
        heads = max(1, width // 64) if heads is None else heads
        for word, value in (
            *(("in_channels", in_channels), ("classes", classes), ("width", width), ("heads", heads)),
            *(("depth", depth), ("patch", patch), ("resolution", resolution)),
        ):
            if value < 1:
                raise ValueError(f"{word} must be at least 1, not {value}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), not {width}")
        if resolution % patch:
            raise ValueError(f"resolution must be a multiple of patch ({patch}), not {resolution}")
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (resolution // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, resolution, resolution) to (N, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(x.shape[0], -1, -1), tokens), 1)
        tokens = self.blocks(tokens + self.positions)
        logits: torch.Tensor = self.classifier(self.norm(tokens[:, 0]))
        return logits


def vit_tiny(
    in_channels: int = 3,
    classes: int = 1000,
    width: int = 192,
    heads: int | None = None,
    depth: int = 12,
    patch: int = 16,
    resolution: int = 224,
) -> VisionTransformer:
    """ViT-Ti/16, of 3 heads: 5,717,416 parameters with the default arguments."""
    return VisionTransformer(in_channels, classes, width, heads, depth, patch, resolution)


def vit_small(
    in_channels: int = 3,
    classes: int = 1000,
    width: int = 384,
    heads: int | None = None,
    depth: int = 12,
    patch: int = 16,
    resolution: int = 224,
) -> VisionTransformer:
    """ViT-S/16, of 6 heads: 22,050,664 parameters with the default arguments."""
    return VisionTransformer(in_channels, classes, width, heads, depth, patch, resolution)


def vit_base(
    in_channels: int = 3,
    classes: int = 1000,
    width: int = 768,
    heads: int | None = None,
    depth: int = 12,
    patch: int = 16,
    resolution: int = 224,
) -> VisionTransformer:
    """ViT-B/16, of 12 heads: 86,567,656 parameters with the default arguments."""
    return VisionTransformer(in_channels, classes, width, heads, depth, patch, resolution)
