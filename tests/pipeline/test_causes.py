"""What is told of integers that are as planned and lost much."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing import measure
from penjing.network.capture import capture_network
from penjing.pipeline.causes import doubts, hidden_samples
from penjing.quantize import Static
from penjing.records import Parity
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task


class OneHugeChannel(nn.Module):
    """The layer `wide` makes a channel that sets the range of the others, and `reads` does not even look at it."""

    def __init__(self, factor):
        super().__init__()
        self.wide, self.reads, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.wide.weight[0] *= factor
            self.reads.weight[:, 0] = 0

    def forward(self, x):
        return self.last(torch.relu(self.reads(self.wide(x))))


def draft_and_parities(factor):
    torch.manual_seed(0)
    data = torch.randn(32, 16)
    task = Task(example=data[:2], calibration=[data])
    network = OneHugeChannel(factor).eval()
    draft = Static()(Draft(capture_network(network, (data[:2],))), Context(task=task, capabilities=GENERIC))
    with torch.no_grad():
        source, planned = network(data).numpy(), insert(draft.network, draft.plan)(data).numpy()
    rows = measure.limits.told(measure.differences([source], [planned], measure.split([source]), 32), ["scores"])
    parity = measure.parity([[source]], [[planned]], "source")
    return draft, task, Parity(**{**vars(parity), "rows": rows})


def test_the_operators_that_bring_the_noise_and_the_remedy_are_named():
    draft, task, parity = draft_and_parities(3e3)
    assert parity.snr_db < 15
    (text,) = doubts("onnxruntime-int8", "int8", (parity,), draft, task)
    assert text.startswith(f"onnxruntime-int8 keeps {parity.snr_db:.1f} dB of the source network's values in scores")
    assert "most comes from reads (" in text and "quantize.Static(exclude=['reads'" in text


def test_a_fine_artifact_draws_no_warning_and_floating_point_none_at_all():
    draft, task, parity = draft_and_parities(1.0)
    assert parity.snr_db > 20
    assert doubts("onnxruntime-int8", "int8", (parity,), draft, task) == ()
    assert doubts("onnxruntime-fp32", "fp32", (parity,), Draft(draft.network), task) == ()


def test_what_earlier_steps_changed_is_not_blamed_on_integers():
    draft, task, fine = draft_and_parities(1.0)
    _, _, far = draft_and_parities(3e3)
    (text,) = doubts("onnxruntime-int8", "int8", (far,), draft, task)
    assert "little of it is of the integers" in text and fine.snr_db > far.snr_db


def test_integers_are_blamed_where_small_columns_are_lost_beside_large_ones():
    torch.manual_seed(0)
    data = torch.randn(32, 16)
    task = Task(example=data[:2], calibration=[data])
    mixed, joined = nn.Linear(16, 8), nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        mixed.weight[:4] *= 1e4
        joined.weight.copy_(torch.eye(8))  # reads large and small values by one grid
    network = nn.Sequential(mixed, joined).eval()
    draft = Static()(Draft(capture_network(network, (data[:2],))), Context(task=task, capabilities=GENERIC))
    with torch.no_grad():
        source, planned = network(data).numpy(), insert(draft.network, draft.plan)(data).numpy()
    rows = measure.limits.told(measure.differences([source], [planned], measure.split([source]), 32), ["scores"])
    parity = Parity(**{**vars(measure.parity([[source]], [[planned]], "source")), "rows": rows})
    assert parity.snr_db > 25
    (text,) = doubts("onnxruntime-int8", "int8", (parity,), draft, task)
    assert "columns 4-7" in text and "small beside the other columns" in text
    assert "exclude=['0', '1']" in text and "little of it" not in text


def test_samples_that_one_outlier_hides_are_told():
    draw = np.random.default_rng(0)
    right = draw.normal(size=(8, 3, 4)).astype(np.float32)
    right[5] *= 1e4
    lost = right + draw.normal(size=right.shape).astype(np.float32) * 2
    (text,) = hidden_samples("small.onnx", [right], [lost])
    assert "sample 5" in text
    assert hidden_samples("small.onnx", [right], [right + 1e-3]) == ()
    even = np.delete(right, 5, axis=0)
    assert hidden_samples("small.onnx", [even], [even + 2]) == ()  # what the whole tells already


@pytest.mark.parametrize(("snr_db", "told"), [(35.0, True), (45.0, False)])
def test_an_artifact_near_its_limit_is_told(snr_db, told):
    draft, task, parity = draft_and_parities(1.0)
    (row,) = parity.rows
    rows = (type(row)(output="scores", snr_db=snr_db, largest=0.1, batch=32, limit_db=30),)
    near = Parity(**{**vars(parity), "against": "planned", "rows": rows})
    warnings = doubts("openvino-int8", "int8", (near,), draft, task)
    assert [("of what was planned in scores" in text) for text in warnings] == ([True] if told else [])
