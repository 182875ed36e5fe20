"""Tables and recommendation: how well one score a row puts what is relevant first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from penjing.errors import TaskError
from penjing.tasks.fields.field_task import Batches, Data, field_task
from penjing.tasks.fields.labelled import Metric, Predict, answer, called, pairs
from penjing.tasks.keywords import suggesting
from penjing.tasks.metrics.ranking import auc, hit_rate, ndcg
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task

Array = np.ndarray[Any, Any]

_GROUPED = {"hr": ("HR", hit_rate), "ndcg": ("NDCG", ndcg)}


@suggesting
def ranking(
    test: Any,
    *,
    metric: str = "auc",
    groups: Any = None,
    select_groups: Any = None,
    output: Any = None,
    train: Any = None,
    select: Any = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 1024,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "ranking",
) -> Task:
    """Create a task of scores that put relevant rows first: clicks, purchases, a table with two outcomes.

    Args:
        test: (inputs, relevance), or batches of them. Relevance (N,) is 1 for a row that is relevant, otherwise 0.
        metric: "auc", the chance that a relevant row has the larger score; or within groups, "hr@10", the share of
            the groups with a relevant row among their ten best, and "ndcg@10".
        groups: (all N,) which rows of `test` belong together, such as a user's; for "hr@k" and "ndcg@k".
        select_groups: As `groups`, for `select`.
        output: The scores (N,) or (N, 1), the larger the more relevant: None is the first output, otherwise a name or
            number, or a function of the outputs. Scores (N, 2) are those of irrelevant and relevant.
        train: As `test`; for fine-tuning.
        select: As `test`.
        calibration: Inputs alone; None takes those of `train`.
        loss: ``loss(output, target)``; None is binary cross entropy with the first output as logits.
        batch: Rows of a batch where data is given whole.
        dynamic: See `Task.dynamic`.
        name: Name of the task in tables.

    Raises:
        TaskError: Relevance is not 0 and 1, groups are missing or of another length, scores are not one a row.

    >>> scores, relevance = np.array([[0.9], [0.8], [0.1]], np.float32), np.array([0, 1, 1])
    >>> ranking((scores, relevance), metric="hr@1", groups=np.array([7, 7, 8])).evaluate(lambda x: x)
    0.5
    """
    kind, _, depth = metric.lower().partition("@")
    if not (metric.lower() == "auc" or (kind in _GROUPED and depth.isdecimal() and int(depth) > 0)):
        raise TaskError(
            "the metric of a ranking is not known",
            code="metric",
            got=repr(metric),
            expected='"auc", or "hr@10" or "ndcg@10" with any number',
        )
    belonging = {"test": groups, "select": select_groups}

    def counted(batches: Batches, what: str) -> Metric:
        relevance = _relevance([targets for _, targets in pairs(batches, what)], what)
        members = None if kind == "auc" else _groups(belonging[what], len(relevance), metric, what)

        def evaluate(predict: Predict) -> float:
            rows = [
                _scores(answer(called(predict, inputs), output, what=metric, infinite=False), len(targets))
                for inputs, targets in pairs(batches, what)
            ]
            scores = np.concatenate(rows)
            if members is None:
                return auc(scores, relevance)
            return _GROUPED[kind][1](scores, relevance, members, int(depth))

        return evaluate

    data = Data(test=test, train=train, select=select, calibration=calibration, batch=batch, dynamic=dynamic, name=name)
    shown = "AUC" if kind == "auc" else f"{_GROUPED[kind][0]}@{depth}"
    return field_task(data, counted, metric_name=shown, loss=loss or _binary, calibration_samples=4096)


def _relevance(parts: list[Any], what: str) -> Array:
    relevance = np.concatenate([np.asarray(part).reshape(len(part), -1) for part in parts])
    values = set(np.unique(relevance).tolist())
    if relevance.shape[1] != 1 or values != {0, 1}:
        raise TaskError(
            f"the targets of {what} are not relevance",
            code="targets",
            got=f"shape {relevance.shape}, values {', '.join(map(str, sorted(values)[:6]))}",
            expected="0 and 1, one a row, both of which occur",
            remedy="ratings: write (ratings >= 4).astype(int)",
        )
    return relevance[:, 0].astype(np.int64)


def _groups(groups: Any, rows: int, metric: str, what: str) -> Array:
    members = None if groups is None else np.asarray(groups)
    if members is None or members.shape != (rows,):
        word = "groups" if what == "test" else f"{what}_groups"
        raise TaskError(
            f"{metric} is counted within groups, and {word} does not tell them",
            code="groups",
            got="None" if members is None else f"shape {members.shape}",
            expected=f"({rows},), one group a row",
            remedy=f"write {word}=users, the user of every row",
        )
    return np.unique(members, return_inverse=True)[1]


def _scores(scores: Array, rows: int) -> Array:
    if scores.shape == (rows, 2):
        return scores[:, 1].astype(np.float64) - scores[:, 0]
    if scores.size != rows or not len(scores) == rows:
        raise TaskError(
            "a ranking needs one score a row",
            code="scores",
            got=f"shape {scores.shape} for {rows} rows",
            expected=f"({rows},) or ({rows}, 1)",
            remedy="give output=, a function from the outputs to the scores",
        )
    return scores.reshape(rows).astype(np.float64)


def _binary(output: Any, target: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = first_output(output)
    if scores.dim() == 2 and scores.shape[1] == 2:
        return torch.nn.functional.cross_entropy(scores, target.long().flatten())
    return torch.nn.functional.binary_cross_entropy_with_logits(scores.flatten(), target.to(scores.dtype).flatten())
