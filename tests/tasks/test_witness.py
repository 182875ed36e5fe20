import numpy as np
import torch

from penjing.tasks.witness import Witness

DATA = np.arange(60, dtype=np.float32).reshape(12, 5)
LABELS = np.arange(12)


def shown(*calls, named=()):
    witness = Witness(lambda *args, **kwargs: args or kwargs)
    for call in calls:
        witness(*call)
    for call in named:
        witness(**call)
    return witness


def test_order_and_batches_make_no_difference():
    order = np.random.default_rng(0).permutation(12)
    whole = shown((DATA, LABELS))
    assert (whole.calls, whole.samples) == (1, 12)
    parts = [(DATA[order][i : i + 5], LABELS[order][i : i + 5]) for i in (0, 5, 10)]
    assert shown(*parts).shown == whole.shown
    assert shown(*parts).calls == 3
    assert shown((torch.from_numpy(DATA), torch.from_numpy(LABELS))).shown == whole.shown


def test_other_samples_do():
    whole = shown((DATA, LABELS)).shown
    others = [
        shown((DATA[:-1], LABELS[:-1])),
        shown((DATA, LABELS), (DATA[:1], LABELS[:1])),
        shown((DATA + 1, LABELS)),
        shown((DATA.astype(np.float64), LABELS)),
        shown((DATA[::-1], LABELS)),  # the parts of a sample belong together
        shown((np.concatenate([DATA[:-1], DATA[:1]]), np.concatenate([LABELS[:-1], LABELS[:1]]))),  # one twice
        shown((LABELS, DATA)),
        shown(named=[{"x": DATA, "y": LABELS}]),
    ]
    assert whole not in {other.shown for other in others} and len({other.shown for other in others}) == len(others)


def test_what_has_no_rows_is_taken_whole():
    one = shown((DATA, np.float32(3.0)))
    assert one.samples == 12 and one.shown != shown((DATA, np.float32(4.0))).shown
    assert shown((DATA, LABELS[:3])).samples == 1
    assert shown((DATA, 3)).shown != shown((DATA, 4)).shown
