"""Pooling of every setting gives what torch gives, in floating point and in integers, in both runtimes."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.errors import ExportError
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.onnx_files import pooling as onnx_pooling
from penjing.onnx_files.pooling import overhang
from penjing.pipeline.building import build
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

SIZES = {1: (9,), 2: (9, 10), 3: (5, 7, 6)}


def settings(rank, count):
    """Pools as calls: the combinations that torch takes and that leave at least one window."""
    draw = random.Random(rank)
    calls = []
    while len(calls) < count:
        kernel = [draw.randint(1, 4) for _ in range(rank)]
        common = {
            "kernel_size": kernel,
            "stride": [draw.randint(1, 4) for _ in range(rank)],
            "padding": [draw.randint(0, k // 2) for k in kernel],
            "ceil_mode": draw.random() < 0.75,
        }
        if draw.random() < 0.3:
            common["dilation"], name = [draw.randint(1, 2) for _ in range(rank)], f"max_pool{rank}d"
        else:
            common["count_include_pad"], name = draw.random() < 0.5, f"avg_pool{rank}d"
            if rank > 1:
                common["divisor_override"] = draw.choice([None, None, 1, 7])
        try:
            if getattr(F, name)(torch.zeros(1, 1, *SIZES[rank]), **common).numel():
                calls.append((name, common))
        except RuntimeError:
            continue
    return calls


class Pools(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        return tuple(getattr(F, name)(x, **given) for name, given in self.calls)


def signal_to_noise(given, answered):
    given, answered = (np.asarray(a, np.float64) for a in (given, answered))
    assert given.shape == answered.shape
    noise = ((given - answered) ** 2).mean()
    return np.inf if noise == 0 else 10 * np.log10((given**2).mean() / noise)


def answers(network, call, runtime, precision, folder, inputs, step=None):
    """What the artifact answers, and what its plan answers in torch."""
    captured = capture_network(network.eval(), call)
    draft = Draft(captured)
    if step is not None:
        spec = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
        task = Task(example=call, calibration=[torch.randn(16, *call[0].shape[1:])])
        draft = step(draft, Context(task=task, capabilities=spec))
    _, structure = flatten_outputs(network(*call))
    folder.mkdir()
    build(draft, runtime, precision, Task(example=call), structure, folder)
    session = isolated.open_artifact(folder, 1)
    planned = insert(draft.network, draft.plan) if draft.plan else draft.network
    return [(session.run([x.numpy()]), flatten_outputs(planned(x))[0]) for x in inputs]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_setting_gives_what_torch_gives(rank, runtime, tmp_path):
    calls = settings(rank, 24)
    assert any(given.get("divisor_override") for _, given in calls) == (rank > 1)
    call = (torch.randn(2, 3, *SIZES[rank]),)
    inputs = [torch.randn(batch, 3, *SIZES[rank]) for batch in (5, 1)]
    for answered, planned in answers(Pools(calls), call, runtime, "fp32", tmp_path / "a", inputs):
        for made_by, given, expected in zip(calls, answered, planned, strict=True):
            assert signal_to_noise(expected, given) > 100, made_by


class Between(nn.Module):
    """A pooling between convolutions, as integers see it."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.pool, self.b = nn.Conv2d(3, 8, 3, padding=1), pool, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.b(self.pool(F.relu(self.a(x))))


