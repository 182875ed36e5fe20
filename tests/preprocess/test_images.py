"""Pixels go in as they are: what a wrapped network computes is what its training's normalizing gave it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.errors import PenjingError
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.preprocess import Images
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task

both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).mean((2, 3)))


def pixels(n, height=20, width=24, seed=0):
    return torch.randint(
        0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_it_resizes_crops_and_normalizes():
    network, x = Small().eval(), pixels(2)
    planes = x.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for settings, expected in (
        ({}, planes),
        ({"mean": MEAN, "std": STD}, (planes - mean) / std),
        ({"mean": 0.5, "std": 0.25, "bgr": True}, (planes.flip(1) - 0.5) / 0.25),
        ({"scale": 1.0}, planes * 255),
        ({"resize": (12, 16)}, F.interpolate(planes, (12, 16), mode="bilinear")),
        ({"resize": 10, "crop": 8}, F.interpolate(planes, (10, 12), mode="bilinear")[:, :, 1:9, 2:10]),
    ):
        assert torch.allclose(Images(network, **settings)(x), network(expected), atol=1e-4)
    first = Images(network, layout="NCHW")(x.permute(0, 3, 1, 2))
    assert torch.allclose(first, network(planes), atol=1e-5)


@both
@pytest.mark.parametrize("sizes", [None, {"image": {0: "batch", 1: "height", 2: "width"}}])
def test_both_runtimes_take_8_bit_images_also_of_sizes_that_vary(sizes, runtime, tmp_path):
    module = Images(Small(), resize=(16, 16), mean=MEAN, std=STD).eval()
    task = Task(example=pixels(2), dynamic=sizes)
    network = capture_network(module, *task.call(), task.dynamic)
    x = pixels(3, 31, 22) if sizes else pixels(3)
    expected, structure = flatten_outputs(module(x))
    build(Draft(network), runtime, "fp32", task, structure, tmp_path)
    (given,) = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    assert torch.allclose(torch.from_numpy(given), expected[0], atol=1e-4)


@both
def test_the_first_quantizer_has_the_grid_of_the_pixels(runtime, tmp_path):
    """Pixels − 127 over 128 are on a grid of 1/128 with zero point 127: the integers are the pixels themselves."""
    module = Images(Small(), mean=127, std=128, scale=1.0).eval()
    few = pixels(8) // 2 + 40  # not all values occur
    task = Task(example=few[:2], calibration=[few])
    spec = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
    network = capture_network(module, *task.call())
    draft = Static()(Draft(network), Context(task=task, capabilities=spec))
    entry = draft.plan.entries["network.a:in0"]
    assert entry.scale == pytest.approx((1 / 128,), rel=1e-6) and entry.zero_point == (127,)
    _, structure = flatten_outputs(module(few))
    build(draft, runtime, "int8", task, structure, tmp_path)
    (given,) = isolated.open_artifact(tmp_path, 1).run([few.numpy()])
    noise = (torch.from_numpy(given) - module(few)).square().mean() / module(few).square().mean()
    assert noise < 1e-3


@pytest.mark.parametrize("settings", [{"mean": MEAN, "std": STD}, {"resize": (10, 10)}, {"mean": 0.3, "std": 0.2}])
def test_other_grids_come_from_the_data(settings):
    """Means that differ or are not whole pixels, and pixels between pixels."""
    module = Images(Small(), **settings).eval()
    task = Task(example=pixels(2), calibration=[pixels(8) // 2 + 40])
    draft = Static()(Draft(capture_network(module, *task.call())), Context(task=task))
    spread = 255 / 255 / (settings.get("std", 1.0) if isinstance(settings.get("std", 1.0), float) else 0.2)
    assert draft.plan.entries["network.a:in0"].scale[0] < 0.9 * spread / 255


@pytest.mark.parametrize(
    "settings, field",
    [({"layout": "HWC"}, "layout"), ({"std": 0}, "std"), ({"resize": -1}, "resize"), ({"scale": 0}, "scale")],
)
def test_settings_out_of_range_are_refused(settings, field):
    with pytest.raises(PenjingError) as refused:
        Images(Small(), **settings)
    assert (refused.value.code, refused.value.field) == ("settings", field)


def test_images_that_are_not_pixels_are_refused():
    for images in (pixels(2).float(), pixels(2)[0]):
        with pytest.raises(PenjingError) as refused:
            Images(Small())(images)
        assert refused.value.code == "images"
    with pytest.raises(PenjingError) as refused:
        Images(Small(), crop=21)(pixels(2))
    assert refused.value.code == "images"
