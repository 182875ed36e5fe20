"""Networks that answer differently when they are asked twice, and those that only look as if they did."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import penjing as pj
from penjing.errors import ExportError, SourceError
from penjing.pipeline.inspection import inspect
from penjing.pipeline.repeatable import capture_repeatable
from penjing.sources.source import open_source
from tests.raises import raises_case


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.head(self.change(F.relu(self.body(x))))


class DropsOutAlways(Net):
    def change(self, x):
        return F.dropout(x, 0.5, training=True)


class DropsOutByItsOwnMode(Net):
    def build(self):
        self.drop = nn.Dropout(0.3)

    def train(self, mode=True):
        return super().train(True)

    def change(self, x):
        return self.drop(x)


class AddsNoise(Net):
    def change(self, x):
        return x + 0.1 * torch.rand(x.shape)


class DrawsWithAGeneratorOfItsOwn(Net):
    def build(self):
        self.generator = torch.Generator()

    def change(self, x):
        return x + torch.randn(x.shape, generator=self.generator)


class ScalesByNumPy(Net):
    def change(self, x):
        return x * float(np.random.rand())


class ScalesByRandom(Net):
    def change(self, x):
        return x * random.random()


class RemembersInABuffer(Net):
    def build(self):
        self.register_buffer("seen", torch.zeros(16))

    def change(self, x):
        self.seen = 0.9 * self.seen + x.mean(0)
        return x + self.seen


class RemembersInPlace(RemembersInABuffer):
    def change(self, x):
        self.seen.add_(x.mean(0))
        return x + self.seen


class RemembersInAnAttribute(Net):
    def build(self):
        self.last = None

    def change(self, x):
        before, self.last = self.last, x.detach()
        return x if before is None else x + before


class CountsItsCalls(Net):
    def build(self):
        self.calls = 0

    def change(self, x):
        self.calls += 1
        return x * self.calls


class FillsAList(Net):
    def build(self):
        self.history = []

    def change(self, x):
        self.history.append(x.mean())
        return x * len(self.history)


RANDOM = {
    DropsOutAlways: ("bernoulli_", "test_repeatable.py"),
    DropsOutByItsOwnMode: ("bernoulli_ in drop", "test_repeatable.py"),
    AddsNoise: ("rand (test_repeatable.py",),
    DrawsWithAGeneratorOfItsOwn: ("randn (test_repeatable.py",),
    ScalesByNumPy: ("random numbers from numpy",),
    ScalesByRandom: ("random numbers from random",),
}
REMEMBERING = {
    RemembersInABuffer: "seen",
    RemembersInPlace: "seen",
    RemembersInAnAttribute: "last",
    CountsItsCalls: "calls",
    FillsAList: "history",
}


def task(**parts):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 16, generator=generator) for _ in range(4)]
    return pj.Task(example=torch.zeros(2, 16), **{"calibration": batches, **parts})


def captured(network, given=None):
    return capture_repeatable(open_source(network), given or task())


def everything(network):
    """All that a module holds, copied."""
    tensors = {name: t.clone() for name, t in network.state_dict().items()}
    return tensors, {k: repr(v) for k, v in vars(network).items() if not k.startswith("_")}


@pytest.mark.parametrize("cls", RANDOM, ids=lambda cls: cls.__name__)
def test_random_numbers_are_found_by_name_and_line(cls):
    torch.manual_seed(0)
    with raises_case(SourceError, "unrepeatable") as caught:
        captured(cls())
    assert all(word in caught.value.got for word in RANDOM[cls])
    assert "in eval mode" in caught.value.remedy


@pytest.mark.parametrize("cls", REMEMBERING, ids=lambda cls: cls.__name__)
def test_state_is_found_by_its_name_and_the_remedy_is_to_pass_it(cls):
    with raises_case(SourceError, "unrepeatable") as caught:
        captured(cls())
    assert f"changes {REMEMBERING[cls]}" in caught.value.got
    assert f"make {REMEMBERING[cls]} an input and an output" in caught.value.remedy


@pytest.mark.parametrize("cls", [*RANDOM, *REMEMBERING], ids=lambda cls: cls.__name__)
def test_the_network_and_the_generators_are_afterwards_as_they_were(cls):
    network = cls()
    before, numbers, plain = everything(network), torch.get_rng_state(), random.getstate()
    with raises_case(SourceError, "unrepeatable"):
        captured(network)
    after = everything(network)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and before[1] == after[1]
    assert torch.equal(numbers, torch.get_rng_state()) and plain == random.getstate()


def test_a_state_that_an_example_of_zeros_does_not_show_is_found():
    with raises_case(SourceError, "unrepeatable"):
        captured(RemembersInPlace(), task(calibration=None))


@pytest.mark.parametrize("cls", [DropsOutAlways, RemembersInABuffer], ids=lambda cls: cls.__name__)
def test_every_door_refuses_it(cls, tmp_path):
    with raises_case(SourceError, "unrepeatable"):
        pj.compress(cls(), task(), "minimize size_bytes", out=tmp_path / "run", seconds=0.01, threads=1)
    assert not (tmp_path / "run" / "record.json").exists()
    with raises_case(SourceError, "unrepeatable"):
        pj.apply(pj.Recipe(pj.quantize.Static()), cls(), task())
    with raises_case(SourceError, "unrepeatable"):
        inspect(open_source(cls()), task())


def test_an_exported_program_is_asked_twice_too():
    program = torch.export.export(RemembersInABuffer().eval(), (torch.zeros(2, 16),))
    with raises_case(SourceError, "unrepeatable") as caught:
        captured(program)
    assert "seen" in caught.value.got


class Leaky(Net):
    def build(self):
        self.act = nn.LeakyReLU()

    def change(self, x):
        return self.act(x)


class CountsForItsOwner(Net):
    """A counter that no answer depends on."""

    def build(self):
        self.calls = 0
        self.register_buffer("batches", torch.tensor(0))

    def change(self, x):
        self.calls += 1
        self.batches += 1
        return x


class NormsWithoutStatistics(Net):
    def build(self):
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)

    def change(self, x):
        return self.norm(x)


class WritesIntoItsInput(Net):
    def forward(self, x):
        x += 1
        return self.head(self.body(x))


class SumsNoisily(Net):
    """What kernels that add in another order at every call do."""

    def build(self):
        self.calls = 0

    def change(self, x):
        self.calls += 1
        return x * (1 + 1e-6 * (self.calls % 2))


@pytest.mark.parametrize(
    "cls", [Leaky, CountsForItsOwner, NormsWithoutStatistics, WritesIntoItsInput, SumsNoisily], ids=lambda c: c.__name__
)
def test_what_answers_alike_passes_and_stays_as_it_was(cls):
    network = cls()
    before = everything(network)
    x = torch.randn(3, 16)
    assert torch.allclose(captured(network)(x.clone()), network.eval()(x.clone()), rtol=1e-4, atol=1e-5)
    network = cls()
    captured(network)
    assert everything(network)[1] == before[1]


def test_a_randomized_leak_is_a_fixed_one_in_eval_mode():
    network = Leaky()
    network.act = nn.RReLU()
    x = torch.randn(3, 16)
    try:
        output = captured(network)(x)
    except ExportError:
        return  # refused by the exporter: another matter than answering twice
    assert torch.allclose(output, network.eval()(x), atol=1e-6)


class Encoder(nn.Module):
    """In eval mode torch's fast path gives zeros where the inputs are padded, and no exported form does."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding, self.layers = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2)

    def forward(self, ids, padded):
        return self.layers(self.embedding(ids), src_key_padding_mask=padded)


