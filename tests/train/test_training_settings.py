import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing.errors import RecipeError, TaskError, TrainingError
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.averaging import Average
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train
from tests.raises import raises_case, raises_setting


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def task(batch=8, samples=48, **fields):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    pairs = list(zip(x.split(batch), y.split(batch), strict=True))
    return Task(**{"example": x[:2], "train": pairs, "loss": F.cross_entropy} | fields)


def trained(data, **settings):
    told = []
    context = Context(task=data, events=lambda kind, **values: told.append((kind, values)))
    fixed = {"autocast": "off", "learning_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0}
    return train(net(), context, Finetune(**fixed | settings)), told


def close(one, two, tolerance=1e-6):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def lengths(network, order, what=lambda p: p):
    return {name: float(what(p).flatten().norm(order)) for name, p in network.named_parameters()}


class TestAccumulation:
    def test_two_batches_of_half_the_size_are_one(self):
        whole, _ = trained(task(batch=16), epochs=2)
        parts, _ = trained(task(batch=8), epochs=2, accumulate=2)
        assert close(whole, parts) and not close(whole, net())

    def test_batches_weigh_by_their_samples(self):
        data = task(batch=24, samples=24).train[0]
        parts = [tuple(t[a:b] for t in data) for a, b in ((0, 16), (16, 24))]
        ours, _ = trained(task(train=parts), epochs=1, accumulate=2)
        assert close(ours, trained(task(train=[data]), epochs=1)[0])

    def test_the_last_update_of_an_epoch_may_have_fewer_batches(self):
        _, told = trained(task(batch=8), epochs=2, accumulate=4)
        assert [v["done"] for kind, v in told if kind == "progress"] == [1, 2, 3, 4]
        ragged, _ = trained(task(batch=8, samples=24), epochs=1, accumulate=2)
        data = task(batch=8, samples=24).train
        two = (torch.cat([data[0][0], data[1][0]]), torch.cat([data[0][1], data[1][1]]))
        assert close(ragged, trained(task(train=[two, data[2]]), epochs=1)[0])

    def test_more_batches_than_an_epoch_has_make_one_update_of_all(self):
        whole, _ = trained(task(batch=24, samples=24), epochs=2)
        parts, told = trained(task(batch=6, samples=24), epochs=2, accumulate=9)
        assert close(whole, parts) and not close(whole, net())
        assert [v["done"] for kind, v in told if kind == "progress"] == [1, 2]

    def test_it_resumes_to_the_bit(self, tmp_path):
        class Stop(Exception):
            pass

        def stop(moment):
            if moment.name == "step" and moment.step == 4:
                raise Stop

        settings = Finetune(
            epochs=3, accumulate=2, ema=0.9, autocast="off", save_every_s=1e-9, clip=Clip(threshold=0.1)
        )
        context = Context(task=task(), folder=tmp_path)
        hook = type("Hook", (), {"__call__": lambda self, moment: None, "__repr__": lambda self: "hook"})()
        stopping = type("Hook", (), {"__call__": lambda self, moment: stop(moment), "__repr__": lambda self: "hook"})()
        with pytest.raises(Stop):
            train(net(), context, replace(settings, hooks=(stopping,)))
        resumed = train(net(), context, replace(settings, hooks=(hook,)))
        whole = train(net(), Context(task=task()), settings)
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [("constant", [0.1, 0.1, 0.1]), ("linear", [0.1, 0.06667, 0.03333]), ("cosine", [0.1, 0.075, 0.025])],
    )
    def test_the_rate(self, schedule, expected):
        _, told = trained(task(batch=12), epochs=1, schedule=schedule, warmup=0.25)
        assert [round(v["rate"], 5) for kind, v in told if kind == "training"] == [
            0.1,
            *expected,
        ]  # one step of warm-up

    def test_a_budget_of_steps(self):
        _, told = trained(task(batch=8), epochs=100, steps=7)
        assert [v["total"] for kind, v in told if kind == "progress"] == [7] * 7


