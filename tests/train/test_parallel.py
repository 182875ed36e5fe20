"""Training on a cluster: two workers on this machine, held against one."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import distributed, nn

from penjing import distill
from penjing.architectures import build
from penjing.architectures.bert import BERT
from penjing.errors import TrainingError
from penjing.network.capture import capture_network
from penjing.network.portable import Portable
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune, train
from penjing.train.parallel import Group
from tests.raises import raises_case, raises_setting

pytest.importorskip("ray")
SETTINGS = Finetune(epochs=2, learning_rate=0.05, autocast="off", clip=Clip(threshold=1.0), ema=0.9)


class Plain(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Linear(8 * 9, 10)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


def task(**fields):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x[:210] - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y[:210])
    pairs = list(zip(x.split(35), y.split(35), strict=True))  # odd: the parts differ by one sample
    return Task(**{"example": x[:2], "train": pairs, "loss": F.cross_entropy} | fields)


def captured(norm=False, seed=0):
    torch.manual_seed(seed)
    return capture_network(Plain(norm), *task().call())


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR")
    yield "local"
    ray.shutdown()


@pytest.fixture(scope="module")
def teacher():
    return train(captured(seed=1), Context(task=task()), replace(SETTINGS, epochs=3))


def test_a_cluster_that_does_not_run():  # before a test starts one, which would be taken
    with raises_case(TrainingError, "unreachable"):
        train(captured(), Context(task=task()), replace(SETTINGS, workers=2, cluster="127.0.0.1:1"))


def test_two_workers_give_what_one_gives(cluster, teacher):
    way = (distill.Logits(), distill.DKD())
    settings = replace(SETTINGS, distill=way, accumulate=2)
    told = []
    one = train(captured(), Context(task=task(), source=teacher), settings)
    events = lambda kind, **values: told.append((kind, values))  # noqa: E731
    where = Context(task=task(), events=events)
    two = train(captured(), where, replace(settings, workers=2, cluster=cluster, teacher=teacher))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(next(two.parameters()), next(captured().parameters()), atol=1e-3)
    assert [v["done"] for kind, v in told if kind == "progress"] == list(range(1, 7))


class StopOnce:
    """A hook that ends the first process that comes to a step, and writes down the statistics of the first update."""

    def __init__(self, file):
        self.file = file

    def __repr__(self):
        return "StopOnce"

    def __call__(self, moment):
        if moment.name == "step" and moment.step == 1:
            torch.save(moment.network.norm.running_mean, self.file.with_name(f"{os.getpid()}.statistics"))
        if moment.name == "step" and moment.step == 4 and not self.file.exists():
            self.file.touch()
            os._exit(1)


# What a worker of CRD has seen is that worker's own.
SAVED = replace(SETTINGS, workers=2, cluster="local", save_every_s=1e-9, distill=distill.CRD(negatives=64))


@pytest.fixture(scope="module")
def whole(cluster, teacher, tmp_path_factory):
    """Where two workers train, what they trained without a stop, and each one's statistics of the first update."""
    stopped = tmp_path_factory.mktemp("whole") / "stopped"
    stopped.touch()
    where = Context(task=task(), source=teacher, seed=2**70)  # more than a generator takes
    network = train(captured(norm=True), where, replace(SAVED, hooks=(StopOnce(stopped),)))
    written = stopped.parent.glob("*.statistics")
    return where, network, [torch.load(path, weights_only=True) for path in written]


def test_workers_that_were_killed_go_on_to_the_same_bits(whole, tmp_path):
    where, network, _ = whole
    where, stopping = replace(where, folder=tmp_path), replace(SAVED, hooks=(StopOnce(tmp_path / "stopped"),))
    with raises_case(TrainingError, "failed"):
        train(captured(norm=True), where, stopping)
    assert torch.load(tmp_path / "finetune.pt", weights_only=True)["numbers"][0] == 3
    again = train(captured(norm=True, seed=5), where, stopping)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_statistics_of_batch_norms_are_those_of_parts_and_are_averaged(whole):
    *_, statistics = whole
    network, (x, _) = captured(norm=True), task().train[0]
    with torch.no_grad():
        parts = [network.conv(part).mean((0, 2, 3)) for part in (x[:17], x[17:])]
    averaged = 0.1 * torch.stack(parts).mean(0)
    assert len(statistics) == 2 and all(torch.allclose(own, averaged, atol=1e-6) for own in statistics)


def test_an_error_of_a_worker_is_told_as_it_is(cluster):
    settings = replace(SETTINGS, workers=2, cluster=cluster, clip=(), learning_rate=1e30)
    with raises_case(TrainingError, "loss-not-finite") as error:
        train(captured(), Context(task=task()), settings)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": 2}, "cluster"),
        ({"workers": 1.5, "cluster": "local"}, "workers"),
        ({"cluster": "local"}, "cluster"),
    ],
)
def test_settings_that_make_no_sense(wrong, name):
    with raises_setting(name):
        Finetune(**wrong)


def test_doubles_are_summed_as_doubles(tmp_path):
    distributed.init_process_group("gloo", init_method=(tmp_path / "at").as_uri(), rank=0, world_size=1)
    try:
        weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        weight.grad = torch.full((2,), 1 / 3, dtype=torch.float64)
        Group(0, 2).sum_gradients([weight])
    finally:
        distributed.destroy_process_group()
    assert torch.equal(weight.grad, torch.full((2,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet20", "bert", "lstm_tagger", "shufflenet_v2_x0_5"])
def test_a_network_is_the_same_in_another_process(name):
    import pickle

    torch.manual_seed(0)
    words = torch.randint(0, 40, (2, 10))
    if name == "bert":
        module, x = BERT(width=8, depth=2, heads=2, vocabulary=40, length=10, classes=3), words
    else:
        module, x = build(name), words if name == "lstm_tagger" else torch.rand(2, 3, 64, 64)
    network = capture_network(module.eval(), (x,))
    again = pickle.loads(pickle.dumps(Portable.of(network))).network()
    assert again.code == network.code
    assert [n.meta.get("site") for n in again.graph.nodes] == [n.meta.get("site") for n in network.graph.nodes]
    assert set(again.state_dict()) == set(network.state_dict())
    x = torch.cat([x, x, x[:1]])
    with torch.no_grad():
        one, two = network(x), again(x)
    assert all(
        torch.equal(a, b) for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (one, two)), strict=True)
    )