def test_torchs_fast_path_is_not_held_against_padded_places():
    padded = torch.stack([torch.arange(9) >= 9 - i % 5 for i in range(8)])
    data = (torch.randint(0, 30, (8, 9)), padded)
    enabled = torch.backends.mha.get_fastpath_enabled()
    captured(Encoder(), pj.Task(example=tuple(x[:2] for x in data), calibration=[data]))
    assert torch.backends.mha.get_fastpath_enabled() == enabled


class AsksWhetherItIsExported(Net):
    def build(self):
        self.other = nn.Linear(16, 16)

    def change(self, x):
        return self.other(x) if torch.compiler.is_exporting() else x


def test_an_export_of_something_else_is_refused_with_the_decibels():
    with raises_case(ExportError, "another-network") as caught:
        captured(AsksWhetherItIsExported())
    assert "dB" in caught.value.got and "head" in caught.value.got


def test_a_weight_that_is_not_a_number_is_found_at_the_door(tmp_path):
    network = Leaky()
    with torch.no_grad():
        network.body.weight[0, 0] = float("nan")
    for open_door in (
        lambda: pj.compress(network, task(), "minimize size_bytes", out=tmp_path / "run", seconds=0.01, threads=1),
        lambda: pj.apply(pj.Recipe(pj.prune.Channels(channels=0.5)), network, task()),
        lambda: captured(network, task(calibration=None)),
    ):
        with raises_case(SourceError, "weight-not-finite") as caught:
            open_door()
        assert "body.weight" in caught.value.what and "1 of 256" in caught.value.got


class Overflows(Net):
    def change(self, x):
        return torch.log(x - 1)


class MasksItsAnswers(Net):
    def forward(self, x):
        return self.head(self.body(x)).masked_fill(torch.tensor([False, True, False, False]), float("-inf"))


def test_answers_that_are_not_numbers_are_refused_and_a_mask_passes():
    with raises_case(SourceError, "answer-not-finite"):
        captured(Overflows())
    assert captured(MasksItsAnswers())(torch.randn(2, 16))[:, 1].isneginf().all()
