"""Gram matrices of layer inputs: Σ x·xᵀ over the rows x that a layer multiplies with its weights.

These second moments are the Hessian of GPTQ and SparseGPT, the quadratic form of adaptive rounding, and the normal
equations of a least-squares fit. All of them unfold inputs with `patches` and accumulate products with `Gram`.

Techniques that process layers sequentially, each behind those already changed, call these within
`penjing.analyze.lockstep`. Others get the Gram matrices of all layers in one pass (`collect`), or share them with the
other steps of a run (`shared`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from penjing.analyze.layer_inputs import observe
from penjing.analyze.samples import batches, cache_key
from penjing.steps.step import Context
from penjing.tasks.call import Call

UNFOLDED = 1 << 22  # elements of unfolded patches that are held at once
CACHED = 1 << 16  # elements that are turned at once
SHARED_BYTES = 1 << 29  # of Gram matrices that a run keeps for its other steps

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Gram:
    """Sums of outer products over rows x, and optionally of rows y with x; rows may be weighted with w.

    `dtype` is the accumulation policy: if it is the type of the rows, each product is accumulated within the matrix
    multiplication; if it is a wider type, products are computed in the type of the rows and summed in the wider one.
    float32 products summed in float64 are as fast, and lose no precision over many calls.

    Attributes:
        own: Σ w·x·xᵀ, (groups, columns, columns), or (columns, columns) without groups.
        cross: Σ w·y·xᵀ, (groups, others, columns), or (others, columns); empty where `others` is 0.
        count: Σ w: without weights, how many rows there were.
    """

    def __init__(
        self,
        columns: int,
        *,
        groups: int | None = None,
        others: int = 0,
        means: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        shape = () if groups is None else (groups,)
        self.own = torch.zeros(*shape, columns, columns, dtype=dtype)
        self.cross = torch.zeros(*shape, others, columns, dtype=dtype)
        self.count = 0.0
        self._sums = torch.zeros(*shape, columns, dtype=dtype) if means else None
        self._other_sums = torch.zeros(*shape, others, dtype=dtype)

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: (groups, rows, columns), or (rows, columns) without groups.
            y: (groups, rows, others), or (rows, others).
            weights: (rows, 1), or (1, rows, 1), at least 0, the same in all groups; None where all rows count the same.
        """
        root = None if weights is None else weights.sqrt()
        if root is not None:
            x, y = x * root, None if y is None else y * root
        for total, sums, rows in ((self.own, self._sums, x), (self.cross, self._other_sums, y)):
            if rows is None:
                continue
            _add_product(total, rows, x)
            if sums is not None and self._sums is not None:
                sums += (rows if root is None else rows * root).sum(-2).to(sums.dtype)
        self.count += x.shape[-2] if root is None else float(root.square().sum())

    def means(self) -> torch.Tensor:
        """E[x], (groups, columns), or (columns,) without groups; it needs `means`."""
        assert self._sums is not None, "Gram(means=True) has means"
        return self._sums / self.count

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x·xᵀ] − E[x]·E[x]ᵀ and E[y·xᵀ] − E[y]·E[x]ᵀ, of the shapes of `own` and `cross`; it needs `means`."""
        assert self._sums is not None, "Gram(means=True) has covariances"
        mean, other_mean = self._sums / self.count, self._other_sums / self.count
        return (
            (self.own / self.count).sub_(mean[..., :, None] * mean[..., None, :]),
            (self.cross / self.count).sub_(other_mean[..., :, None] * mean[..., None, :]),
        )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add aᵀ·b to `total`."""
    if total.dtype != a.dtype:
        total += (a.mT @ b).to(total.dtype)
    elif total.dim() == 3:
        total.baddbmm_(a.mT, b)
    else:
        total.addmm_(a.mT, b)