INTEGERS = {
    "rounded up without padding": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "rounded up, padding counted": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "rounded up, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "a divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=1),
    "a divisor and a border": lambda x: F.avg_pool2d(x - 0.5, 3, 2, 1, count_include_pad=False, divisor_override=5),
    "a divisor, rounded up": lambda x: F.avg_pool2d(x - 0.5, 2, 2, ceil_mode=True, divisor_override=3),
    "below zero, the border counts": lambda x: F.avg_pool2d(x - 0.5, 3, 2, 1, ceil_mode=True),
    "below zero, it does not": lambda x: F.avg_pool2d(x - 0.5, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "dilated, rounded up": lambda x: F.max_pool2d(x - 0.5, (2, 3), (3, 2), (1, 0), (2, 1), ceil_mode=True),
    "a norm of a window": lambda x: F.lp_pool2d(x, 2, 3, 2, ceil_mode=True),
    "the largest and where it stands": lambda x: F.max_pool2d(x, 3, 2, 1, 2, True, return_indices=True)[0],
    "the largest of all": lambda x: x.amax((2, 3), keepdim=True),
    "the largest of a row": lambda x: x.amax(3, keepdim=True),
    "the smallest of a column": lambda x: x.amin(2, keepdim=True),
    "adaptive to one": lambda x: F.adaptive_max_pool2d(x, 1),
    "the largest with its place": lambda x: x.flatten(2).max(-1, keepdim=True)[0][..., None],
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_pool_as_planned(name, runtime, tmp_path):
    network, call = Between(INTEGERS[name]), (torch.randn(2, 3, 10, 9),)
    inputs = [torch.randn(batch, 3, 10, 9) for batch in (5, 1, 3)]
    for x, (answered, planned) in zip(
        inputs, answers(network, call, runtime, "int8", tmp_path / "a", inputs, Static()), strict=True
    ):
        assert signal_to_noise(planned[0].detach(), answered[0]) > 60
        assert signal_to_noise(network(x).detach(), answered[0]) > 25


def written(network, x, path):
    """A file for images of any height."""
    height = torch.export.Dim("height", min=8, max=64)
    program = torch.export.export(
        network.eval(), (x,), dynamic_shapes=({2: height},), prefer_deferred_runtime_asserts_over_guards=True
    )
    table = onnx_pooling.translations()
    with torch.no_grad():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=18, custom_translation_table=table, input_names=["x"], verbose=False
        )
    exported.save(str(path))


def test_a_size_that_varies(tmp_path):
    """Rounding up is left to the runtime there, where it rounds as torch does; a divisor needs none of it."""
    calls = [
        ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
        ("avg_pool2d", {"kernel_size": 2, "ceil_mode": True, "divisor_override": 3}),
        ("max_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ]
    written(Pools(calls), torch.randn(2, 3, 11, 8), tmp_path / "a.onnx")
    import onnxruntime
    import openvino

    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    compiled = openvino.Core().compile_model(
        openvino.convert_model(str(tmp_path / "a.onnx")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for height in (11, 12, 17):
        x = torch.randn(2, 3, height, 8)
        for answered in (session.run(None, {"x": x.numpy()}), list(compiled(x.numpy()).values())):
            for expected, given in zip(Pools(calls)(x), answered, strict=True):
                assert signal_to_noise(expected, given) > 100


def test_what_cannot_be_written_is_refused(tmp_path):
    network = Pools([("max_pool2d", {"kernel_size": 2, "stride": 3, "ceil_mode": True})])
    with pytest.raises(Exception) as caught:
        written(network, torch.randn(2, 3, 12, 12), tmp_path / "a.onnx")
    cause = caught.value
    while cause.__cause__ is not None:  # torch says in which step it happened
        cause = cause.__cause__
    assert isinstance(cause, ExportError) and cause.code == "ceil-mode"


def test_the_overhang_is_that_of_torchs_windows():
    for size, kernel, stride, dilation in itertools.product(range(4, 9), (1, 2, 3), (1, 2, 3, 4), (1, 2)):
        for padding in range(kernel // 2 + 1):
            x = torch.arange(float(size))[None, None]
            if size + 2 * padding < dilation * (kernel - 1) + 1:
                continue
            windows = F.max_pool1d(x, kernel, stride, padding, dilation, ceil_mode=True).shape[-1]
            reach = dilation * (kernel - 1) + 1
            assert (
                overhang(size, kernel, stride, padding, dilation) == (windows - 1) * stride + reach - size - 2 * padding
            )
