"""How well embeddings find what belongs to a query: recall, reciprocal rank, NDCG; and rows compared by cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from penjing.tasks.metrics.ranking import discounted_gain

Array = np.ndarray[Any, Any]


def cosine(a: Array, b: Array) -> Array:
    """Cosine of every row of `a` (n, width) with every row of `b` (m, width): (n, m) float64."""
    return np.asarray(_unit(a) @ _unit(b).T)


def ranks(similarity: Array, relevant: Sequence[Array]) -> list[Array]:
    """Places, from 0, of each query's relevant documents among all, the most similar first; equal ones take turns last.

    Args:
        similarity: (queries, documents).
        relevant: Indices of the documents that belong to each query.
    """
    places = []
    for row, right in zip(similarity, relevant, strict=True):
        # Of equals the worst place, so that ties don't pay; what can't be compared is the least similar.
        row = np.where(np.isnan(row), -np.inf, row)
        places.append(np.sort((row[None] >= row[right][:, None]).sum(axis=1) - 1))
    return places


def recall_at(places: Sequence[Array], k: int) -> float:
    """Mean share of a query's relevant documents that are among the first `k`."""
    return float(np.mean([(place < k).mean() for place in places]))


def reciprocal_rank(places: Sequence[Array]) -> float:
    """Mean of 1 / place of the first relevant document, counted from 1."""
    return float(np.mean([1 / (place[0] + 1) for place in places]))


def ndcg_at(places: Sequence[Array], k: int) -> float:
    """Normalized discounted cumulative gain of the first `k` documents, with gains of 0 and 1."""
    return float(np.mean([discounted_gain(place, k) for place in places]))


def _unit(rows: Array) -> Array:
    rows = np.asarray(rows, np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))
