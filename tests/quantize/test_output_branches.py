"""Values of different kinds that meet on the way to an output are told with their layers, with and without data."""

import json

import pytest
import torch
import torch.nn.functional as F

from penjing.cli import main
from penjing.network.capture import capture_network
from penjing.quantize.output_branches import meeting
from tests import detector_heads as heads


def told(head, calls=()):
    return meeting(capture_network(head().eval(), (torch.zeros(2, 3, heads.SIDE, heads.SIDE),)), calls)


@pytest.mark.parametrize(
    "head, layers",
    [
        (heads.Yolox, {"boxes.0", "objects.1", "kinds.2"}),  # joined level by level
        (heads.Yolov4, {"all.0", "all.1", "all.2"}),  # one convolution, decoded in place
        (heads.Yolov5, {"all.0", "all.1", "all.2"}),  # one convolution, cut apart
        (heads.Yolov8, {"boxes.0", "kinds.0", "boxes.2", "kinds.2"}),
        (heads.Ssd, {"offsets.0", "kinds.2"}),
        (heads.CenterMaps, {"heat", "size", "shift"}),
        (heads.Detr, {"boxes", "kinds"}),
        (heads.YuNet, {"all.0", "all.1", "all.2"}),
    ],
)
def test_the_layers_of_boxes_and_scores_are_named_without_data(head, layers):
    rows = told(head)
    assert layers <= {name for row in rows for name in row.layers}
    assert all(len(row.decoded) > 1 and row.ratio is None for row in rows)


def test_with_data_the_ratio_is_measured():
    (row,) = told(heads.Detr, [((torch.randn(4, 3, heads.SIDE, heads.SIDE),), {})])
    assert row.name == "/cat#0" and row.decoded == ("sigmoid mul", "softmax")
    assert 20 < row.ratio < 500


class Alike(heads.RetinaNet):
    """Levels that the same operators decode; each of two outputs has one kind of values."""


class Joined(heads.CenterNet):
    """Both parts leave as they are, and one is far larger."""

    def forward(self, x):
        m = self.maps(x)[0]
        return torch.cat([self.size(m) * 1.0, self.shift(m) * 1.0], 1)


def test_what_is_decoded_alike_is_not_told_unless_its_magnitude_differs():
    data = [((F.interpolate(torch.randn(4, 3, 4, 4), size=heads.SIDE),), {})]
    assert told(Alike) == told(Alike, data) == ()
    assert told(Joined) == ()
    (row,) = told(Joined, data)
    assert row.layers == ("size", "shift") and row.ratio > 10


def test_inspect_tells_them(tmp_path, capsys):
    source = tmp_path / "net.py"
    source.write_text("from tests.detector_heads import Detr\n\n\ndef network():\n    return Detr().eval()\n")
    arguments = ["inspect", f"{source}:network", "--shape", f"3,{heads.SIDE},{heads.SIDE}"]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "outputs of different magnitude" in shown
    assert "/cat#0 (cat) joins values of boxes, kinds, decoded by sigmoid mul; by softmax" in shown
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["branches"]
    assert row["layers"] == ["boxes", "kinds"]


class MeasuresTheImage(torch.nn.Module):
    """Reads the size of the image where it decodes, and makes the grid there, as files of torch's exporter do."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 6, 3, stride=8, padding=1)

    def forward(self, image):
        y = self.head(image).reshape(image.shape[0], 6, -1).transpose(1, 2)
        boxes = y[..., :4].exp() + torch.tensor([0.5, 0.5, 1.0, 1.0])
        return torch.cat([boxes, y[..., 4:].sigmoid()], -1)


def test_sizes_are_no_values_and_copies_do_not_decode():
    rows = told(MeasuresTheImage)
    assert [row.name for row in rows] == ["head", "/cat#0"]
    assert all(row.layers == ("head",) and row.decoded == ("exp add", "sigmoid") for row in rows)
