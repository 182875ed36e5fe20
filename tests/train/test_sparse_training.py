"""Zeros that pruning makes stay zeros: in fine-tuning, after a resume, through checkpoints and quantization."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from penjing import quantize
from penjing.errors import CheckpointError
from penjing.network.capture import capture_network
from penjing.numerics.grid import integers
from penjing.prune import Gradual, Magnitude
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.surgery import mark_sparse, replay
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train
from tests.raises import raises_case
from tests.trainings import EVERY_STEP, Interrupt, Stop, bits, digits, net, same

TRAINING = Finetune(epochs=2.5, learning_rate=0.05, weight_decay=0.01, autocast="off", save_every_s=EVERY_STEP)
SPARSE = ("conv.weight", "head.weight")


def context_of(**fields):
    data = digits()
    calibration = [x.float() for x in digits().x.split(50)]
    task = Task(example=torch.zeros(1, 1, 8, 8), train=data, loss=F.cross_entropy, calibration=calibration)
    return Context(task=task, **fields)


@pytest.fixture(scope="module")
def pruned():
    draft = Draft(capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),)))
    return Magnitude(sparsity=0.8)(draft, context_of())


def masks(draft):
    return {name: draft.network.get_parameter(name).detach() == 0 for name in draft.sparse}


def lost(before, after):
    """Tensors of which a zero has moved, or too much else has stayed."""
    wrong = []
    for name, gone in masks(before).items():
        weight = after.network.get_parameter(name).detach()
        moved = (weight[~gone] != before.network.get_parameter(name)[~gone]).float().mean()
        if (weight[gone] != 0).any() or moved <= 0.9:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [(), Clip(threshold=0.1)])
def test_zeros_stay_through_a_training(pruned, optimizer, clip):
    rate = 0.05 if optimizer == "sgd" else 0.005
    settings = replace(TRAINING, optimizer=optimizer, learning_rate=rate, clip=clip)
    done = settings(pruned, context_of())
    assert not lost(pruned, done)
    assert done.edits == pruned.edits and not any(p.grad is not None for p in done.network.parameters())


@pytest.mark.parametrize("autocast", ["bf16", "off"])
def test_in_other_formats_too(pruned, autocast):
    assert not lost(pruned, replace(TRAINING, epochs=1, autocast=autocast, channels_last=True)(pruned, context_of()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [1, 6])
def test_a_resumed_training_has_the_same_zeros_and_the_same_bits(pruned, tmp_path, optimizer, step):
    settings = replace(TRAINING, optimizer=optimizer, hooks=(Interrupt(),))
    whole = settings(pruned, context_of())
    with pytest.raises(Stop):
        replace(settings, hooks=(Interrupt("step", step),))(pruned, context_of(folder=tmp_path))
    resumed = settings(pruned, context_of(folder=tmp_path))
    assert not lost(pruned, resumed)
    assert same(bits(resumed.network), bits(whole.network))


def test_an_average_of_weights_has_the_zeros_that_came_on_the_way():
    draft = Draft(capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),)))
    training = replace(TRAINING, ema=0.99)
    zeroed = Gradual(step=Magnitude(sparsity=0.8), finetune=training, every=1)(draft, context_of())
    zeros = sum(int((zeroed.network.get_parameter(n) == 0).sum()) for n in zeroed.sparse)
    assert zeros == pytest.approx(0.8 * sum(zeroed.network.get_parameter(n).numel() for n in zeroed.sparse), abs=2)


def test_a_draft_without_zeros_trains_as_before():
    draft = Draft(capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),)))
    assert draft.sparse == ()
    one = TRAINING(draft, context_of())
    assert not torch.equal(one.network.head.weight, draft.network.head.weight)


def test_a_training_of_a_module_takes_the_names_of_what_keeps_its_zeros():
    network = net()
    with torch.no_grad():
        network.head.weight[:, ::2] = 0
    masked, moved = (copy.deepcopy(network) for _ in range(2))
    train(masked, context_of(), TRAINING, ["head.weight"])
    train(moved, context_of(), TRAINING)
    assert (masked.head.weight[:, ::2] == 0).all() and (moved.head.weight[:, ::2] != 0).any()


def test_a_saved_training_that_kept_other_zeros_is_not_resumed(tmp_path):
    context = context_of(folder=tmp_path)
    with pytest.raises(Stop):
        train(net(), context, replace(TRAINING, hooks=(Interrupt("step", 2),)), ["head.weight"])
    with raises_case(CheckpointError, "settings") as caught:
        train(net(), context, replace(TRAINING, hooks=(Interrupt(),)), ["conv.weight"])
    assert caught.value.field == "keep_zeros"


def test_a_hook_of_the_users_own_that_changes_gradients_comes_before(pruned):
    def push(moment):
        if moment.name == "gradients":
            moment.network.head.weight.grad.add_(1.0)

    assert not lost(pruned, replace(TRAINING, epochs=1, hooks=(push,))(pruned, context_of()))


def test_weights_that_were_frozen_are_no_trouble(pruned):
    draft = pruned.copy()
    draft.network.conv.weight.requires_grad_(False)
    done = replace(TRAINING, epochs=0.5)(draft, context_of())
    assert torch.equal(done.network.conv.weight, pruned.network.conv.weight)


def test_a_checkpoint_between_keeps_them(pruned, tmp_path):
    checkpoint.save(pruned, tmp_path)
    again = checkpoint.load(tmp_path, capture_network(net(seed=5).eval(), (torch.zeros(1, 1, 8, 8),)))
    assert again.sparse == SPARSE
    assert not lost(pruned, TRAINING(again, context_of()))


@pytest.mark.parametrize("bits_of_weights", [8, 4])
def test_quantization_and_training_behind_it_keep_them(pruned, bits_of_weights):
    """Folding, balancing, rounding and learned scales: no step moves a zero."""
    context = replace(context_of(), source=pruned.network)
    steps = (
        quantize.Static(weight_bits=bits_of_weights),
        quantize.QAT(finetune=Finetune(epochs=1, learning_rate=0.01, autocast="off")),
    )
    draft = pruned
    for step in steps:
        draft = step(draft, context)
        for name, gone in masks(pruned).items():
            entry = draft.plan.entries[name.replace(".weight", ":weight")]
            scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
            weight = draft.network.get_parameter(name).detach()
            assert not zero.any() and (weight[gone] == 0).all()
            assert (integers(weight, scale, zero, entry.spec)[gone] == 0).all()


def test_adaptive_rounding_keeps_them(pruned):
    draft = quantize.CoordinateRounding()(quantize.Static(weight_bits=4)(pruned, context_of()), context_of())
    for name, gone in masks(pruned).items():
        assert (draft.network.get_parameter(name)[gone] == 0).all()


def test_the_log_names_every_tensor_once():
    network = capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),))
    edits = (mark_sparse(network, ["conv.weight"]), {"edit": "x"}, mark_sparse(network, SPARSE))
    assert Draft(network, edits=edits).sparse == SPARSE
    assert edits[0] == {"edit": "sparse", "tensors": ["conv.weight"]}


def test_a_log_that_names_another_networks_tensors_is_refused():
    network = capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),))
    assert same(bits(replay(network, [{"edit": "sparse", "tensors": list(SPARSE)}])), bits(network))
    for edit in ({"edit": "sparse", "tensors": ["body.weight"]}, {"edit": "sparse"}):
        with raises_case(CheckpointError, "misfit"):
            replay(network, [edit])
