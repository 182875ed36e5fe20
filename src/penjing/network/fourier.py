"""Fourier transforms of fixed length as matrix products with stored cosines and sines.

Spectral layers (Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021; FNet;
global filters) transform, multiply by complex weights and transform back. Runtimes do not support complex numbers, and
their own transforms are slow or missing. A transform along one axis is a matrix product, exact up to rounding; it takes
n² instead of n·log n operations, but at the lengths of such layers (`LONGEST`) runtimes are fastest with products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from penjing.network.graph import arguments, operator_name
from penjing.network.rewriting import Builder

aten = torch.ops.aten
Pair = tuple[Any, Any]  # real and imaginary part; the latter is None if it is 0
LONGEST = 2048  # of a transform; its matrices have 2·n·n numbers
REAL_IN, REAL_OUT = ("fft_rfft", "fft_rfft2", "fft_rfftn"), ("fft_irfft", "fft_irfft2", "fft_irfftn")
WHOLE = ("fft_fft", "fft_fft2", "fft_fftn", "fft_ifft", "fft_ifft2", "fft_ifftn")
SHIFTS = ("fft_fftshift", "fft_ifftshift")


def expressible(node: fx.Node) -> bool:
    """Whether an operator is not a transform, or is one of fixed and supported length."""
    if operator_name(node) not in RULES:
        return True
    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = x.meta["val"].shape
    lengths = _lengths(node, shape)
    return all(isinstance(n, int) and isinstance(shape[dim], int) and n <= LONGEST for dim, n in lengths)


def _transform(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    name, x = operator_name(build.node), pair(a["self"])
    first, inverse = x[0], "_i" in name
    axes = _lengths(build.node, build.value(first).shape)
    *others, (last, length) = axes
    if name in REAL_IN:
        x = _product(build, x, last, *_matrices(length, inverse, a["norm"], length // 2 + 1))
        others = others[::-1]
    elif name in WHOLE:
        others = axes
    for dim, n in others:
        x = _product(build, x, dim, *_matrices(n, inverse, a["norm"], n))
    if name not in REAL_OUT:
        return x
    return _real(build, x, last, length, a["norm"])


def _shifted(build: Builder, a: dict[str, Any], pair: Callable[[Any], Pair]) -> Any:
    """Shift the zero frequency to the centre, or back to the front."""
    parts = pair(a["self"])
    shape = build.value(parts[0]).shape
    dims = [dim for dim, _ in _lengths(build.node, shape)]
    back = operator_name(build.node) == "fft_ifftshift"
    steps = [(shape[d] + 1) // 2 if back else shape[d] // 2 for d in dims]
    return tuple(part if part is None else build(aten.roll.default, part, steps, dims) for part in parts)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((*REAL_IN, *REAL_OUT, *WHOLE), _transform),
    **dict.fromkeys(SHIFTS, _shifted),
}
"""ATen's transforms → their rewrites (for `penjing.network.complex_pairs`)."""


def _lengths(node: fx.Node, shape: Sequence[Any]) -> list[tuple[int, Any]]:
    """The transformed axes, non-negative, with their lengths; the last one is the real transform's."""
    a, name = arguments(node), operator_name(node)
    dims, sizes = a["dim"], a.get("n", a.get("s"))
    sizes = [sizes] if "n" in a else sizes
    if dims is None:
        dims = range(-len(sizes), 0) if sizes is not None else range(len(shape))
    dims = [d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)]
    lengths = []
    for i, dim in enumerate(dims):
        requested = sizes[i] if sizes is not None else None
        whole = 2 * (shape[dim] - 1) if name in REAL_OUT and i == len(dims) - 1 else shape[dim]
        lengths.append((dim, whole if requested is None or requested == -1 else requested))
    return lengths


def _scale(n: int, inverse: bool, norm: str | None) -> float:
    """The normalization factor of a transform of length n."""
    if norm == "ortho":
        return 1 / math.sqrt(n)
    return 1 / n if inverse == (norm in (None, "backward")) else 1.0


def _waves(n: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2π·row·column/n, (rows, columns), float64; the phase is reduced modulo n to stay exact."""
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n
    angles = turns.double() * (2 * math.pi / n)
    sine = angles.sin()
    sine[2 * turns % n == 0] = 0.0
    return angles.cos(), sine


def _matrices(n: int, inverse: bool, norm: str | None, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of the transform matrix, (n, columns)."""
    cosine, sine = _waves(n, n, columns)
    scale = _scale(n, inverse, norm)
    return cosine * scale, sine * (scale if inverse else -scale)


def _product(build: Builder, x: Pair, dim: int, real: torch.Tensor, imaginary: torch.Tensor) -> Pair:
    """(a + ib)·(c + id) along an axis."""
    (a, b), c = x, _along(build, dim, real)
    d = _along(build, dim, imaginary)
    if b is None:
        return c(a), d(a)
    return build(aten.sub.Tensor, c(a), d(b)), build(aten.add.Tensor, d(a), c(b))


def _real(build: Builder, x: Pair, dim: int, n: int, norm: str | None) -> Any:
    """Inverse transform from half of the frequencies; the other half is conjugate-symmetric."""
    bins = n // 2 + 1
    cosine, sine = _waves(n, bins, n)
    twice = torch.full((bins, 1), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if n % 2 == 0:
        twice[-1] = 1.0
    twice *= _scale(n, True, norm)
    result = _along(build, dim, cosine * twice)(x[0])
    if x[1] is None:
        return result
    return build(aten.sub.Tensor, result, _along(build, dim, sine * twice)(x[1]))


def _along(build: Builder, dim: int, matrix: torch.Tensor) -> Callable[[Any], Any]:
    """A product with a matrix (length, results) along an axis, which is truncated or zero-padded to the length."""
    stored: dict[int, Any] = {}

    def times(x: Any) -> Any:
        size, last = build.value(x).shape[dim], build.value(x).dim() - 1
        rows = min(size, len(matrix))
        if size > rows:
            x = build(aten.slice.Tensor, x, dim, 0, rows)
        if dim != last:
            x = build(aten.transpose.int, x, dim, last)
        if rows not in stored:
            stored[rows] = build.constant(matrix[:rows].to(build.value(x).dtype).contiguous())
        y = build(aten.matmul.default, x, stored[rows])
        return y if dim == last else build(aten.transpose.int, y, dim, last)

    return times
