"""The task's metric of one network, with the errors of a user's function explained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from penjing.errors import PenjingError, TaskError
from penjing.tasks.usercode import line_of
from penjing.tasks.witness import Witness


def metric_of(metric: Callable[[Any], float], predict: Callable[..., Any], name: str) -> float:
    """The task's metric on one network.

    Args:
        metric: The task's `evaluate` or `select`.
        predict: The network, NumPy in, NumPy out.
        name: What is evaluated, for errors.

    Raises:
        TaskError: It raised (names the line), never called `predict`, or returned what is not a finite number.
    """
    witness = predict if isinstance(predict, Witness) else Witness(predict)
    try:
        value = metric(witness)
    except PenjingError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"the task's metric raised {type(error).__name__} on {name}",
            code="raised",
            got=f"{error} ({line_of(error)})",
            expected="evaluate(predict) -> float, where predict maps NumPy inputs to NumPy outputs",
            remedy="call predict as the network is called, with a dict of inputs as predict(**inputs); "
            "try it on one of your own: evaluate(lambda x: network(torch.from_numpy(x)).numpy())",
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TaskError(
            f"the task's metric of {name} is not a finite number",
            code="not-finite",
            got=repr(value),
            expected="evaluate(predict) -> float",
            remedy="return one number from evaluate",
        )
    if not witness.calls:
        raise TaskError(
            f"the task's metric never called predict on {name}",
            code="unread",
            got=f"{value!r}, whatever the network",
            expected="evaluate(predict) -> float, which judges what predict answers",
            remedy="call predict in evaluate, in place of a network or an answer of your own",
        )
    return number
