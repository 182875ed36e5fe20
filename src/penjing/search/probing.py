"""How long a training step takes, before anything is trained."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import fx

from penjing.randomness import preserve_rng_state
from penjing.tasks.call import as_call
from penjing.tasks.outputs import flatten_outputs

USUAL_BATCHES = 200  # of data that does not tell its length
BESIDE = 2.0  # a teacher's forward and fake quantizers take about as long again


def epoch_seconds(network: fx.GraphModule, data: Iterable[Any], labels: bool, steps: int = 3) -> float:
    """Seconds of a pass over data that trains, from a few steps on a copy: forward and backward.

    Args:
        network: A captured network.
        data: Batches of (inputs, target), or calls.
        labels: Whether they are batches with targets.
        steps: That are timed, after a first one that is not.
    """
    learner = copy.deepcopy(network)
    seconds = []
    with preserve_rng_state(), torch.enable_grad():
        for batch in itertools.islice(data, steps + 1):
            args, kwargs = as_call(batch[0]) if labels else batch
            start = time.perf_counter()
            outputs = flatten_outputs(learner(*args, **kwargs))[0]
            sum(o.float().square().mean() for o in outputs if o.is_floating_point()).backward()
            seconds.append(time.perf_counter() - start)
    each = min(seconds[1:] or seconds, default=0.0)
    batches = len(data) if isinstance(data, Sized) else USUAL_BATCHES
    return BESIDE * batches * each
