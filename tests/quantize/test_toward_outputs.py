"""Detectors of every kind keep what they decode and join: no column of an output is lost to a scale."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.network.graph import OUTPUT, sites
from penjing.pipeline.building import build
from penjing.quantize import Static
from penjing.quantize.toward_outputs import EXPECTS, JOINS, in_floats
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests import detector_heads as heads

both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


def images(count, seed):
    """Smooth blobs of colour."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=heads.SIDE, mode="bilinear")


@functools.cache
def captured(head):
    task = Task(example=images(2, 0), calibration=[images(16, seed) for seed in (1, 2)])
    return capture_network(head().eval(), *task.call()), task


@functools.cache
def planned(head, runtime):
    network, task = captured(head)
    spec = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
    return Static()(Draft(network), Context(task=task, capabilities=spec)), task


def decibels(expected, given):
    """Of every column of the axis that boxes and scores lie along, the worst."""
    axis = min(range(1, expected.dim()), key=lambda a: expected.shape[a]) if expected.dim() > 2 else 0
    expected, given = (
        x.transpose(0, axis).flatten(1).double() if axis else x.flatten()[None] for x in (expected, given)
    )
    return float(10 * torch.log10(expected.square().mean(1) / (expected - given).square().mean(1)).min())


@both
@pytest.mark.parametrize("head", heads.HEADS, ids=lambda head: head.__name__)
def test_nothing_is_rounded_on_the_way_to_an_output_but_what_a_kernel_writes(head, runtime):
    draft, _ = planned(head, runtime)
    way, writes = in_floats(draft.network), runtimes.get(runtime).capabilities(()).quantized_output
    names = {node.name: site for site, node in sites(draft.network).items()}
    decoding = {names[name] for name in way}
    assert decoding
    rounded = {edge.rpartition(":")[0] for edge in draft.plan.entries} & (decoding | {OUTPUT})
    assert not rounded or writes  # only a runtime whose convolutions write integers has any


@both
@pytest.mark.parametrize(
    "head",
    [head for head in heads.HEADS if head is not heads.CenterNet],  # its best places, nearly alike, change their order
    ids=lambda head: head.__name__,
)
def test_every_column_of_every_output_keeps_its_values(head, runtime):
    draft, _ = planned(head, runtime)
    x = images(8, 3)
    with torch.no_grad():
        answers = [flatten_outputs(n(x))[0] for n in (captured(head)[0], insert(draft.network, draft.plan))]
    for expected, given in zip(*answers, strict=True):
        assert decibels(expected, given) > 22


@both
@pytest.mark.parametrize("head", [heads.YoloxDecoded, heads.Yolov8, heads.CenterNet], ids=lambda head: head.__name__)
def test_the_artifact_computes_what_was_planned(head, runtime, tmp_path):
    draft, task = planned(head, runtime)
    x = images(5, 3)
    simulated, structure = flatten_outputs(insert(draft.network, draft.plan)(x))
    build(draft, runtime, "int8", task, structure, tmp_path)
    given = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    for expected, values in zip(simulated, given, strict=True):
        assert decibels(expected.detach(), torch.from_numpy(values)) > 25


def test_the_mean_of_a_distribution_over_bins_is_decoding():
    for head, name in ((heads.Yolov8, "expect"), (heads.Yolov8Product, "weight_layer")):
        draft, _ = planned(head, "openvino")
        assert draft.plan.floats[name] == EXPECTS
        assert draft.plan.floats["/cat#0"] == JOINS


def test_one_convolution_of_boxes_and_scores_writes_no_integers():
    draft, _ = planned(heads.Yolov5, "onnxruntime")
    assert {"all.0", "all.1", "all.2"} <= set(draft.plan.floats)
    assert not any(edge.startswith("/view") for edge in draft.plan.entries)


@both
def test_the_classes_of_pixels_stay_those_of_the_network(runtime):
    draft, _ = planned(heads.Classes, runtime)
    x = images(8, 3)
    with torch.no_grad():
        expected, given = captured(heads.Classes)[0](x), insert(draft.network, draft.plan)(x)
    assert (expected == given).float().mean() > 0.97


class Within(heads.Trunk):
    """Residual additions, pooling and a concatenation in front of a layer are a network's own arithmetic."""

    def __init__(self):
        super().__init__()
        self.side = heads.conv(heads.WIDTH, heads.WIDTH)
        self.last, self.other = (heads.conv(2 * heads.WIDTH, 8, 1) for _ in range(2))

    def forward(self, x):
        first, *_ = self.maps(x)
        joined = torch.cat([first, first + self.side(first)], 1)
        return F.relu(self.last(joined) + self.other(joined))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = heads.conv(3, 8), heads.conv(3, 8)

    def forward(self, x):
        return F.adaptive_avg_pool2d(F.relu(self.a(x) + self.b(x)), 1).flatten(1)


class Averaged(Pooled):
    def forward(self, x):
        h = F.relu(self.a(x) + self.b(x))
        return h, h.mean((2, 3)), h.flatten(2).sum(2)


@pytest.mark.parametrize("network", [Within, Pooled, Averaged])
def test_arithmetic_that_is_not_decoded_stays_in_integers(network):
    draft, _ = planned(network, "openvino")
    assert JOINS not in draft.plan.floats.values()
    assert not in_floats(draft.network)