def patches(module: Any, x: torch.Tensor, *, positions: int | None = None, by_tap: bool = False) -> torch.Tensor:
    """Unfold an input into the rows that a layer multiplies with its weights, (groups, rows, columns).

    Args:
        module: A linear layer, or a convolution. A column is one weight of an output channel, or, of a transposed
            convolution, the weights of one input channel.
        x: Its input, (…, channels) of a linear layer, (samples, channels, …) or (channels, …) of a convolution.
        positions: At most this many output positions of every sample, evenly spaced; None takes all.
        by_tap: Order columns by kernel position, then by channel, so that the input channels at one position are
            neighbours. Otherwise by channel, then by kernel position, as the weight is stored.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return (rows if positions is None else rows[:: -(-len(rows) // (positions * x.shape[0]))])[None]
    x = x if x.dim() == module.weight.dim() else x[None]
    taps = list(_taps(module, x, positions))
    groups, width = module.groups, x.shape[1] // module.groups
    if by_tap:
        unfolded = torch.stack([tap.movedim(-1, 1).flatten(2) for tap in taps], dim=2)  # (samples, channels, taps, …)
        rows = unfolded.flatten(1, 2).transpose(1, 2).reshape(-1, groups, width, len(taps)).transpose(0, 1)
        return rows.transpose(2, 3).reshape(groups, rows.shape[1], width * len(taps))
    unfolded = _interleaved(taps) if len(taps) > 1 else taps[0]
    return unfolded.reshape(-1, groups, width * len(taps)).transpose(0, 1)


def _interleaved(taps: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack(taps, dim=-1)`, with its leading axes flattened.

    A few rows at a time, first stacked as they lie and then turned within the cache: written one by one, every number
    of the result would fetch a line of its own.
    """
    rows = [tap.reshape(-1, tap.shape[-1]) for tap in taps]
    stacked = rows[0].new_empty(*rows[0].shape, len(taps))
    many = max(1, CACHED // stacked[0].numel())
    for first in range(0, len(stacked), many):
        part = torch.stack([row[first : first + many] for row in rows])
        stacked[first : first + many] = part.permute(1, 2, 0)
    return stacked


def _taps(module: Any, x: torch.Tensor, positions: int | None) -> Iterator[torch.Tensor]:
    """For every position of the kernel its inputs at all output positions, (samples, …, channels)."""
    rank = x.dim() - 2
    if isinstance(module, _TRANSPOSED):  # one column an input channel, one row an input position
        kernel = stride = dilation = (1,) * rank
    else:
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if any(module._reversed_padding_repeated_twice):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    outputs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    every = 1  # take every n-th position along each axis
    while positions is not None and math.prod(-(-n // every) for n in outputs) > positions:
        every += 1
    slices = [
        [slice(i * d, i * d + (n - 1) * s + 1, s * every) for i in range(k)]
        for n, k, s, d in zip(outputs, kernel, stride, dilation, strict=True)
    ]
    x = x.movedim(1, -1)
    for place in itertools.product(*slices):
        yield x[(slice(None), *place)]


def pieces(module: Any, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split an input into samples (rows of a linear layer) whose patches have at most `UNFOLDED` elements."""
    if isinstance(module, nn.Linear):
        x, each = x.reshape(-1, x.shape[-1]), x.shape[-1]
    else:
        x = x if x.dim() == module.weight.dim() else x[None]
        each = x[0].numel() * (1 if isinstance(module, _TRANSPOSED) else module.weight[0, 0].numel())
    many = max(1, UNFOLDED // max(1, each))
    for first in range(0, len(x), many):
        yield x[first : first + many]


def columns_of(module: Any) -> tuple[int, int]:
    """The groups of a layer, and the columns of each, as `patches` lays them out."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, _TRANSPOSED):
        return groups, module.in_channels // groups
    return groups, module.weight[0].numel()


def add_input(gram: Gram, module: Any, x: torch.Tensor, *, by_tap: bool = False) -> None:
    """Add all patches of an input, at most `UNFOLDED` elements, or one sample, at a time."""
    for piece in pieces(module, x):
        gram.add(patches(module, piece, by_tap=by_tap))


def of_inputs(module: Any, inputs: Iterable[torch.Tensor], *, by_tap: bool = False) -> Gram:
    """The Gram matrix of a layer's inputs: float32 products, summed in float64.

    Args:
        module: As in `patches`.
        inputs: What it reads, one tensor a call.
        by_tap: As in `patches`.
    """
    groups, columns = columns_of(module)
    gram = Gram(columns, groups=groups)
    for x in inputs:
        add_input(gram, module, x, by_tap=by_tap)
    return gram


def collect(
    network: fx.GraphModule, layers: Mapping[str, Any], calls: Iterable[Call], *, by_tap: bool = False
) -> dict[str, Gram]:
    """Layer → the Gram matrix of its inputs, as in `of_inputs`, for all layers in one pass over the data.

    Layers that no sample reaches are left out. The matrices of all layers are in memory together (`size_bytes`), and
    the patches of one `add_input`.

    Args:
        network: A captured network.
        layers: Linear layers and convolutions, also transposed ones, by name. A layer that is called several times has
            one matrix over all calls.
        calls: The data.
        by_tap: As in `patches`.
    """
    grams: dict[str, Gram] = {}

    def observer(name: str, x: torch.Tensor) -> None:
        if not x.numel():  # rows selected by values may be none
            return
        if name not in grams:
            groups, columns = columns_of(layers[name])
            grams[name] = Gram(columns, groups=groups)
        add_input(grams[name], layers[name], x, by_tap=by_tap)

    observe(network, layers, calls, observer)
    return grams


class Shared(dict[str, Gram]):
    """Gram matrices by layer, as they are kept in a run's cache."""


def shared(
    network: fx.GraphModule, layers: Mapping[str, Any], context: Context, samples: int, *, by_tap: bool = False
) -> dict[str, Gram]:
    """`collect` over the first calibration samples, computed once for all steps of a run that ask for the same.

    Only the matrices of the latest network and data are kept, and none of a request that needs more than
    `SHARED_BYTES`. They belong to the run: copy a matrix before changing it.

    Raises:
        CalibrationError: There is no calibration data.
    """

    def compute(names: list[str]) -> dict[str, Gram]:
        return collect(network, {name: layers[name] for name in names}, batches(context, samples), by_tap=by_tap)

    if size_bytes(layers.values()) > SHARED_BYTES:
        return compute(list(layers))
    key = cache_key(Shared, network, context, samples, by_tap)
    context.cache.forget(Shared, but=key)
    return context.cache.by_name(key, layers, compute)


def size_bytes(modules: Iterable[Any]) -> int:
    """Bytes of the float64 Gram matrices of these layers."""
    return sum(8 * groups * columns * (columns + 1) for groups, columns in map(columns_of, modules))


__all__ = [
    "Gram", "add_input", "collect", "columns_of", "of_inputs", "patches", "pieces", "shared", "size_bytes",
]  # fmt: skip
