"""Embeddings that find what belongs together: texts for a question, faces of a person, images for a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.tasks.fields.labelled import Predict, answer, called, labelled, pairs, sample_count
from penjing.tasks.keywords import suggesting
from penjing.tasks.metrics.retrieval import cosine, ndcg_at, ranks, recall_at, reciprocal_rank
from penjing.tasks.task import Task

Array = np.ndarray[Any, Any]


@suggesting
def retrieval(
    queries: Any,
    documents: Any,
    relevant: Sequence[Any] | Array,
    *,
    calibration: Any,
    metric: str = "recall@10",
    output: Any = None,
    train: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 32,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "retrieval",
) -> Task:
    """Create a retrieval task: queries and documents are embedded, and compared by the cosine.

    Args:
        queries: Inputs: an array, a dict or a tuple of arrays; or a list of batches.
        documents: As `queries`.
        relevant: For each query the numbers of the documents that belong to it, or (queries,) one number each.
        calibration: Inputs alone, batches or arrays, of neither queries nor documents.
        metric: "recall@k", the mean share of a query's documents that are among the k nearest; "mrr", the mean of 1 /
            place of the first; or "ndcg@k".
        output: The embeddings (N, width): None is the first output, otherwise a name or number, or a function of the
            outputs, such as a mean over tokens.
        train: (inputs, targets) for fine-tuning, with `loss`.
        loss: ``loss(output, target)``.
        batch: Samples of a batch where data is given whole.
        dynamic: See `Task.dynamic`; texts of several lengths need it.
        name: Name of the task in tables.

    Raises:
        TaskError: A query has no document, or a number that no document has.

    >>> rows = np.eye(3, dtype=np.float32)
    >>> retrieval(rows, rows, np.array([0, 1, 0]), calibration=[rows], metric="recall@1").evaluate(lambda x: x)
    0.6666666666666666
    """
    score = _score(metric)
    asked, stored = _batches(queries, batch, "queries"), _batches(documents, batch, "documents")
    right = [np.unique(np.atleast_1d(numbers)).astype(np.int64) for numbers in relevant]
    count, among = (sum(len(marks) for _, marks in data) for data in (asked, stored))
    strange = [i for i, numbers in enumerate(right) if not len(numbers) or numbers[0] < 0 or numbers[-1] >= among]
    if strange or len(right) != count:
        raise TaskError(
            "`relevant` does not fit queries and documents",
            code="lengths" if len(right) != count else "relevant",
            got=f"{len(right)} entries for {count} queries"
            if len(right) != count
            else f"{right[strange[0]].tolist()} for query {strange[0]}",
            expected=f"for each query, one or more numbers from 0 to {among - 1}",
        )

    def embed(predict: Predict, data: Iterable[tuple[Any, Any]], what: str) -> Array:
        parts = []
        for inputs, marks in pairs(data, what):
            rows = answer(called(predict, inputs), output, what=metric, infinite=False)
            if rows.ndim != 2 or len(rows) != len(marks):
                raise TaskError(
                    "retrieval needs one embedding a sample",
                    code="scores",
                    got=f"shape {rows.shape} for {len(marks)} {what}",
                    expected=f"({len(marks)}, width)",
                    remedy="give output=, a function from the outputs to the embeddings, such as a mean over tokens",
                )
            parts.append(rows)
        return np.concatenate(parts)

    def evaluate(predict: Predict) -> float:
        return score(ranks(cosine(embed(predict, asked, "queries"), embed(predict, stored, "documents")), right))

    given = calibration
    if isinstance(calibration, np.ndarray | Mapping | tuple):
        given = [inputs for inputs, _ in _batches(calibration, batch, "calibration")]
    return Task(
        example=next(iter(asked))[0],
        calibration=given,
        train=None if train is None else labelled(train, batch, what="train", shuffled=True),
        evaluate=evaluate,
        loss=loss,
        higher_is_better=True,
        metric_name=metric.replace("recall", "Recall").replace("ndcg", "NDCG").replace("mrr", "MRR"),
        dynamic=dynamic,
        name=name,
    )


def _score(metric: str) -> Callable[[list[Array]], float]:
    kind, _, depth = metric.partition("@")
    if metric == "mrr":
        return reciprocal_rank
    if kind in ("recall", "ndcg") and depth.isdecimal() and int(depth) > 0:
        count = recall_at if kind == "recall" else ndcg_at
        return lambda places: count(places, int(depth))
    raise TaskError(
        "the metric of a retrieval is not known",
        code="metric",
        got=repr(metric),
        expected='"mrr", or "recall@10" or "ndcg@10" with any number',
    )


def _batches(inputs: Any, batch: int, what: str) -> list[tuple[Any, Array]]:
    """Inputs as (inputs, marks) batches; the marks only count the samples."""
    if isinstance(inputs, list):
        return [(part, np.zeros(sample_count(part))) for part in inputs]
    return list(labelled((inputs, np.zeros(sample_count(inputs))), batch, what=what))
