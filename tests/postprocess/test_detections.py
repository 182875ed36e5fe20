"""What a wrapped detector gives is what suppression says, and both runtimes give the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing.errors import PenjingError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.postprocess import Detections, GridBoxes
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests import detector_heads as heads

both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


class Given(nn.Module):
    """Gives its input: boxes and scores (batch, n, 4 + classes)."""

    def forward(self, rows):
        return rows * 1.0


def crowded(batch=3, n=20, classes=3):
    """Boxes on whole pixels that overlap, and scores of five values only: many ties."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 8, (batch, n, 2), generator=generator).float()
    scores = torch.randint(0, 5, (batch, n, classes), generator=generator) / 5
    return torch.cat([first, first + 4, scores], -1)


def slowly(rows, threshold, overlap, most, agnostic=False):
    """(score, class, box) of one sample by the obvious loop, best first, equal ones by class and place."""

    def ratio(a, b):
        inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
        return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))

    boxes, scores = rows[:, :4], rows[:, 4:]
    if agnostic:
        candidates = [(float(s.max()), int(s.argmax()), i) for i, s in enumerate(scores)]
        order = sorted(candidates, key=lambda f: (-f[0], f[2]))
    else:
        candidates = [(float(s), c, i) for i, row in enumerate(scores) for c, s in enumerate(row)]
        order = sorted(candidates, key=lambda f: (-f[0], f[1], f[2]))
    remain = []
    for score, kind, place in order:
        rivals = [r for r in remain if agnostic or r[1] == kind]
        if score > threshold and all(ratio(boxes[place], boxes[r[2]]) <= overlap for r in rivals):
            remain.append((score, kind, place))
    return remain[:most]


@pytest.mark.parametrize("agnostic", [False, True])
def test_it_is_suppression_by_the_obvious_loop(agnostic):
    rows = crowded()
    detections = Detections(Given(), score_threshold=0.3, max_detections=25, class_agnostic=agnostic)(rows)
    for i, sample in enumerate(rows):
        expected = slowly(sample, 0.3, 0.5, 25, agnostic)
        count = int(detections["count"][i])
        assert count == len(expected) > 2
        assert detections["scores"][i, :count].tolist() == pytest.approx([e[0] for e in expected])
        assert detections["classes"][i, :count].tolist() == [e[1] for e in expected]
        assert torch.equal(detections["boxes"][i, :count], sample[[e[2] for e in expected], :4])
        assert not detections["boxes"][i, count:].any() and (detections["classes"][i, count:] == -1).all()


@both
@pytest.mark.parametrize("threshold, most, agnostic", [(0.3, 8, False), (0.3, 200, True), (1.5, 5, False)])
def test_both_runtimes_give_the_same_also_where_scores_tie_or_nothing_is_found(
    threshold, most, agnostic, runtime, tmp_path
):
    """For every size of a batch; 200 is more than there are, so the result is padded."""
    rows = crowded()
    module = Detections(Given(), score_threshold=threshold, max_detections=most, class_agnostic=agnostic).eval()
    task = Task(example=rows[:2])
    expected, structure = flatten_outputs(module(rows))
    build(Draft(capture_network(module, *task.call())), runtime, "fp32", task, structure, tmp_path)
    session = isolated.open_artifact(tmp_path, 1)
    for size in (3, 1):
        given = session.run([rows[:size].numpy()])
        assert all(torch.equal(torch.from_numpy(g), e[:size]) for g, e in zip(given, expected, strict=True))
    assert expected[0].shape == (3, most, 4)


def test_boxes_are_read_in_every_convention():
    rows = crowded()
    expected = Detections(Given())(rows)
    x, y, right, bottom = rows[..., :4].unbind(-1)
    forms = {
        "yxyx": (y, x, bottom, right),
        "xywh": (x, y, right - x, bottom - y),
        "cxcywh": ((x + right) / 2, (y + bottom) / 2, right - x, bottom - y),
    }
    for name, form in forms.items():
        detections = Detections(Given(), boxes=name)(torch.cat([torch.stack(form, -1), rows[..., 4:]], -1))
        assert all(torch.equal(detections[key], expected[key]) for key in expected)


def test_outputs_are_read_in_every_form():
    rows = crowded()
    expected = Detections(Given())(rows)

    class Pair(nn.Module):
        def forward(self, rows):
            return {"scores": rows[..., 4:], "boxes": rows[..., :4]}

    objectness = torch.cat([rows[..., :4], torch.full((3, 20, 1), 0.5), rows[..., 4:] * 2], -1)
    for detections in (
        Detections(Pair())(rows),
        Detections(Given(), axis=1)(rows.transpose(1, 2)),
        Detections(Given(), scores="objectness")(objectness),
        Detections(Given(), decode=lambda rows: (rows[..., :4], rows[..., 4:]))(rows),
    ):
        assert all(torch.equal(detections[key], expected[key]) for key in expected)


