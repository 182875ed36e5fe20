"""Second moments of what layers read, and the basis in which all inputs weigh the same.

In that basis the error of a weight is the error of the layer's output: ‖(W − V)·x‖² summed over the inputs x is
‖(W − V)·S‖² with S·Sᵀ = Σ x·xᵀ. Wang et al., "SVD-LLM", ICLR 2025, for linear layers. The moments of a convolution's
patches are approximated by a product of those between channels and those between positions of the kernel, as in Martens
& Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.gram import Gram, patches, pieces
from penjing.analyze.layer_inputs import observe
from penjing.tasks.call import Call

RIDGE = 1e-3  # added to every moment, relative to their mean: few samples leave directions open
POSITIONS = 64  # of an image or a text, evenly spaced, that a layer is observed at
WIDE = 5000  # inputs above which only their mean squares are counted: the moments grow with the square of them
PASS_BYTES = 1 << 30  # of moments that are collected in one pass over the data


@dataclass(frozen=True)
class Basis:
    """A change of the basis of a layer's inputs.

    Attributes:
        channels: S, (in, in): S·Sᵀ are the second moments of the input channels; (in,) where S is diagonal.
        channels_inverse: The inverse of S, of the same shape.
        taps: The same of the positions of the kernel, (taps, taps); None for a linear layer or a kernel of 1.
        taps_inverse: Its inverse.
    """

    channels: torch.Tensor
    channels_inverse: torch.Tensor
    taps: torch.Tensor | None = None
    taps_inverse: torch.Tensor | None = None

    def into(self, weight: torch.Tensor, *, taps: bool = True) -> torch.Tensor:
        """The weight (out, in, …) in this basis; without `taps` the positions of the kernel stay as they are."""
        return _turned(weight, self.channels, self.taps if taps else None)

    def back(self, weight: torch.Tensor, *, taps: bool = True) -> torch.Tensor:
        """The inverse of `into`."""
        return _turned(weight, self.channels_inverse, self.taps_inverse if taps else None)


def _turned(weight: torch.Tensor, channels: torch.Tensor, taps: torch.Tensor | None) -> torch.Tensor:
    if channels.dim() == 1:
        turned = weight * channels.reshape(-1, *[1] * (weight.dim() - 2))
    else:
        turned = torch.einsum("oi...,ij->oj...", weight, channels)
    return turned if taps is None else (turned.flatten(2) @ taps).reshape(weight.shape)


def plain(module: Any) -> Basis:
    """The basis in which a weight's own error counts: that of no data."""
    own = torch.ones(module.weight.shape[1], dtype=torch.float64)
    return Basis(own, own)


def bases(network: fx.GraphModule, layers: Mapping[str, Any], calls: Sequence[Call]) -> dict[str, Basis]:
    """Layer → the basis of what it reads; layers that no sample reaches are left out.

    Args:
        network: A captured network.
        layers: Linear layers, and convolutions without groups, by name.
        calls: The data; they are run through the network once for every `PASS_BYTES` of moments.
    """
    every: dict[str, Basis] = {}
    group: dict[str, Any] = {}
    for name, module in layers.items():
        if group and size_bytes([*group.values(), module]) > PASS_BYTES:
            every |= _observed(network, group, calls)
            group = {}
        group[name] = module
    return every | _observed(network, group, calls)


def size_bytes(modules: Iterable[Any]) -> int:
    """Bytes of the moments of these layers."""
    return sum(8 * width * (width if width <= WIDE else 1) for width in (m.weight.shape[1] for m in modules))


def _observed(network: fx.GraphModule, layers: Mapping[str, Any], calls: Iterable[Call]) -> dict[str, Basis]:
    """The bases of these layers in one pass."""
    channels = {name: Gram(m.weight.shape[1]) for name, m in layers.items() if m.weight.shape[1] <= WIDE}
    taps = {name: Gram(m.weight[0, 0].numel()) for name, m in layers.items() if m.weight.dim() > 2}
    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def observer(name: str, x: torch.Tensor) -> None:
        module = layers[name]
        for piece in () if not x.numel() else [x] if isinstance(module, nn.Linear) else pieces(module, x):
            rows = patches(module, piece.float(), positions=POSITIONS)[0]
            rows = rows.reshape(len(rows), module.weight.shape[1], -1)  # (rows, in, taps)
            own = rows.transpose(1, 2).flatten(0, 1)
            if name in channels:
                channels[name].add(own)
            else:
                squares[name] = squares.get(name, 0) + own.double().square().sum(0)
                counts[name] = counts.get(name, 0) + len(own)
            if name in taps:
                taps[name].add(rows.flatten(0, 1))

    observe(network, layers, calls, observer)
    roots = {
        name: _roots(gram, gram.own.diagonal().mean() / gram.count) for name, gram in channels.items() if _any(gram.own)
    }
    for name, total in squares.items():
        if _any(total):
            scale = (total / counts[name] + RIDGE * total.mean() / counts[name]).sqrt()
            roots[name] = scale, 1 / scale
    return {
        name: Basis(*of_layer, *(_roots(taps[name], 1.0) if name in taps and len(taps[name].own) > 1 else ()))
        for name, of_layer in roots.items()
    }


def _any(moments: torch.Tensor) -> bool:
    """Whether something was observed, all of it finite."""
    return bool(moments.isfinite().all()) and bool(moments.any())


def _roots(gram: Gram, scale: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S with S·Sᵀ = the moments, their mean square being `scale`, and the inverse of S."""
    moments = gram.own / gram.own.diagonal().mean()
    values, vectors = torch.linalg.eigh(moments)
    roots = (scale * (values.clamp(min=0) + RIDGE)).sqrt()
    return vectors * roots, (vectors / roots).T


__all__ = ["Basis", "bases", "plain"]
