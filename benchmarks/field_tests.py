"""More test data of the fields whose data is by construction, so that a difference can be told from noise.

Each function gives `evaluate(predict)` of one more test set, made as the example's own but with another seed. Stamps,
syllables and voices are still those that no training has seen.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import penjing as pj

Evaluate = Callable[[Any], float]
SETS = 3  # beside the example's own


def more(field: str) -> Iterator[Evaluate]:
    """Metrics on more test sets of a field; none where its data is what it is."""
    yield from SOURCES.get(field, tuple)()


def scenes() -> Iterator[Evaluate]:
    """600 other scenes of the test's stamps in each."""
    from examples import stamps

    first = stamps.SELECT_SCENES + stamps.TEST_SCENES
    every = stamps.scenes("test", first + SETS * stamps.TEST_SCENES)
    for start in range(first, len(every), stamps.TEST_SCENES):
        part = every.part(start, start + stamps.TEST_SCENES)
        yield pj.tasks.detection((stamps.normalise(part.images), part.boxes), boxes="cxcywh").evaluate


def sentences() -> Iterator[Evaluate]:
    """1,500 other sentences in each."""
    from examples.tagging import task

    for seed in range(3, 3 + SETS):
        yield pj.tasks.tagging(task.sentences(1500, seed, task.SYLLABLES), tags=task.TAGS, calibration=[]).evaluate


def words() -> Iterator[Evaluate]:
    """The same words, said by the same voices, in other noise."""
    from examples.keywords import task

    sounds, numbers = task.clips("test")
    for seed in range(4, 4 + SETS):
        heard = task.spectra(task.noisy(sounds, np.random.default_rng(seed)))
        yield pj.tasks.classification((heard, numbers)).evaluate


def films() -> Iterator[Evaluate]:
    """Each user's last film among 99 others."""
    from examples.recommendation import task

    rows, last, watched = task.in_order()
    for seed in range(2, 2 + SETS):
        test = task.candidates(rows[last, 1], watched, seed)
        yield pj.tasks.ranking(test, metric="ndcg@10", groups=test[0]["user"], batch=4096).evaluate


SOURCES = {"detection": scenes, "tagging": sentences, "keywords": words, "recommendation": films}
