"""Codebooks whose entries are vectors, and sums of entries of several codebooks; pure maths on tensors.

Vectors: Gong et al., "Compressing Deep Convolutional Networks using Vector Quantization", 2014; residuals: Chen et al.,
"Approximate Nearest Neighbor Search by Residual Vector Quantization", Sensors 2010; the start: Arthur & Vassilvitskii,
"k-means++", SODA 2007. Every coordinate of every vector has a weight of its own.
"""

from __future__ import annotations

import torch

ITERATIONS = 20
SWEEPS = 4  # over the levels of a residual codebook
_AT_ONCE = 1 << 22  # distances that are held at once


def residual_kmeans(
    vectors: torch.Tensor, weights: torch.Tensor, entries: int, levels: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and indices that minimize Σ w·(v − Σ of one entry of each level)².

    Args:
        vectors: (n, dimension), finite.
        weights: (n, dimension), above 0.
        entries: Of each level; there are at least as many vectors.
        levels: How many entries are added up.
        generator: Draws the start.

    Returns:
        (levels, entries, dimension), and (levels, n), int64.
    """
    books, indices = [], []
    left = vectors.clone()
    for _ in range(levels):
        book = vector_kmeans(left, weights, entries, generator)
        books.append(book)
        indices.append(nearest_vectors(left, weights, book))
        left = left - book[indices[-1]]
    for _ in range(SWEEPS if levels > 1 else 0):
        for level in range(levels):
            left = left + books[level][indices[level]]
            indices[level] = nearest_vectors(left, weights, books[level])
            books[level] = _means(left, weights, indices[level], books[level])
            left = left - books[level][indices[level]]
    return torch.stack(books), torch.stack(indices)


def vector_kmeans(
    vectors: torch.Tensor, weights: torch.Tensor, entries: int, generator: torch.Generator
) -> torch.Tensor:
    """The entries (entries, dimension) of Lloyd's algorithm from a k-means++ start; see `residual_kmeans`."""
    book = _start(vectors, weights, entries, generator)
    for _ in range(ITERATIONS):
        index = nearest_vectors(vectors, weights, book)
        means = _means(vectors, weights, index, book)
        empty = (torch.bincount(index, minlength=entries) == 0).nonzero().reshape(-1)
        if len(empty):
            errors = (weights * (vectors - means[index]).square()).sum(1)
            means[empty] = vectors[errors.topk(len(empty)).indices]
        elif torch.equal(means, book):
            break
        book = means
    return book


def nearest_vectors(vectors: torch.Tensor, weights: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The index of the entry with the smallest Σ w·(v − entry)² for every vector, (n,), int64."""
    places = []
    rows = max(1, _AT_ONCE // len(book))
    for v, w in zip(torch.split(vectors, rows), torch.split(weights, rows), strict=True):
        places.append((w @ book.square().T - 2 * (w * v) @ book.T).argmin(1))
    return torch.cat(places)


def _means(vectors: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros_like(book).index_add_(0, index, weights * vectors)
    total = torch.zeros_like(book).index_add_(0, index, weights)
    return torch.where(total > 0, sums / total.clamp(min=1e-30), book)


def _start(vectors: torch.Tensor, weights: torch.Tensor, entries: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors drawn with a probability that is proportional to their error so far, from a sample of them."""
    most = 64 * entries
    if len(vectors) > most:
        sample = torch.randperm(len(vectors), generator=generator)[:most]
        vectors, weights = vectors[sample], weights[sample]
    drawn = [int(torch.randint(len(vectors), (1,), generator=generator))]
    errors = torch.full((len(vectors),), torch.inf)
    for _ in range(entries - 1):
        errors = torch.minimum(errors, (weights * (vectors - vectors[drawn[-1]]).square()).sum(1))
        chances = errors if bool(errors.any()) else torch.ones_like(errors)
        drawn.append(int(torch.multinomial(chances.double(), 1, generator=generator)))
    return vectors[drawn].clone()


__all__ = ["nearest_vectors", "residual_kmeans", "vector_kmeans"]
