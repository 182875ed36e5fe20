"""How well scores put what is relevant first: AUC over all rows; hit rate and NDCG within groups, such as a user's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, Any]


def auc(scores: Array, relevant: Array) -> float:
    """Area under the receiver operating characteristic: the chance that a relevant row has the larger score.

    Args:
        scores: (n,).
        relevant: (n,) 0 or 1; both occur.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    positive = relevant.astype(bool)
    count = int(positive.sum())
    order = rankdata(scores)  # of equal scores the mean rank
    return float((order[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def hit_rate(scores: Array, relevant: Array, groups: Array, k: int) -> float:
    """Share of the groups that have a relevant row among their `k` best (HR@k)."""
    return float(np.mean([(places < k).any() for places in _places(scores, relevant, groups)]))


def ndcg(scores: Array, relevant: Array, groups: Array, k: int) -> float:
    """Mean normalized discounted cumulative gain of the `k` best rows of each group, with gains of 0 and 1."""
    return float(np.mean([discounted_gain(places, k) for places in _places(scores, relevant, groups)]))


def discounted_gain(places: Array, k: int) -> float:
    """NDCG@k of one list whose relevant entries lie at these places, from 0."""
    gain = (1 / np.log2(places[places < k] + 2)).sum()
    best = (1 / np.log2(np.arange(min(k, len(places))) + 2)).sum()
    return float(gain / best)


def _places(scores: Array, relevant: Array, groups: Array) -> Iterator[Array]:
    """Places, from 0, of the relevant rows of each group that has any; of equal scores the relevant one is last."""
    order = np.lexsort((relevant, -scores, groups))
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
    for rows in np.split(order, starts[1:]):
        places = np.flatnonzero(relevant[rows])
        if len(places):
            yield places
