import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing import share
from penjing.errors import CalibrationError, RecipeError, SharingError
from penjing.network.capture import capture_network
from penjing.prune import Magnitude
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.surgery import read_codebook
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.raises import raises_case, raises_setting
from tests.trainings import EVERY_STEP, Interrupt, Stop, same


class Net(nn.Module):
    """One layer of every kind that takes a codebook: tokens (batch, 8) to classes (batch, 10)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.conv = nn.Conv1d(12, 24, 3, padding=1)
        self.up = nn.ConvTranspose1d(24, 8, 2, stride=2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv(self.lstm(self.table(x))[0].transpose(1, 2)))
        return self.head(F.relu(self.norm(self.up(x))).flatten(1))


def task(samples=48):
    torch.manual_seed(0)
    x, y = torch.randint(0, 30, (samples, 8)), torch.randint(0, 10, (samples,))
    pairs = list(zip(x.split(16), y.split(16), strict=True))
    return Task(example=x[:2], train=pairs, loss=F.cross_entropy, calibration=[x])


TASK = task()
MATRICES = ("table.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight", "up.weight", "head.weight")


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return capture_network(Net().eval(), *TASK.call())


@pytest.fixture
def draft(captured):
    return Draft(captured).copy()


def values(draft, name):
    return draft.network.get_parameter(name).detach().unique()


def run(step, draft, task=TASK, **fields):
    return step(draft, Context(task=task, source=draft.network, **fields))


def test_every_matrix_has_few_values_and_the_rest_is_untouched(draft):
    shared = run(share.Codebook(bits=3), draft)
    assert {name: len(values(shared, name)) for name in MATRICES} == dict.fromkeys(MATRICES, 8)
    before = dict(draft.network.named_parameters())
    for name, parameter in shared.network.named_parameters():
        assert (name in MATRICES) != torch.equal(parameter, before[name])
    assert [edit["tensors"] for edit in shared.codebooks] == [[name] for name in MATRICES]


def test_bits_follow_the_kind_of_layer_and_entries_need_not_be_a_power_of_two(draft):
    shared = run(share.Codebook(bits={"conv": 2, "linear": 4}), draft)
    assert len(values(shared, "conv.weight")) == 4 and len(values(shared, "head.weight")) == 16
    assert len(values(shared, "table.weight")) == 480
    assert len(values(run(share.Codebook(entries=5, layers=("head",)), draft), "head.weight")) == 5


def test_parts_of_rows_and_the_whole_network_can_have_a_codebook_each(draft):
    shared = run(share.Codebook(bits=2, scope="channels", rows=8), draft)
    weight = shared.network.get_parameter("conv.weight").detach()
    assert [len(part.unique()) for part in weight.split(8)] == [4, 4, 4] and len(weight.unique()) == 12
    everywhere = run(share.Codebook(bits=4, scope="global"), draft)
    assert len(torch.cat([values(everywhere, name) for name in MATRICES]).unique()) == 16
    assert len(everywhere.codebooks) == 1


def test_zeros_stay_zero_and_are_no_entry(draft):
    pruned = run(Magnitude(sparsity=0.6), draft)
    shared = run(share.Codebook(bits=3), pruned)
    for name in ("conv.weight", "head.weight"):
        zero = pruned.network.get_parameter(name) == 0
        assert zero.any() and torch.equal(shared.network.get_parameter(name) == 0, zero)
        assert len(values(shared, name)) == 9  # eight entries, and 0


def test_weights_that_move_the_outputs_keep_their_values_better():
    torch.manual_seed(0)
    scale = torch.logspace(-1, 1, 32)
    x = torch.randn(64, 32) * scale
    task = Task(example=x[:2], calibration=[x])
    draft = Draft(capture_network(nn.Sequential(nn.Linear(32, 20)), *task.call()))
    with torch.no_grad():
        draft.network.get_parameter("0.weight").div_(scale)  # what reads large inputs has small weights
    score = {"outputs": share.Codebook(bits=2), "none": share.Codebook(bits=2, sensitivity="none")}
    with torch.no_grad():
        source = draft.network(x)
        noise = {n: float((run(step, draft, task).network(x) - source).square().mean()) for n, step in score.items()}
    assert noise["outputs"] < 0.7 * noise["none"]


def trained(draft, **settings):
    step = Finetune(steps=12, learning_rate=0.1, autocast="off", **settings)
    return run(step, draft)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "adamw"}, {"ema": 0.9}, {"weight_decay": 0.1}],
    ids=["sgd", "adamw", "ema", "decay"],
)
@pytest.mark.parametrize("scope", ["tensor", "channels", "global"])
def test_training_moves_entries_and_keeps_who_shares_them(draft, scope, settings):
    shared = run(share.Codebook(bits=3, scope=scope, rows=8), run(Magnitude(sparsity=0.5), draft))
    after = trained(shared, **settings)
    for mark in shared.codebooks:
        before, now = read_codebook(shared.network, mark), read_codebook(after.network, mark)
        assert len(now.entries) == len(before.entries)
        for name, index in before.indices.items():
            pairs = torch.stack([index, now.indices[name]]).unique(dim=1)
            assert pairs.shape[1] == len(index.unique()) == len(now.indices[name].unique())
        assert not torch.equal(now.entries.sort(0).values, before.entries.sort(0).values)
    for name in ("conv.weight", "head.weight"):
        assert torch.equal(after.network.get_parameter(name) == 0, shared.network.get_parameter(name) == 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("scope", ["tensor", "channels"])
def test_training_scales_a_grid_as_a_whole(draft, scope, optimizer):
    shared = run(share.Codebook(bits=3, grid="powers_of_two", scope=scope, rows=8), draft)
    after = trained(shared, optimizer=optimizer)
    for name in ("conv.weight", "head.weight"):
        before, now = (d.network.get_parameter(name).detach().split(8) for d in (shared, after))
        for old, new in zip(before, now, strict=True) if scope == "channels" else [(before[0], now[0])]:
            ratio = (new / old)[old != 0]
            assert ratio[0] != 1
            torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
            exponents = new[new != 0].abs().log2()
            torch.testing.assert_close(exponents - exponents[0], (exponents - exponents[0]).round(), atol=1e-4, rtol=0)
    assert not same(shared.network, after.network)


def test_an_entry_moves_by_the_mean_of_its_weights_gradients(draft):
    shared = run(share.Codebook(bits=2, layers=("head",)), draft)
    x, y = TASK.train[0]
    rate = 0.1
    step = Finetune(
        steps=1, learning_rate=rate, warmup=0, schedule="constant", weight_decay=0, autocast="off", distill=()
    )
    after = run(step, shared, replace(TASK, train=[(x, y)]))
    network = copy.deepcopy(shared.network).train()
    F.cross_entropy(network(x), y).backward()
    weight, gradient = (t.detach() for t in (network.head.weight, network.head.weight.grad))
    for entry in weight.unique():
        mine = weight == entry
        moved = after.network.head.weight.detach()[mine].unique()
        assert len(moved) == 1
        # Nesterov's first step is 1 + 0.9 times the gradient.
        assert float(moved) == pytest.approx(float(entry - 1.9 * rate * gradient[mine].mean()), abs=1e-6)


def test_a_resumed_training_ends_in_the_same_bits(draft, tmp_path):
    shared = run(share.Codebook(bits=3), draft)
    settings = Finetune(steps=9, learning_rate=0.1, autocast="off", save_every_s=EVERY_STEP)
    whole = run(replace(settings, hooks=(Interrupt(),)), shared)
    with pytest.raises(Stop):
        run(replace(settings, hooks=(Interrupt("step", 5),)), shared, folder=tmp_path)
    resumed = run(replace(settings, hooks=(Interrupt(),)), shared, folder=tmp_path)
    assert same(resumed.network, whole.network)


def test_a_checkpoint_reloads_to_the_bit_and_trains_on(draft, captured, tmp_path):
    shared = run(share.Codebook(bits=3), draft)
    checkpoint.save(shared, tmp_path)
    again = checkpoint.load(tmp_path, captured)
    assert again.codebooks == shared.codebooks and same(again.network, shared.network)
    assert same(trained(again).network, trained(shared).network)


def test_what_can_not_be_shared_is_refused(draft):
    with raises_case(SharingError, "larger-than-tensor") as caught:
        run(share.Codebook(entries=256, layers=("conv",), scope="channels", rows=4), draft)
    assert "144 weights" in caught.value.got
    with raises_case(SharingError, "nothing-to-share"):
        run(share.Codebook(bits={"gru": 4}), draft)
    with raises_case(RecipeError, "no-layer") as caught:
        run(share.Codebook(layers=("haed",)), draft)
    assert "head" in caught.value.remedy
    with pytest.raises(CalibrationError):
        run(share.Codebook(sensitivity="outputs"), draft, replace(TASK, calibration=None))
    assert len(values(run(share.Codebook(), draft, replace(TASK, calibration=None)), "head.weight")) == 32
    for field, value in {"entries": 1, "bits": 9, "rows": 0, "scope": "layer", "samples": 0}.items():
        with raises_setting(field):
            share.Codebook(**{field: value})
    for settings in ({"bits": 7}, {"bits": {"conv": 4, "linear": 1}}, {"entries": 9}):
        with raises_case(RecipeError, "contradiction"):
            share.Codebook(grid="uniform", **settings)
    for bits in ({}, {"norm": 4}, {"conv": 0}, {"conv": True}):
        with raises_setting("bits"):
            share.Codebook(bits=bits)


def test_what_would_change_shared_values_comes_before():
    with pytest.raises(RecipeError) as caught:
        Recipe(share.Codebook(), Magnitude()).check()
    assert "before share.Codebook" in caught.value.expected
    Recipe(Magnitude(), Finetune(), share.Codebook(), Finetune()).check()


def test_yaml_holds_bits_by_kind():
    recipe = Recipe.from_yaml("- share.Codebook: {bits: {conv: 4, linear: 5}, scope: global}")
    assert recipe == Recipe(share.Codebook(bits={"conv": 4, "linear": 5}, scope="global"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
