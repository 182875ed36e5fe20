"""Where the samples of a call lie: what cuts, repeats and joins them asks here."""

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze.samples import part
from penjing.pipeline.evidence import one_call
from penjing.pipeline.verify import verify
from penjing.tasks.sample_axes import along_samples

STATES = {0: {0: "n"}, 1: {1: "n"}, 2: {1: "n"}}


def axes_of(call, dynamic):
    """The axis that is changed of every tensor, None of one that stays."""
    changed = {}

    def change(value, axis):
        changed[id(value)] = axis
        return value

    along_samples(call, dynamic, change)
    return [changed.get(id(value)) for value in [*call[0], *call[1].values()]]


def tensors(*shapes):
    return tuple(torch.zeros(shape) for shape in shapes), {}


@pytest.mark.parametrize(
    ("call", "dynamic", "axes"),
    [
        (tensors((4, 3, 8, 8), (4,)), None, [0, 0]),
        (tensors((4, 5, 8), (2, 4, 8), (4, 4, 8)), None, [0, 1, 0]),  # nothing tells the last one's apart
        (tensors((2, 5, 8), (2, 2, 8), (2, 2, 8)), STATES, [0, 1, 1]),
        (tensors((2, 4, 8), (4, 5, 8), (2, 4, 8)), {0: {1: "n"}, 1: {0: "n"}, 2: {1: "n"}}, [1, 0, 1]),  # states first
        (tensors((1, 5, 8), (1, 1, 8), (3, 1, 8)), STATES, [0, 1, 1]),
        (tensors((4, 3), (4, 7)), {0: {0: "n"}}, [0, None]),  # a table that is as long as the batch
        (tensors((4, 3), (4, 7)), {0: {0: "n"}, 1: {0: "m"}}, [0, 0]),
        (tensors((4, 3), ()), None, [0, None]),
        (((), {"x": torch.zeros(2, 5), "h": torch.zeros(2, 2, 5)}), {"x": {0: "n"}, "h": {1: "n"}}, [0, 1]),
        ((tensors((2, 5))[0], {"h": torch.zeros(2, 2, 5)}), {0: {0: "n"}, 1: {1: "n"}}, [0, 1]),
        (tensors((4, 5), (2, 4, 5)), {"x": {0: "n"}, "h": {1: "n"}}, [0, 1]),  # by names that are not known here
    ],
)
def test_the_axis_of_the_samples(call, dynamic, axes):
    assert axes_of(call, dynamic) == axes


def test_samples_of_states_are_cut_and_repeated_with_their_inputs():
    rows = torch.arange(3.0)
    call = (rows[:, None, None].expand(3, 5, 4), rows[None, :, None].expand(3, 3, 4)), {}
    (x, state), _ = part(call, 1, 9, STATES)
    assert x.shape == (2, 5, 4) and state.shape == (3, 2, 4) and state[0, :, 0].tolist() == [1, 2]
    task = pj.Task(example=call[0], dynamic={0: {0: "n"}, 1: {1: "n"}})
    (x, state), _ = one_call(task, 5)
    assert x[:, 0, 0].tolist() == state[2, :, 0].tolist() == [0, 1, 2, 0, 1]


class Stream(nn.Module):
    """What a listener runs again and again: a state goes in and comes out."""

    def __init__(self, layers):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, layers, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, h, c):
        y, (h, c) = self.lstm(x, (h, c))
        return self.head(y[:, -1]), h, c


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_network_with_states_is_compressed_and_verified(tmp_path, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = Stream(2).eval()
    data = [
        (torch.randn(batch, 4, 8), torch.randn(2, batch, 8), torch.randn(2, batch, 8)) for _ in range(-(-12 // batch))
    ]
    task = pj.Task(example=data[0], calibration=data, dynamic=STATES)
    result = pj.run(
        pj.Recipe(pj.quantize.Static()), network, task, runtime="onnxruntime", out=tmp_path / "run", seconds=0.05,
        threads=1,
    )  # fmt: skip
    assert all(check.holds is not False for check in verify(result.folder, task, seconds=0.05, threads=1))
    (file,) = result.artifact.glob("*.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = torch.randn(3, 4, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = network(*inputs)
    names = [port.name for port in session.get_inputs()]
    outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    for output, reference in zip(outputs, expected, strict=True):
        assert np.abs(output - reference.numpy()).max() < 0.1 * reference.abs().max()