class TestAverage:
    def test_against_a_slow_reference(self):
        seen = []
        network, _ = trained(task(), epochs=1, ema=0.5, hooks=(lambda m: seen.append(m.network[0].weight.clone()),))
        average = net()[0].weight.detach().clone()
        for step, weight in enumerate(every_step(seen), start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weight
        assert torch.allclose(network[0].weight, average, atol=1e-6)

    def test_statistics_are_averaged_and_counters_are_those_of_the_last_step(self):
        norm = nn.BatchNorm1d(2)
        average = Average(norm, decay=0.1)
        norm.running_mean += 10
        norm.num_batches_tracked += 7
        average.update(norm, 1000)
        average.into(norm)
        assert torch.allclose(norm.running_mean, torch.full((2,), 9.0)) and int(norm.num_batches_tracked) == 7

    def test_of_16_bits_does_not_stand_still(self):
        layer = nn.Linear(2, 2).to(torch.bfloat16)
        average = Average(layer, decay=0.999)
        layer.weight.data += 1
        for step in range(1000, 8000):
            average.update(layer, step)
        current = layer.weight.detach().clone()
        average.into(layer)
        assert layer.weight.dtype == torch.bfloat16 and torch.allclose(layer.weight, current, atol=0.01)


class TestLabelSmoothing:
    def test_labels_below_0_are_left_out_as_in_torch(self):
        data = task()
        train = [(x, y.masked_fill(torch.arange(len(y)) % 3 == 0, -100)) for x, y in data.train]
        ours, _ = trained(task(train=train), epochs=1, label_smoothing=0.2)
        smooth = lambda a, b: F.cross_entropy(a, b, label_smoothing=0.2)  # noqa: E731
        assert close(ours, trained(task(train=train, loss=smooth), epochs=1)[0])

    def test_it_is_that_of_torch(self):
        ours, _ = trained(task(), epochs=1, label_smoothing=0.2)
        theirs, _ = trained(task(loss=lambda a, b: F.cross_entropy(a, b, label_smoothing=0.2)), epochs=1)
        assert close(ours, theirs) and not close(ours, trained(task(), epochs=1)[0], 1e-4)

    def test_a_class_that_the_loss_ignores_is_left_out(self):
        ours, _ = trained(task(loss=lambda a, b: F.cross_entropy(a, b, ignore_index=0)), epochs=1, label_smoothing=0.2)
        smooth = lambda a, b: F.cross_entropy(a, b, ignore_index=0, label_smoothing=0.2)  # noqa: E731
        assert close(ours, trained(task(loss=smooth), epochs=1)[0])

    def test_answers_that_could_not_be_surer_are_smoothed(self):
        sure = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            sure.weight.copy_(1000 * torch.eye(3))
        data = Task(example=torch.eye(3), train=[(torch.eye(3), torch.arange(3))], loss=F.cross_entropy)
        settings = Finetune(epochs=1, autocast="off", label_smoothing=0.1, weight_decay=0.0, warmup=0.0)
        train(sure, Context(task=data), settings)
        assert (sure.weight.diag() < 1000).all()

    def test_numbers_as_labels_are_refused(self):
        data = task(train=[(torch.rand(4, 6), torch.rand(4, 3))], loss=F.mse_loss)
        with raises_case(TaskError, "not-classes"):
            trained(data, label_smoothing=0.1)

    def test_without_a_loss_of_the_task_it_is_refused(self):
        with raises_case(TaskError, "no-loss"):
            trained(task(loss=None), label_smoothing=0.1, losses=(lambda batch: batch.output.mean(),))

    def test_labels_beyond_the_classes_are_left_out(self):
        x, y = torch.rand(6, 6), torch.tensor([0, 1, 255, 2, 255, 0])
        train = [(x, y)]
        ours, _ = trained(
            task(train=train, loss=lambda a, b: F.cross_entropy(a, b, ignore_index=255)), epochs=1, label_smoothing=0.2
        )
        smooth = lambda a, b: F.cross_entropy(a, b, ignore_index=255, label_smoothing=0.2)  # noqa: E731
        assert close(ours, trained(task(train=train, loss=smooth), epochs=1)[0])


class TestClip:
    @pytest.mark.parametrize("norm", ["l1", "l2", "max"])
    @pytest.mark.parametrize("per", ["network", "layer"])
    @pytest.mark.parametrize("what", ["gradients", "weights"])
    def test_nothing_is_longer_than_allowed(self, what, norm, per):
        network = net()
        F.cross_entropy(network(torch.ones(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
        clipped = [(name, p) for name, p in network.named_parameters() if what == "gradients" or p.dim() > 1]
        value = (lambda p: p.grad) if what == "gradients" else (lambda p: p.detach())
        before = [value(p).clone() for _, p in clipped]
        over = Clip(what=what, norm=norm, per=per, threshold=0.01)(network.named_parameters())
        order = {"l1": 1, "l2": 2, "max": math.inf}[norm]
        wholes = [[n for n, _ in clipped]] if per == "network" else [[n for n, _ in clipped if n[0] == k] for k in "02"]
        now = {n: value(p) for n, p in clipped}
        longest = max(float(torch.cat([now[n].flatten() for n in whole]).norm(order)) for whole in wholes)
        assert 0.0099 < longest <= 0.01 + 1e-8 and over > 1
        for old, new in zip(before, now.values(), strict=True):
            if norm == "max":
                assert torch.equal(new, old.clamp(-0.01, 0.01))
            else:
                assert torch.allclose(F.normalize(new.flatten(), dim=0), F.normalize(old.flatten(), dim=0), atol=1e-5)

    def test_weights_need_a_bound(self):
        with raises_case(RecipeError, "no-threshold") as caught:
            Clip(what="weights")
        assert "adaptive=True" in caught.value.remedy
        network = net()
        Clip(what="weights", adaptive=True)(network.named_parameters())

    def test_the_whole_network_in_l2_is_that_of_torch(self):
        one, two = net(), net()
        for network in (one, two):
            F.cross_entropy(network(torch.ones(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
        Clip(threshold=0.05)(one.named_parameters())
        nn.utils.clip_grad_norm_(two.parameters(), 0.05)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-6)

    def test_what_is_short_stays_to_the_bit(self):
        network, same = net(), net()
        assert Clip(what="weights", threshold=1e3)(network.named_parameters()) < 1
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))

    def test_adaptive_gradients_are_a_part_of_their_weights(self):
        network = net()
        F.cross_entropy(100 * network(torch.ones(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
        Clip(adaptive=True, per="layer", threshold=0.02)(network.named_parameters())
        for layer in (network[0], network[2]):
            grad = torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()
            assert float(grad / torch.cat([layer.weight.flatten(), layer.bias]).detach().norm()) == pytest.approx(
                0.02, rel=1e-3
            )

    @pytest.mark.parametrize(
        ("norm", "expected"), [("max", 0.5 / 10), ("l2", 0.5 * 2000**0.5 / 10), ("l1", 0.5 * 2000 / 10)]
    )
    def test_adaptive_weights_are_a_multiple_of_their_first_bound(self, norm, expected):
        layer = nn.Linear(100, 20)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(20, 100))
        Clip(what="weights", adaptive=True, per="layer", norm=norm, threshold=0.5)(layer.named_parameters())
        order = {"l1": 1, "l2": 2, "max": math.inf}[norm]
        assert float(layer.weight.detach().flatten().norm(order)) == pytest.approx(expected, rel=1e-4)

    def test_a_training_tells_what_was_clipped(self):
        network, told = trained(
            task(), epochs=2, clip=(Clip(threshold=1e-3), Clip(what="weights", norm="max", threshold=0.2))
        )
        events = [v for kind, v in told if kind == "clipped"]
        assert [(v["what"], v["steps"], v["step"]) for v in events] == [
            ("gradients", 6, 6), ("weights", 6, 6), ("gradients", 6, 12), ("weights", 6, 12),
        ]  # fmt: skip
        assert all(v["clipped"] == 6 and v["longest"] > 1 for v in events if v["what"] == "gradients")
        assert max(lengths(network, math.inf)[name] for name in ("0.weight", "2.weight")) <= 0.2 + 1e-6

    @pytest.mark.parametrize(
        "wrong", [{"what": "biases"}, {"norm": "l3"}, {"threshold": 0}, {"per": "row"}, {"threshold": math.nan}]
    )
    def test_settings_that_make_no_sense(self, wrong):
        with raises_setting(next(iter(wrong))):
            Clip(**wrong)


class TestBadInput:
    @pytest.mark.parametrize(
        "wrong", [{"epochs": "3"}, {"task_loss_weight": "1"}, {"learning_rate": None}, {"ema": "0.9"}, {"warmup": True},
                  {"hooks": print}, {"losses": print}, {"teacher": ()}, {"teacher": ""}, {"teacher": [nn.ReLU()]},
                  {"teacher": (nn.ReLU(), None)}, {"schedule": ["cosine"]}, {"channels_last": "no"}, {"workers": 0},
                  {"distill": pj.distill.Logits}, {"distill": [pj.distill.Logits()]}, {"optimizer": None}],
    )  # fmt: skip
    def test_of_another_type(self, wrong):
        with raises_setting(next(iter(wrong))):
            Finetune(**wrong)

    def test_a_teacher_and_nothing_to_learn_from_it(self):
        with raises_case(RecipeError, "idle-teacher"):
            Finetune(teacher=nn.ReLU(), distill=())

    @pytest.mark.parametrize(
        ("train", "code", "shown"),
        [
            ([(torch.rand(4, 6), torch.full((4,), 7))], "loss-raised", "int64 (4,)"),
            ([(torch.rand(4, 6), None)], "loss-raised", "labels None"),
            ([(torch.rand(4, 5), torch.zeros(4).long())], "network-raised", "float32 (4, 5)"),
            ([(torch.rand(4, 6).double(), torch.zeros(4).long())], "network-raised", "float64 (4, 6)"),
            (5, "not-iterable", "int"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_shown_beside_the_example(self, train, code, shown):
        with raises_case(TaskError, code) as caught:
            trained(task(train=train), epochs=1)
        assert shown in caught.value.got
        if code.endswith("-raised"):
            assert "float32 (2, 6)" in caught.value.expected

    @pytest.mark.parametrize(
        ("x", "code"),
        [(torch.full((4, 6), math.nan), "data-not-finite"), (torch.rand(0, 6), "no-sample")],
    )
    def test_samples_that_no_training_can_use(self, x, code):
        with raises_case(TrainingError, code):
            trained(task(train=[(x, torch.zeros(len(x)).long())]), epochs=1)

    def test_a_loss_without_a_gradient(self):
        with raises_case(TrainingError, "no-gradient") as caught:
            trained(task(loss=lambda a, b: F.cross_entropy(a.detach(), b)), epochs=1)
        assert "labels" in caught.value.got and "detach" in caught.value.remedy


class TestTheSourceTeaches:
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)).eval()

    def data(self, **fields):
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 3
        pairs = list(zip(x.split(8), y.split(8), strict=True))
        return Task(**{"example": x[:2], "train": pairs, "loss": F.cross_entropy} | fields)

    def terms(self, *steps, **fields):
        told = []
        from penjing.network.capture import capture_network
        from penjing.steps.draft import Draft

        data = self.data(**fields)
        source = capture_network(self.network(), *data.call())
        context = Context(
            task=data, source=source, events=lambda kind, **v: told.append(v["terms"]) if kind == "training" else None
        )
        draft = Draft(source)
        for step in steps:
            draft = step(draft, context)
        return told

    def test_what_was_pruned_learns_from_it_too(self):
        tune = Finetune(steps=1, autocast="off")
        assert list(self.terms(tune)[0]) == ["labels"]
        assert list(self.terms(pj.prune.Channels(macs=0.5), tune)[0]) == ["labels", "Outputs"]
        assert list(self.terms(pj.prune.Magnitude(sparsity=0.5), tune)[0]) == ["labels", "Outputs"]
        assert list(self.terms(pj.prune.Movement(sparsity=0.5, finetune=tune))[0]) == ["labels", "Outputs"]

    def test_a_teacher_that_is_named_is_imitated(self):
        tune = Finetune(steps=1, autocast="off", teacher=self.network())
        assert list(self.terms(tune)[0]) == ["labels", "Outputs"]

    def test_without_labels_gradients_are_kept_within_bounds(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        network[2].weight.data *= 100  # outputs far from 1
        calls = [torch.randn(8, 6) for _ in range(8)]
        data = Task(example=calls[0], calibration=calls)
        assert Finetune(task_loss_weight=0).resolved(Context(task=data, source=network), changed=False).clip == Clip()
        student = copy.deepcopy(network)
        student[0].weight.data *= 3
        distilled = train(student, Context(task=data, source=network), Finetune(task_loss_weight=0, epochs=3))
        assert all(torch.isfinite(p).all() for p in distilled.parameters())

    def test_unless_it_is_told_not_to(self):
        plain = Finetune(steps=1, autocast="off", distill=())
        assert list(self.terms(pj.prune.Channels(macs=0.5), plain)[0]) == ["labels"]

    def test_classes_are_soft_targets_and_numbers_are_noise(self):
        from penjing.distill.logits import soft_targets
        from penjing.distill.outputs import Outputs, relative_noise
        from penjing.distill.teaching import DistillationInputs

        student, teacher = torch.randn(8, 3), torch.randn(8, 3)
        for target, expected in {
            "classes": (torch.arange(8) % 3, soft_targets(student, teacher, 4.0)),
            "numbers": (torch.rand(8, 3), relative_noise([student], [teacher])),
            "none": (None, relative_noise([student], [teacher])),
        }.values():
            lesson = DistillationInputs(student, teacher, target, {}, {})
            assert torch.equal(Outputs().loss(lesson)(lesson), expected)
        slow = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
        slow /= sum(b**2 for b in teacher.flatten().tolist())
        assert float(relative_noise([student], [teacher])) == pytest.approx(slow, rel=1e-5)


def every_step(seen):
    """Weights after each update, of what a hook saw at all moments: start, pass, (gradients, step)…, epoch, end."""
    return seen[3:-2:2]
