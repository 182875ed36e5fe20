"""Networks on images of any height and width: the same values in torch and in both runtimes at other sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import runtimes
from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}


class Pyramid(nn.Module):
    """Features at a half and a quarter of the size, joined where they have been resized."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        half = self.first(x).relu()
        return self.join(x, half, self.second(half).relu())


class Nearest(Pyramid):
    def join(self, x, half, quarter):
        return half + F.interpolate(quarter, size=half.shape[-2:]), quarter


class Bilinear(Pyramid):
    def join(self, x, half, quarter):
        height, width = half.shape[2:]
        half = torch.cat((half, F.interpolate(quarter, size=(height, width), mode="bilinear", align_corners=True)), 1)
        return F.interpolate(half, size=x.size()[2:], mode="bilinear", align_corners=False)


class Padded(Pyramid):
    """A decoder that pads what is a pixel too small, and an input padded to a multiple of 8."""

    def join(self, x, half, quarter):
        large = F.interpolate(quarter[..., :-1, :-1], scale_factor=2)
        over = [half.shape[3] - large.shape[3], half.shape[2] - large.shape[2]]
        large = F.pad(large, (over[0] // 2, over[0] - over[0] // 2, over[1] // 2, over[1] - over[1] // 2))
        return half * large, F.pad(x, (0, -x.shape[3] % 8, 0, (8 - x.shape[2] % 8) % 8))


class PooledAverages(Pyramid):
    """Averages of 1, 2 × 2 and 3 × 3 windows, whose places depend on the size."""

    def join(self, x, half, quarter):
        scales = [F.adaptive_avg_pool2d(quarter, n) for n in (1, 2, 3)]
        wide = F.adaptive_avg_pool2d(half, (None, 2)), F.adaptive_avg_pool1d(half.flatten(2), 5)
        return sum(F.interpolate(scale, size=half.shape[2:]) for scale in scales), *wide


class PooledMaxima(Pyramid):
    def join(self, x, half, quarter):
        return F.adaptive_max_pool2d(quarter, (3, 2)), F.adaptive_max_pool2d(half, 1)


@pytest.mark.parametrize("kind", [Nearest, Bilinear, Padded, PooledAverages, PooledMaxima])
def test_the_same_values_in_torch_and_in_the_runtimes_at_other_sizes(kind, tmp_path):
    torch.manual_seed(0)
    net, example = kind().eval(), torch.randn(2, 3, 24, 40)
    network = capture_network(net, (example,), dynamic=FREE)
    _, structure = flatten_outputs(net(example))
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(Draft(network), runtime, "fp32", Task(example=example, dynamic=FREE), structure, folder)
        predict = predictor(runtimes.open_artifact(folder, 1), read_manifest(folder))
        for height, width in ((24, 40), (31, 27)):
            x = torch.randn(3, 3, height, width)
            with torch.no_grad():
                answers, _ = flatten_outputs(net(x))
                mine, _ = flatten_outputs(network(x))
            theirs, _ = flatten_outputs(predict(x.numpy()))
            for answer, own, other in zip(answers, mine, theirs, strict=True):
                torch.testing.assert_close(own, answer, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(torch.from_numpy(other), answer, rtol=1e-4, atol=1e-5)


def test_a_window_of_the_size_of_the_input_is_refused_with_what_to_write():
    class Window(Pyramid):
        def join(self, x, half, quarter):
            return F.avg_pool2d(quarter, quarter.shape[2:]).flatten(1)

    with raises_case(ExportError, "window"):
        capture_network(Window(), (torch.randn(2, 3, 24, 40),), dynamic=FREE)
