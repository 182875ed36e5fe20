import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import CheckpointError, RecipeError
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize import QAT, CoordinateRounding, SplitOutliers, Static
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage.checkpoint import restore, save
from penjing.surgery import insert, replay
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.raises import raises_case, raises_setting

LARGE = [3, 20]
RUNTIMES = ("onnxruntime", "openvino")


class Perceptron(nn.Module):
    """Two layers that read one value, and one behind a curve; two of the channels are outliers that matter."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.down = nn.Linear(128, 24), nn.Linear(128, 24), nn.Linear(24, 5)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.left(x)) * torch.sigmoid(self.right(x)))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = Perceptron().eval()
    x = torch.randn(64, 7, 128)
    x[..., LARGE] *= 60
    with torch.no_grad():
        for layer in (model.left, model.right):
            layer.weight[:, LARGE] /= 20
    task = Task(
        example=x[:2], calibration=list(x.split(16)), train=[(part, part[..., :5]) for part in x.split(16)],
        loss=nn.functional.mse_loss,
    )  # fmt: skip
    return model, x, task, Draft(capture_network(model, *task.call())), Context(task=task)


def noise(network, reference, x):
    with torch.no_grad():
        return float((network(x) - reference).square().mean() / reference.square().mean())


def test_the_network_computes_what_it_did(prepared):
    model, x, _, draft, context = prepared
    split = SplitOutliers()(draft, context)
    assert split.edits == ({"edit": "split_outliers", "layers": ["left", "right"], "channels": LARGE},)
    with torch.no_grad():
        torch.testing.assert_close(split.network(x), model(x), rtol=1e-4, atol=1e-5)
    assert not split.network.get_submodule("left").weight[:, LARGE].any()
    assert torch.equal(split.network.get_submodule("right_outliers").weight, model.right.weight[:, LARGE])
    assert torch.equal(draft.network.get_submodule("left").weight, model.left.weight)  # the draft before is as it was


def test_outliers_stay_in_floating_point_and_the_others_get_a_narrow_range(prepared):
    model, x, _, draft, context = prepared
    static = Static(activation_range="minmax")
    plain, split = static(draft, context), static(SplitOutliers()(draft, context), context)
    few = {"left_outliers", "right_outliers", "left_outliers.sum", "right_outliers.sum"}
    assert few <= set(split.plan.floats) and all("outliers" in split.plan.floats[name] for name in few)
    assert not few & {edge.rpartition(":")[0] for edge in split.plan.entries}
    assert split.plan.entries["left:in0"] == split.plan.entries["right:in0"]  # one value, one quantizer
    assert split.plan.entries["left:in0"].scale[0] < plain.plan.entries["left:in0"].scale[0] / 20
    reference = model(x).detach()
    alone, both = (noise(insert(quantized.network, quantized.plan), reference, x) for quantized in (plain, split))
    assert both < alone / 20


@pytest.fixture(scope="module")
def ran(prepared, tmp_path_factory):
    """A run over both runtimes."""
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
    model, _, task, _, _ = prepared
    recipe, out = Recipe(SplitOutliers(), Static()), tmp_path_factory.mktemp("outliers") / "run"
    return pj.run(recipe, model, task, runtime=RUNTIMES, out=out, seconds=0.05, threads=1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_runs_one_part_in_integers_and_the_other_not(ran, runtime):
    row = next(c for c in ran.record.candidates if c.name == f"{runtime}-int8")
    executed = {layer.name: layer.executed for layer in row.layers}
    assert executed["left"] == executed["right"] == "int8"
    assert executed["left_outliers"] == executed["right_outliers"] == "fp32"
    assert next(p for p in row.parity if p.against == "planned").snr_db > 50


def test_the_checkpoint_has_it(prepared, tmp_path):
    model, x, task, draft, context = prepared
    quantized = Static()(SplitOutliers()(draft, context), context)
    save(quantized, tmp_path)
    loaded = restore(tmp_path, Perceptron(), task)
    assert loaded.plan == quantized.plan
    with torch.no_grad():
        assert torch.equal(loaded.network(x), quantized.network(x))
        assert torch.equal(insert(loaded.network, loaded.plan)(x), insert(quantized.network, quantized.plan)(x))


def test_repair_and_training_follow(prepared):
    model, x, _, draft, context = prepared
    split = Static(weight_bits=4)(SplitOutliers()(draft, context), context)
    repaired = CoordinateRounding()(split, context)
    reference = model(x).detach()
    before, after = (noise(insert(quantized.network, quantized.plan), reference, x) for quantized in (split, repaired))
    assert after < before
    trained = QAT(finetune=Finetune(epochs=1, learning_rate=1e-3))(split, context)
    assert torch.isfinite(insert(trained.network, trained.plan)(x)).all()


def test_without_outliers_nothing_is_split(prepared):
    _, _, _, draft, context = prepared
    result = SplitOutliers(factor=1000.0)(draft, context)
    assert result.edits == () and list(sites(result.network)) == list(sites(draft.network))


def test_no_more_than_the_share_is_split_the_largest_first():
    largest = torch.tensor([1.0] * 97 + [50.0, 100.0, 20.0])
    assert SplitOutliers(most=0.02).channels(largest) == [97, 98]
    assert SplitOutliers(most=0.5).channels(largest) == [97, 98, 99]
    assert SplitOutliers(most=0.009).channels(largest) == []


def test_events_tell_how_many_layers_there_are(prepared):
    _, _, task, draft, _ = prepared
    told = []
    SplitOutliers()(draft, Context(task=task, events=lambda kind, **values: told.append((kind, values))))
    assert ("covered", {"step": "SplitOutliers", "layers": 2, "total": 3}) in told


@pytest.mark.parametrize(
    "settings", [{"factor": 1}, {"factor": float("nan")}, {"most": 0}, {"most": 1.5}, {"samples": 0}, {"factor": "6"}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with raises_setting(*settings):
        SplitOutliers(**settings)


def test_it_goes_before_quantization():
    with raises_case(RecipeError, "order"):
        Recipe(Static(), SplitOutliers())
    assert Recipe(SplitOutliers(), Static()).to_data()[0]["quantize.SplitOutliers"]["factor"] == 6.0


@pytest.mark.parametrize("edit", [{"layers": ["left", "down"]}, {"layers": ["nowhere"]}, {"channels": [500]}])
def test_an_edit_of_another_network_is_refused(prepared, edit):
    _, _, _, draft, _ = prepared
    with raises_case(CheckpointError, "misfit"):
        replay(draft.network, [{"edit": "split_outliers", "layers": ["left"], "channels": [1], **edit}])
