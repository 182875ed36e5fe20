"""Trainings on a GPU: they learn, repeat to the bit, go on to the bit, and bring back what they were given."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import penjing as pj
from penjing import distill
from penjing.distill.stored import _keys
from penjing.network.capture import capture_network
from penjing.recipes.recipe import Recipe
from penjing.train.finetune import Finetune, train
from tests import pairs, students
from tests import trainings as loop

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def places(*networks):
    return {t.device.type for network in networks for t in network.state_dict().values()}


@pytest.mark.parametrize("name", pairs.TECHNIQUES)
def test_every_technique_gives_a_file_that_answers_as_torch(name, tmp_path):
    pytest.importorskip("onnxruntime")
    order = (name, "Finetune") if isinstance(pairs.TECHNIQUES[name][1], distill.Student) else ("Finetune", name)
    data = pairs.task()
    network = pairs.trained(data)
    figures = pairs.artifact(Recipe(*pairs.steps(*order)), network, data, tmp_path, device=DEVICE)
    assert figures["snr_db"] >= 35
    assert places(network) == {"cpu"}


@pytest.mark.parametrize("settings", [
    loop.SHORT, replace(loop.SHORT, autocast="bf16"), replace(loop.SHORT, optimizer="adamw", ema=0.9, accumulate=2),
], ids=["fp32", "bf16", "adamw"])  # fmt: skip
def test_it_repeats_and_goes_on_to_the_bit(settings, tmp_path):
    settings = replace(settings, hooks=(loop.Interrupt(),))
    whole = loop.trained(settings, loop.context_of(device=DEVICE))
    assert places(whole) == {"cpu"}
    assert loop.same(loop.trained(settings, loop.context_of(device=DEVICE)), whole)
    stopped = replace(settings, hooks=(loop.Interrupt("step", 3),))
    with pytest.raises(loop.Stop):
        loop.trained(stopped, loop.context_of(device=DEVICE, folder=tmp_path))
    assert loop.same(loop.trained(settings, loop.context_of(device=DEVICE, folder=tmp_path)), whole)


def test_it_learns_what_it_learns_on_a_cpu():
    settings = replace(loop.SHORT, epochs=1)

    class Plain(loop.Net):
        def __init__(self):
            super().__init__()
            self.drop = nn.Identity()

    torch.manual_seed(0)
    network = Plain()
    states = [loop.bits(train(copy.deepcopy(network), loop.context_of(device=d), settings)) for d in ("cpu", DEVICE)]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor.float(), states[1][name].float(), atol=2e-3), name


def test_bfloat16_is_taken_by_itself():
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    network = loop.net()
    network.drop = Seen()
    train(network, loop.context_of(device=DEVICE), Finetune(steps=1))
    assert set(seen) == {torch.bfloat16}


def test_random_numbers_of_the_user_stay():
    network = loop.net()
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    loop.trained(loop.SHORT, loop.context_of(device=DEVICE), network)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.fixture(scope="module")
def teacher():
    return train(
        students.captured(16, seed=1),
        students.context(None),
        replace(students.SHORT, epochs=10),
    )


@pytest.mark.parametrize("way", students.WAYS, ids=lambda way: type(way).__name__)
def test_every_way_teaches(way, teacher):
    told = []
    where = replace(
        students.context(teacher, train=None, loss=None),
        device=DEVICE,
        events=lambda kind, **v: told.append(v["loss"]) if "loss" in v else 0,
    )
    settings = replace(students.SHORT, epochs=4, distill=way, task_loss_weight=0, clip=pj.Clip(threshold=1.0))
    student = train(students.captured(), where, settings)
    assert told[-1] < 0.8 * told[0]
    assert places(student, teacher) == {"cpu"}


def test_decoupled_distillation_takes_labels(teacher):
    where = replace(students.context(teacher), device=DEVICE)
    student = train(students.captured(), where, replace(students.SHORT, epochs=8, distill=distill.DKD()))
    assert students.agreement(student, teacher) > 0.85


def test_stored_answers_are_those_of_the_teacher(teacher, tmp_path):
    settings = replace(students.SHORT, epochs=2, distill=distill.Logits())
    where = replace(students.context(teacher), device=DEVICE)
    asked = train(students.captured(), where, replace(settings, teacher=teacher))
    stored = train(students.captured(), where, replace(settings, teacher=distill.TeacherCache(tmp_path, teacher)))
    read = train(students.captured(), where, replace(settings, teacher=distill.TeacherCache(tmp_path)))
    assert loop.same(asked, stored) and loop.same(stored, read)


@pytest.mark.parametrize("shape", [(300, 1, 28, 28), (40, 3, 224, 224), (5, 7), (3, 0)])
def test_a_sample_has_the_same_key_everywhere(shape):
    x, mask = torch.randn(shape), torch.ones(len(torch.empty(shape)), 3, dtype=torch.bool)
    keys = _keys((x,), {"mask": mask, "scale": torch.tensor(2.0)})
    moved = x.to(DEVICE, memory_format=torch.channels_last) if x.dim() == 4 else x.to(DEVICE)
    assert _keys((moved,), {"mask": mask.to(DEVICE), "scale": torch.tensor(2.0, device=DEVICE)}) == keys


def test_a_run_from_source_to_file(tmp_path):
    pytest.importorskip("onnxruntime")
    task = students.task(evaluate=lambda predict: float((predict(x).argmax(1) == y).mean()))
    x, y = (torch.cat(parts).numpy() for parts in zip(*task.train, strict=True))
    network = train(
        students.captured(16, seed=1),
        students.context(None),
        replace(students.SHORT, epochs=10),
    )
    recipe = pj.recipes.joint(macs=0.6, epochs=6, learning_rate=0.05)
    result = pj.run(recipe, network, task, runtime="onnxruntime", out=tmp_path / "run", device=DEVICE, seconds=0.1)
    assert result.record.artifact.metric > 0.9
    applied = pj.apply(recipe, network, task, device=DEVICE)
    assert places(applied, network) == {"cpu"}
    with torch.no_grad():
        assert float((applied(torch.tensor(x)).argmax(1).numpy() == y).mean()) > 0.9


def test_a_network_that_lives_there_stays_there(teacher):
    network = students.captured().to(DEVICE)
    train(network, replace(students.context(copy.deepcopy(teacher).to(DEVICE)), device=DEVICE),
          replace(students.SHORT, steps=2, distill=distill.Logits()))  # fmt: skip
    assert places(network) == {DEVICE}


def test_a_network_that_lives_there_is_captured():
    network = students.Small().to(DEVICE)
    captured = capture_network(network, (torch.zeros(2, 1, 8, 8, device=DEVICE),))
    assert places(captured) == {DEVICE}
