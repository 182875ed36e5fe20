"""Double precision at the door, and what is not float32 within a network."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import SourceError
from penjing.network.capture import capture_network
from penjing.network.single_precision import single_module
from penjing.sources.source import Source, in_single_precision
from penjing.tasks.single_precision import single_task
from penjing.tasks.task import Task, calibration_calls
from tests.raises import raises_case


def layers(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_and_the_remedy_is_right(dtype):
    model = layers(dtype)
    with raises_case(SourceError, "half") as error:
        single_module(model)
    assert "0.weight" in error.value.got
    assert single_module(model.float()) == (model, None)


def test_double_precision_is_computed_in_float32():
    model = layers(torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    task = Task(
        example=np.zeros((2, 8)),
        calibration=[x],
        train=[(x, torch.zeros(5, 4, dtype=torch.float64))],
        evaluate=lambda predict: float(predict(x.numpy()).dtype == np.float32),
    )
    source, single, note = in_single_precision(Source(name="net", module=model), task)
    assert "float64" in note and "float32" in note
    assert {t.dtype for t in source.module.parameters()} == {torch.float32}
    assert {t.dtype for t in model.parameters()} == {torch.float64}  # the user's own stays
    (call,) = calibration_calls(single)
    assert torch.allclose(source.module(*call[0]).double(), model(x), atol=1e-5)
    assert [t.dtype for pair in single.train for t in pair] == [torch.float32] * 2
    assert single.evaluate(lambda array: array) == 1.0  # the metric's own arrays come as float32


def test_float32_is_left_alone():
    model, task = layers(torch.float32), Task(example=torch.zeros(1, 8))
    assert single_module(model) == (model, None)
    assert single_task(task) is task


class Doubles(nn.Module):
    """In float32 outside, with double precision within: a buffer, a cast, a constant of its own, a mask."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("shift", torch.rand(8, dtype=torch.float64))

    def forward(self, x):
        y = self.layer(x).double() + self.shift + torch.arange(8, dtype=torch.float64)
        smallest = torch.finfo(torch.float64).min
        return y.cumsum(1), (y.masked_fill(y > 3, smallest).softmax(-1)).half()


def test_what_is_not_float32_within_a_network_becomes_so():
    model = Doubles().eval()
    network = capture_network(model, (torch.zeros(2, 8),))
    x = torch.randn(5, 8)
    for mine, theirs in zip(network(x), model(x), strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-3)
    assert network.get_buffer("shift").dtype == torch.float32