def test_a_grid_is_decoded_as_the_head_does_it():
    raw, decoded = heads.Yolox().eval(), heads.YoloxDecoded().eval()
    decoded.load_state_dict(raw.state_dict(), strict=False)
    x = torch.randn(2, 3, heads.SIDE, heads.SIDE)
    boxes, scores = GridBoxes(heads.SIDE)(raw(x))
    assert torch.allclose(boxes, decoded(x)[..., :4], atol=1e-4)
    assert torch.equal(scores, raw(x)[..., 4:5] * raw(x)[..., 5:])


@both
def test_the_network_within_is_pruned_and_quantized_and_suppression_is_not(runtime, tmp_path):
    detector = Detections(
        heads.Yolox(), decode=GridBoxes(heads.SIDE), boxes="cxcywh", score_threshold=0.01, max_detections=10
    ).eval()
    data = [torch.randn(8, 3, heads.SIDE, heads.SIDE, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    task = Task(example=data[0][:2], calibration=data)
    recipe = pj.Recipe(pj.prune.Channels(macs=0.7), pj.quantize.Static())
    small = pj.apply(recipe, detector, task, runtime=runtime)
    assert sum(p.numel() for p in small.parameters()) < 0.95 * sum(p.numel() for p in detector.parameters())
    draft = small.meta["applied"].draft
    assert {"network.down:weight", "network.boxes.0:weight"} <= set(draft.plan.entries)
    simulated, structure = flatten_outputs(small(data[0]))
    build(draft, runtime, "int8", task, structure, tmp_path)
    session = isolated.open_artifact(tmp_path, 1)
    boxes, scores, _, count = session.run([data[0].numpy()])
    assert boxes.shape == (8, 10, 4)
    assert abs(int(count.sum()) - int(simulated[3].sum())) <= 4
    assert (scores[:, 0] - simulated[1][:, 0].detach().numpy()).max() < 0.05


def test_boxes_that_trade_places_do_not_refuse_an_artifact(tmp_path):
    """Random scores are nearly alike: a last bit decides which of two boxes comes first, in torch as in the runtime."""
    detector = Detections(
        heads.Yolox(), decode=GridBoxes(heads.SIDE), boxes="cxcywh", score_threshold=1e-3, max_detections=10
    ).eval()
    coarse = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = F.interpolate(coarse, size=heads.SIDE, mode="bilinear")
    task = Task(example=data[:2], calibration=[data[:12], data[12:]])
    assert pj.quantize_to(detector, task, tmp_path / "small.xml", fast=True).parity


def scattered(n=40):
    generator = torch.Generator().manual_seed(1)
    centres, sizes = torch.rand(1, n, 2, generator=generator) * 300 + 50, torch.rand(1, n, 2, generator=generator) * 40
    return centres, sizes + 10, torch.full((1, n, 1), 0.9)


def test_boxes_in_another_convention_are_refused_with_its_name():
    centres, sizes, scores = scattered()
    rows = {
        "cxcywh": torch.cat([centres, sizes, scores], -1),
        "xyxy": torch.cat([centres - sizes / 2, centres + sizes / 2, scores], -1),
    }
    for claimed, true in (("xyxy", "cxcywh"), ("cxcywh", "xyxy")):
        Detections(Given(), boxes=true)(rows[true])
        with pytest.raises(PenjingError) as refused:
            Detections(Given(), boxes=claimed)(rows[true])
        assert refused.value.code == "boxes" and true in refused.value.got


def test_one_object_that_fills_the_image_is_not_taken_for_another_convention():
    rows = torch.tensor([0.5, 0.5, 0.9, 0.95, 0.8]).expand(1, 30, 5)
    assert int(Detections(Given(), boxes="cxcywh")(rows)["count"]) == 1


@pytest.mark.parametrize(
    "settings, code, field",
    [
        ({"boxes": "center"}, "unknown-convention", "boxes"),
        ({"iou_threshold": 45}, "settings", "iou_threshold"),
        ({"max_detections": 0}, "settings", "max_detections"),
        ({"scores": "logits"}, "settings", "scores"),
    ],
)
def test_settings_out_of_range_are_refused(settings, code, field):
    with pytest.raises(PenjingError) as refused:
        Detections(Given(), **settings)
    assert (refused.value.code, refused.value.field) == (code, field)


def test_outputs_that_are_not_boxes_are_refused():
    with pytest.raises(PenjingError) as refused:
        Detections(Given())(torch.rand(2, 7))
    assert refused.value.code == "outputs"
