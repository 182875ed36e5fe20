from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

from penjing import share
from penjing.errors import CheckpointError, RecipeError, SharingError
from penjing.network.capture import capture_network
from penjing.prune import Magnitude
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.storage import checkpoint
from penjing.surgery import looked_up, replay
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests import pairs
from tests.raises import raises_case, raises_setting
from tests.trainings import EVERY_STEP, Interrupt, Stop, same


def net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*layers).eval()


def task():
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, 8, 8), torch.randint(0, 10, (48,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return Task(example=x[:2], train=batches, loss=nn.functional.cross_entropy, calibration=[x])


TASK = task()
STEPS = {
    "vectors": share.ProductCodebook(dimension=4, bits=4),
    "sums": share.ProductCodebook(dimension=4, bits=3, levels=2),
    "sums of single weights": share.ProductCodebook(dimension=1, bits=2, levels=2),
}


@pytest.fixture(scope="module")
def captured():
    return capture_network(net(), *TASK.call())


@pytest.fixture
def draft(captured):
    return Draft(captured).copy()


def run(step, draft, **fields):
    return step(draft, pairs.context_of(draft.network, TASK, **fields))


def vectors(draft, name, dimension=4):
    return draft.network.get_parameter(name).detach().reshape(-1, dimension).unique(dim=0)


def test_vectors_are_few(draft):
    shared = run(STEPS["vectors"], draft)
    assert [len(vectors(shared, name)) for name in ("2.weight", "5.weight")] == [16, 16]
    assert torch.equal(shared.network.get_parameter("0.weight"), draft.network.get_parameter("0.weight"))  # 9 weights


@pytest.mark.parametrize("name", STEPS)
def test_training_keeps_the_codebooks_and_a_resume_the_bits(draft, name, tmp_path):
    shared = run(STEPS[name], draft)
    settings = Finetune(steps=8, learning_rate=0.05, autocast="off", ema=0.9, save_every_s=EVERY_STEP)
    trained = run(replace(settings, hooks=(Interrupt(),)), shared)
    with pytest.raises(Stop):
        run(replace(settings, hooks=(Interrupt("step", 5),)), shared, folder=tmp_path)
    assert same(run(replace(settings, hooks=(Interrupt(),)), shared, folder=tmp_path).network, trained.network)
    before, after = (looked_up(d.network, d.codebooks) for d in (shared, trained))
    assert before.keys() == after.keys() != set()
    for weight, book in after.items():
        for table, old in zip(book.tables, before[weight].tables, strict=True):
            assert table.entries.shape == old.entries.shape and (table.entries != old.entries).any()
        parameter = trained.network.get_parameter(weight).detach().numpy()
        assert (book.values == parameter).all() and (before[weight].values != parameter).any()


@pytest.mark.parametrize("name", STEPS)
def test_a_checkpoint_reloads_to_the_bit(draft, captured, name, tmp_path):
    shared = run(STEPS[name], draft)
    checkpoint.save(shared, tmp_path)
    again = checkpoint.load(tmp_path, captured)
    assert same(again.network, shared.network) and again.codebooks == shared.codebooks
    step = Finetune(steps=2, learning_rate=0.05, autocast="off")
    assert same(run(step, again).network, run(step, shared).network)


@pytest.mark.parametrize("name", ["vectors", "sums"])
def test_the_file_holds_indices_of_vectors(draft, name, tmp_path):
    pytest.importorskip("onnxruntime")
    shared = run(STEPS[name], draft)
    assert pairs.parity_db(shared, TASK, tmp_path) > 100
    stored = {t.name: t for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    levels = [stored[f"2.weight_indices{n}"] for n in (("", "_2") if name == "sums" else ("",))]
    assert [len(t.raw_data) for t in levels] == [32 * 16 * 9 // 4] * len(levels)


@pytest.mark.parametrize("name", ["vectors", "sums"])
def test_vectors_of_zeros_stay_zero_and_mixed_ones_are_refused(draft, name):
    pruned = run(Magnitude(sparsity=0.5, pattern="1x4", layers=("5",)), draft)
    shared = run(replace(STEPS[name], layers=("5",)), pruned)
    trained = run(Finetune(steps=4, learning_rate=0.05, autocast="off"), shared)
    zero = pruned.network.get_parameter("5.weight") == 0
    assert zero.any()
    for later in (shared, trained):
        assert torch.equal(later.network.get_parameter("5.weight") == 0, zero)
    with raises_case(SharingError, "zeros") as caught:
        run(STEPS[name], run(Magnitude(sparsity=0.5), draft))
    assert "share.Codebook" in caught.value.remedy


def test_what_can_not_be_shared_is_refused(draft):
    with raises_case(SharingError, "dimension"):
        run(share.ProductCodebook(dimension=4, layers=("0",)), draft)
    with raises_case(SharingError, "larger-than-tensor"):
        run(share.ProductCodebook(dimension=24, bits=8, layers=("2",)), draft)
    with raises_case(SharingError, "nothing-to-share"):
        run(share.ProductCodebook(dimension=7), draft)
    with raises_case(RecipeError, "contradiction"):
        share.ProductCodebook(dimension=1)
    for field, value in {"dimension": 0, "bits": 9, "levels": 3}.items():
        with raises_setting(field):
            share.ProductCodebook(**{field: value})


@pytest.mark.parametrize("first", [STEPS["sums"], share.Codebook(bits=3, scope="global")], ids=["sums", "global"])
@pytest.mark.parametrize("second", [share.Codebook(bits=2, layers=("5",)), STEPS["vectors"]], ids=["single", "vectors"])
def test_a_second_codebook_replaces_the_first_where_it_stands(draft, first, second):
    twice = run(second, run(first, draft))
    trained = run(Finetune(steps=2, learning_rate=0.05, autocast="off"), twice)
    dimension = 1 if isinstance(second, share.Codebook) else 4
    count = len(vectors(twice, "5.weight", dimension))
    assert len(vectors(trained, "5.weight", dimension)) == count == (4 if dimension == 1 else 16)
    books = looked_up(trained.network, trained.codebooks)
    assert {"2.weight", "5.weight"} <= books.keys()
    for name, book in books.items():
        assert (book.values == trained.network.get_parameter(name).detach().numpy()).all()


def test_weights_that_were_changed_by_hand_are_told(draft):
    shared = run(STEPS["sums"], draft)
    with torch.no_grad():
        shared.network.get_parameter("5.weight")[0, 0] += 1
    with raises_case(SharingError, "changed"):
        run(Finetune(steps=1), shared)


@pytest.mark.parametrize("shape", [[2, 1 << 40, 4], [9, 256, 4], [2, 256, 0], [2, 256, 7], [2, 256], "abc"], ids=str)
def test_an_edit_that_claims_other_entries_is_refused(captured, shape):
    edit = {"edit": "residual_codebook", "tensor": "5.weight", "entries": "books", "shape": shape}
    with raises_case(CheckpointError, "misfit"):
        replay(captured, [edit])


@pytest.mark.parametrize("settings", [{"dimension": 0}, {"rows": 0}, {"rows": "8"}], ids=str)
def test_a_mark_that_claims_other_parts_is_refused(captured, settings):
    mark = {"edit": "codebook", "tensors": ["5.weight"], "rows": None, "dimension": 1, "proportional": False}
    with raises_case(CheckpointError, "misfit"):
        replay(captured, [mark | settings])


def test_yaml_holds_it():
    recipe = Recipe.from_yaml("- share.ProductCodebook: {dimension: 2, bits: 6, levels: 2}")
    assert recipe == Recipe(share.ProductCodebook(dimension=2, bits=6, levels=2))
