"""Second moments of what layers read, and the basis in which all inputs weigh the same.

In that basis the error of a weight is the error of the layer's output: ‖(W − V)·x‖² summed over the inputs x is
‖(W − V)·S‖² with S·Sᵀ = Σ x·xᵀ. Wang et al., "SVD-LLM", ICLR 2025, for linear layers. The moments of a convolution's
patches are approximated by a product of those between channels and those between positions of the kernel, as in Martens
& Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.gram import Gram, patches, pieces
from penjing.analyze.layer_inputs import observe
from penjing.tasks.call import Call

RIDGE = 1e-3  # added to every moment, relative to their mean: few samples leave directions open
POSITIONS = 64  # of an image, evenly spaced, that a convolution is observed at


@dataclass(frozen=True)
class Basis:
    """A change of the basis of a layer's inputs.

    Attributes:
        channels: S, (in, in): S·Sᵀ are the second moments of the input channels.
        channels_back: The inverse of S.
        taps: The same of the positions of the kernel, (taps, taps); None for a linear layer or a kernel of 1.
        taps_back: Its inverse.
    """

    channels: torch.Tensor
    channels_back: torch.Tensor
    taps: torch.Tensor | None = None
    taps_back: torch.Tensor | None = None

    def into(self, weight: torch.Tensor, *, taps: bool = True) -> torch.Tensor:
        """The weight (out, in, …) in this basis; without `taps` the positions of the kernel stay as they are."""
        return _turned(weight, self.channels, self.taps if taps else None)

    def back(self, weight: torch.Tensor, *, taps: bool = True) -> torch.Tensor:
        """The inverse of `into`."""
        return _turned(weight, self.channels_back, self.taps_back if taps else None)


def _turned(weight: torch.Tensor, channels: torch.Tensor, taps: torch.Tensor | None) -> torch.Tensor:
    turned = torch.einsum("oi...,ij->oj...", weight, channels)
    return turned if taps is None else (turned.flatten(2) @ taps).reshape(weight.shape)


def plain(module: Any) -> Basis:
    """The basis in which a weight's own error counts: that of no data."""
    own = torch.eye(module.weight.shape[1], dtype=torch.float64)
    return Basis(own, own)


def bases(network: fx.GraphModule, layers: Mapping[str, Any], calls: Iterable[Call]) -> dict[str, Basis]:
    """Layer → the basis of what it reads, in one pass over the data; layers that no sample reaches are left out.

    Args:
        network: A captured network.
        layers: Linear layers, and convolutions without groups, by name.
        calls: The data.
    """
    channels = {name: Gram(module.weight.shape[1]) for name, module in layers.items()}
    taps = {name: Gram(module.weight[0, 0].numel()) for name, module in layers.items() if module.weight.dim() > 2}

    def observer(name: str, x: torch.Tensor) -> None:
        module = layers[name]
        for piece in pieces(module, x) if x.numel() else ():
            if isinstance(module, nn.Linear):
                channels[name].add(piece.float())
                continue
            rows = patches(module, piece.float(), positions=POSITIONS)[0]  # (rows, in · taps)
            rows = rows.reshape(len(rows), module.weight.shape[1], -1)
            channels[name].add(rows.transpose(1, 2).flatten(0, 1))
            taps[name].add(rows.flatten(0, 1))

    observe(network, layers, calls, observer)
    reached = {
        name: gram
        for name, gram in channels.items()
        if gram.count and bool(gram.own.isfinite().all()) and bool(gram.own.any())
    }
    return {name: _basis(gram, taps.get(name)) for name, gram in reached.items()}


def _basis(channels: Gram, taps: Gram | None) -> Basis:
    scale = float(channels.own.diagonal().mean() / channels.count)
    roots = _roots(channels, scale)
    if taps is None or len(taps.own) == 1:
        return Basis(*roots)
    return Basis(*roots, *_roots(taps, 1.0))


def _roots(gram: Gram, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """S with S·Sᵀ = the moments, their mean square being `scale`, and the inverse of S."""
    moments = gram.own / gram.own.diagonal().mean()
    values, vectors = torch.linalg.eigh(moments)
    roots = (scale * (values.clamp(min=0) + RIDGE)).sqrt()
    return vectors * roots, (vectors / roots).T


__all__ = ["Basis", "bases", "plain"]
