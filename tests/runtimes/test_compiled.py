"""`torch.compile`: what it computes in integers, and that it computes the plan."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from penjing import measure, runtimes
from penjing.errors import MissingDependency
from penjing.measure import time_limits
from penjing.runtimes import isolated
from tests.pairs import INTEGER_DB
from tests.raises import raises_case
from tests.tiny_networks import Case, export

pytestmark = pytest.mark.skipif(not runtimes.installed("torch-compile"), reason="there is no C++ compiler")


class OneChannel(nn.Module):
    """Convolutions without an integer form here: of one channel, at the input and further on, and over a sequence."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.squeeze = nn.Conv2d(6, 1, 1)
        self.widen = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.line = nn.Conv1d(4, 5, 3, padding=1)
        self.grouped = nn.Conv1d(5, 5, 3, dilation=2, groups=5)
        self.head = nn.Linear(5 * 32, 20)

    def forward(self, x):
        x = F.relu(self.squeeze(F.relu(self.stem(x))))
        x = F.relu6(self.widen(x)).flatten(2)
        return self.head(F.relu(self.grouped(F.relu(self.line(x)))).flatten(1))


class Encoder(nn.Module):
    """One layer of a transformer: the attention stays in floating point."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.mix = nn.Linear(16, 48)
        self.join = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        x = x + self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


CASES = {
    "one channel": (Case(OneChannel, ((1, 12, 12),), {}, ("output",)), {"squeeze", "head"}),
    "encoder": (Case(Encoder, ((7, 16),), {}, ("output",)), {"mix", "join", "up", "down"}),
}


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """``integers(name)``: an int8 artifact, a session of it, and the layers that are computed in integers."""
    opened = {}

    def get(name):
        if name not in opened:
            case, layers = CASES[name]
            artifact = export(case, "torch-compile", "int8", tmp_path_factory.mktemp("artifact"))
            opened[name] = artifact, runtimes.open_artifact(artifact.folder, 1), layers
        return opened[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_plan_in_integers_at_every_batch(integers, name):
    artifact, session, layers = integers(name)
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    assert {
        site for op in operators if op.precision == "int8" for site in op.sites if not site.startswith("/")
    } == layers
    for batch in (1, 2, 5):
        (answer,) = session.run(artifact.arrays(batch, seed=3))
        assert measure.parity([artifact.answers(batch, seed=3)], [[answer]], "planned").snr_db >= INTEGER_DB
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        session.run(artifact.arrays(2, seed=3))
    calls = Counter(event.name for event in seen.events() if event.name.startswith("onednn::q"))
    assert sum(calls.values()) == sum(operator.precision == "int8" for operator in operators) == len(layers)


def test_in_a_process_of_its_own_it_answers_the_same(integers):
    artifact, session, _ = integers("one channel")
    inputs = artifact.arrays(3, seed=5)
    (one,), (two,) = session.run(inputs), isolated.open_artifact(artifact.folder, 1).run(inputs)
    assert one.tobytes() == two.tobytes()


def test_opening_it_may_take_as_long_as_a_compiler_does(exported):
    compiled, plain = (
        time_limits.opening_s(exported("residual", n, "fp32").folder) for n in ("torch-compile", "torch")
    )
    assert compiled > plain + 600


def test_the_settings_of_torch_are_left_as_they_were(integers):
    integers("encoder")
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize("sets", [(), ("neon", "asimddp")])
def test_away_from_x86_it_offers_floating_point_alone(sets):
    assert runtimes.get("torch-compile").capabilities(sets).precisions == ("fp32",)


def test_without_a_compiler_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not runtimes.installed("torch-compile") and runtimes.installed("torch")
    with raises_case(MissingDependency, "no-compiler") as refusal:
        runtimes.get("torch-compile")
    assert "no-such-compiler" in refusal.value.got and "CXX" in refusal.value.remedy
