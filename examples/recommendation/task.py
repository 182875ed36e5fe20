"""Which film a user watches next: MovieLens-100K, leave-one-out, as in "Neural Collaborative Filtering" (WWW 2017).

The last film of every user is hidden and has to be among the ten best of itself and 99 that the user never watched;
the last but one is for selection.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples import data
from examples.recommendation.network import FILMS, USERS

OTHERS = 99  # films never watched, beside the hidden one
NEGATIVES = 4  # films drawn at random for each that was watched, in training


class Batches:
    """Train batches ({"user", "film"}, watched or not), with other films drawn at random on every pass."""

    def __init__(self, users: np.ndarray, films: np.ndarray, batch: int = 1024) -> None:
        self.users, self.films, self.batch = torch.from_numpy(users), torch.from_numpy(films), batch

    def __len__(self) -> int:
        return -(-len(self.users) * (1 + NEGATIVES) // self.batch)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        users = self.users.repeat(1 + NEGATIVES)
        drawn = torch.randint(FILMS, (len(self.users) * NEGATIVES,))
        films = torch.cat([self.films, drawn])
        watched = torch.cat([torch.ones(len(self.users)), torch.zeros(len(drawn))])
        for index in torch.randperm(len(users)).split(self.batch):
            yield {"user": users[index], "film": films[index]}, watched[index]


def candidates(hidden: np.ndarray, watched: np.ndarray, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each user's hidden film and 99 others: inputs (users · 100,), and relevance."""
    random = np.random.default_rng(seed)
    films = np.stack(
        [
            np.r_[film, random.choice(np.flatnonzero(~watched[user]), OTHERS, replace=False)]
            for user, film in enumerate(hidden)
        ]
    )
    users = np.repeat(np.arange(USERS), OTHERS + 1)
    relevant = np.tile(np.arange(OTHERS + 1) == 0, USERS).astype(np.int64)
    return {"user": users, "film": films.reshape(-1)}, relevant


def in_order() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratings by user, then by time (100000, 4); each user's last row (943,); who watched what (943, 1682)."""
    rows = data.movielens()
    rows = rows[np.lexsort((rows[:, 1], rows[:, 3], rows[:, 0]))]
    watched = np.zeros((USERS, FILMS), bool)
    watched[rows[:, 0], rows[:, 1]] = True
    return rows, np.flatnonzero(np.r_[rows[1:, 0] != rows[:-1, 0], True]), watched


def task() -> pj.Task:
    """Create the task, whose metric is NDCG@10 over the users."""
    rows, last, watched = in_order()
    rest = np.setdiff1d(np.arange(len(rows)), np.r_[last, last - 1])
    test, select = (candidates(rows[hidden, 1], watched, seed) for seed, hidden in enumerate((last, last - 1)))
    groups = test[0]["user"]
    random = np.random.default_rng(0)
    return pj.tasks.ranking(
        test,
        metric="ndcg@10",
        groups=groups,
        select=select,
        select_groups=groups,
        train=Batches(rows[rest, 0], rows[rest, 1]),
        # Any film for any user, as the network will be asked: those that were watched have higher scores than most.
        calibration={"user": random.integers(USERS, size=4096), "film": random.integers(FILMS, size=4096)},
        name="movielens-100k",
    )
