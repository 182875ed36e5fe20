"""Token classification: entities found whole, counted as CoNLL does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.tasks.fields.classification import cross_entropy
from penjing.tasks.fields.field_task import Batches, Data, field_task
from penjing.tasks.fields.labelled import Metric, Predict, answer, called, integer_targets, pairs
from penjing.tasks.keywords import suggesting
from penjing.tasks.metrics.tagging import entity_f1
from penjing.tasks.task import Task

IGNORED = -100  # the tag of a token that doesn't count, as in transformers and in torch's cross entropy


@suggesting
def tagging(
    test: Any,
    *,
    tags: Sequence[str],
    output: Any = None,
    train: Any = None,
    select: Any = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 32,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "tagging",
) -> Task:
    """Create a token-classification task, whose metric is F1 over entities: right only with kind and both ends.

    Args:
        test: (inputs, tags of the tokens), or batches of them. Tags (N, length) are numbers into `tags`; -100 marks
            tokens that don't count: padding, and all but the first piece of a word.
        tags: Names in the order of the network's scores: "O", "B-PER", "I-PER" and so on.
        output: The scores (N, length, tags): None is the first output, otherwise a name or number, or a function.
        train: As `test`; for fine-tuning.
        select: As `test`.
        calibration: Inputs alone; None takes those of `train`.
        loss: ``loss(output, target)``; None is cross entropy on the first output, without the tokens marked -100.
        batch: Samples of a batch where data is given whole.
        dynamic: See `Task.dynamic`.
        name: Name of the task in tables.

    Raises:
        TaskError: Tags are not of this form, or while evaluating, scores are not.
    """
    strange = [tag for tag in tags if tag != "O" and (tag[1:2] != "-" or tag[0] not in "BIESLU")]
    if strange or len(tags) < 2:
        raise TaskError(
            "the tags are not those of entities",
            code="tags",
            got=", ".join(map(repr, strange or tags)),
            expected='"O" for no entity, "B-KIND" for a first token, "I-KIND" for a later one',
            remedy="for tags that stand alone, such as parts of speech, write a Task with an accuracy of your own",
        )

    def metric(batches: Batches, what: str) -> Metric:
        def evaluate(predict: Predict) -> float:
            guesses: list[list[str]] = []
            rights: list[list[str]] = []
            for inputs, targets in pairs(batches, what):
                truth = _checked(targets, len(tags), what)
                scores = answer(called(predict, inputs), output, what="entity F1")
                if scores.shape != (*truth.shape, len(tags)):
                    raise TaskError(
                        "entity F1 needs a score per token and tag",
                        code="scores",
                        got=f"scores of shape {scores.shape}",
                        expected=f"{(*truth.shape, len(tags))}: samples, tokens, tags",
                        remedy="name the output: tagging(..., output='logits'), or give a function",
                    )
                for guess, right in zip(scores.argmax(axis=-1), truth, strict=True):
                    counts = right != IGNORED
                    guesses.append([tags[tag] for tag in guess[counts]])
                    rights.append([tags[tag] for tag in right[counts]])
            return entity_f1(guesses, rights)

        return evaluate

    data = Data(test=test, train=train, select=select, calibration=calibration, batch=batch, dynamic=dynamic, name=name)
    return field_task(data, metric, metric_name="entity F1", loss=loss or cross_entropy)


def _checked(targets: Any, tags: int, what: str) -> np.ndarray[Any, Any]:
    truth = integer_targets(targets, what=what)
    valid = truth[truth != IGNORED]
    if truth.ndim != 2 or (valid.size and not 0 <= valid.min() <= valid.max() < tags):
        raise TaskError(
            f"the tags of {what} are not numbers into `tags`",
            code="targets",
            got=f"shape {truth.shape}" + (f", from {valid.min()} to {valid.max()}" if valid.size else ""),
            expected=f"(samples, length), from 0 to {tags - 1}, or {IGNORED} for a token that doesn't count",
        )
    return truth
