"""`pj.apply` → a loop of one's own → `pj.deliver`: gradients for everyone, and the artifact that was trained."""

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import SourceError, TaskError
from penjing.pipeline.applied import drafted
from penjing.pipeline.verify import verify
from penjing.records.folder import ARTIFACT
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.sources.source import open_source
from penjing.steps.plan import Entry, QuantSpec
from penjing.surgery import FakeQuantize, insert
from penjing.tasks.opening import open_task
from tests.raises import raises_case

STATIC = pj.Recipe(pj.quantize.Static())


@pytest.fixture(scope="module")
def task(digits_task):
    return open_task(digits_task)


@pytest.fixture(scope="module")
def network(digits_source):
    return open_source(digits_source).module.eval()


def trained(module, task, steps=12, rate=0.02):
    """A loop of one's own."""
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    module.train()
    losses = []
    while len(losses) < steps:
        for x, y in task.train:
            loss = task.loss(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    module.eval()
    return losses


class TestGradients:
    def test_what_lies_in_the_range_passes_and_what_is_cut_off_does_not(self):
        spec = QuantSpec(bits=4, signed=False, symmetric=False)  # integers 0 to 15, zero point 3: from -0.3 to 1.2
        quantizer = FakeQuantize(Entry(spec, (0.1,), (3,)))
        x = torch.tensor([-0.9, -0.36, -0.29, 0.0, 0.512, 1.24, 1.26, 5.0], requires_grad=True)
        weight = torch.arange(1.0, 9)
        (quantizer(x) * weight).sum().backward()
        assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]
        with torch.no_grad():
            assert torch.equal(quantizer(x), quantizer(x.detach()))

    def test_with_a_scale_for_every_channel(self):
        quantizer = FakeQuantize(Entry(QuantSpec(bits=4, axis=0), (0.1, 1.0), (0, 0)))
        x = torch.tensor([[0.5, 0.9], [0.5, 9.0]], requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad.tolist() == [[1, 0], [1, 0]]

    def test_a_range_taken_at_run_time_cuts_nothing_off(self):
        spec = QuantSpec(signed=False, symmetric=False, range="dynamic")
        x = torch.randn(4, 5, requires_grad=True)
        FakeQuantize(Entry(spec))(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(4, 5))

    def test_bfloat16_keeps_all_integers_of_8_bits(self):
        x = torch.arange(256.0).to(torch.bfloat16).requires_grad_()
        y = FakeQuantize(Entry(QuantSpec(signed=False, symmetric=False), (1.0,), (0,)))(x)
        assert torch.equal(y, x.float()) and y.dtype == torch.float32


class Tagger(nn.Module):
    """(batch, length, 6) to (batch, 4): recurrent, attention, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.frozen(self.twice(torch.relu(self.twice(x)))).mean(1))


@pytest.mark.parametrize("learn_ranges", [False, True])
@pytest.mark.parametrize("step", [pj.quantize.Static(), pj.quantize.Dynamic()])
def test_everyone_who_had_gradients_has_them_behind_quantizers(step, learn_ranges):
    torch.manual_seed(0)
    source = Tagger().eval()
    x = torch.randn(32, 5, 6)
    task = pj.Task(example=x[:1], calibration=[x])
    module = pj.apply(pj.Recipe(step), source, task, learn_ranges=learn_ranges).train()
    assert any(isinstance(part, FakeQuantize) for part in module.modules())
    module(x).square().sum().backward()
    names = module.meta["renamed"]
    parameters = {names.get(name, name): p for name, p in module.named_parameters() if "quantizers" not in name}
    assert set(parameters) == {name for name, _ in source.named_parameters()}
    for name, parameter in source.named_parameters():
        assert parameters[name].requires_grad == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameters[name].grad.abs().sum() > 0, name
    learned = [name for name, _ in module.named_parameters() if "quantizers" in name]
    assert bool(learned) == learn_ranges


@pytest.fixture(scope="module")
def module(network, task):
    recipe = pj.Recipe(pj.prune.Channels(macs=0.6), pj.quantize.Static())
    trainable = pj.apply(recipe, network, task, runtime="onnxruntime")
    losses = trained(trainable, task)
    assert losses[-1] < losses[0]
    return trainable


@pytest.fixture(scope="module")
def result(module, network, task, tmp_path_factory):
    return pj.deliver(
        module, task, "minimize size_bytes, drop<=3%", reference=network, runtime="onnxruntime",
        out=tmp_path_factory.mktemp("way") / "back", seconds=0.05, threads=1,
    )  # fmt: skip


class TestTheWayBack:
    def test_the_artifact_computes_what_was_trained(self, module, result, task):
        assert result.met and result.record.chosen.precision == "int8"
        session = isolated.open_artifact(result.artifact, 1)
        x = task.calibration[0]
        with torch.no_grad():
            expected = module(x).numpy()
        answers = predictor(session, read_manifest(result.artifact))(x.numpy())
        assert 10 * np.log10(np.square(expected).sum() / np.square(expected - answers).sum()) > 60
        assert result.record.chosen.float_operators == {}

    def test_the_drop_is_against_the_reference_and_the_record_says_so(self, result, network):
        record = result.record
        of_network = record.reference
        assert of_network.name == "Net" and record.name == "Net"
        assert of_network.measured.parameters == sum(p.numel() for p in network.parameters())
        assert record.source.parameters < of_network.measured.parameters
        assert record.source.macs < 0.65 * of_network.measured.macs
        for candidate in record.candidates:
            assert candidate.drop == of_network.selected - candidate.measured.metric
        assert [next(iter(step)) for step in record.recipe] == ["prune.Channels", "quantize.Static"]
        assert (result.folder / "report.html").read_text(encoding="utf-8").count("<span>reference</span>") == 4

    def test_the_checkpoint_and_the_evidence_are_those_of_a_run(self, module, result, network, task):
        draft = pj.load_checkpoint(result.folder, network, task)
        x = task.calibration[0]
        with torch.no_grad():
            assert torch.equal(insert(draft.network, draft.plan)(x), module(x))
        assert not [check for check in verify(result.folder, task, seconds=0) if check.holds is False]
        resumed = pj.deliver(
            module, task, "minimize size_bytes, drop<=3%", reference=network, runtime="onnxruntime",
            out=result.folder, seconds=0.05, threads=1, resume=True,
        )  # fmt: skip
        assert resumed.record == result.record

    def test_a_draft_can_be_delivered_too(self, result, network, task, tmp_path):
        draft = pj.load_checkpoint(result.folder, network, task)
        again = pj.deliver(
            draft, task, "minimize size_bytes, drop<=3%", runtime="onnxruntime", out=tmp_path / "again",
            seconds=0.05, threads=1,
        )  # fmt: skip
        assert again.record.reference is None
        assert again.record.chosen.sha256 == result.record.chosen.sha256

    def test_copies_state_dicts_and_wrappers(self, module, network, task):
        recipe = pj.Recipe(pj.prune.Channels(macs=0.6), pj.quantize.Static())
        fresh = pj.apply(recipe, network, task, runtime="onnxruntime")
        x = task.calibration[0]
        assert not torch.equal(fresh(x), module(x))
        fresh.load_state_dict(module.state_dict())
        expected = drafted(module)
        for other in (fresh, copy.deepcopy(module), nn.DataParallel(module), torch.compile(module)):
            applied = drafted(other)
            assert applied.draft.plan == expected.draft.plan
            pairs = zip(applied.draft.network.state_dict().items(), module.state_dict().items(), strict=False)
            assert all(torch.equal(mine, module.state_dict()[name]) for (name, mine), _ in pairs)

    def test_a_copy_that_is_trained_leaves_the_original_as_it_was(self, module, task):
        before = {name: tensor.clone() for name, tensor in drafted(module).draft.network.state_dict().items()}
        other = copy.deepcopy(module)
        trained(other, task, steps=1, rate=0.1)
        after = drafted(module).draft.network.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not torch.equal(drafted(other).draft.network.state_dict()["head.weight"], before["head.weight"])


def test_learned_ranges_are_delivered(network, task, tmp_path):
    module = pj.apply(STATIC, network, task, runtime="onnxruntime", learn_ranges=True)
    before = drafted(module).draft.plan
    trained(module, task)
    after = drafted(module).draft.plan
    assert after.entries.keys() == before.entries.keys() and after != before
    result = pj.deliver(
        module, task, "minimize size_bytes", runtime="onnxruntime", out=tmp_path / "run", seconds=0.05, threads=1
    )
    x = task.calibration[0]
    with torch.no_grad():
        expected = module(x).numpy()
    session = isolated.open_artifact(result.folder / ARTIFACT, 1)
    answers = predictor(session, read_manifest(result.artifact))(x.numpy())
    assert 10 * np.log10(np.square(expected).sum() / np.square(expected - answers).sum()) > 40


def test_pruned_and_trained_networks_go_on_in_recipes_of_their_own(network, task, tmp_path):
    small = pj.apply(pj.Recipe(pj.prune.Channels(macs=0.6)), network, task)
    trained(small, task)
    result = pj.compress(
        small, task, "minimize size_bytes, drop<=3%", recipe=STATIC, reference=network, runtime="onnxruntime",
        out=tmp_path / "second", seconds=0.05, threads=1,
    )  # fmt: skip
    record = result.record
    assert record.reference.measured.macs > record.source.macs
    assert record.chosen.drop == record.reference.selected - record.chosen.measured.metric
    both = pj.apply(STATIC, small, task)
    assert [next(iter(step)) for step in drafted(both).recipe] == ["prune.Channels", "quantize.Static"]
    draft = drafted(both).draft
    assert {edit["edit"] for edit in draft.edits} >= {"slice", "fold"}


def test_agreement_is_with_the_reference_where_there_is_no_metric(network, task, tmp_path):
    bare = dataclasses.replace(task, evaluate=None, select=None)
    small = pj.apply(pj.Recipe(pj.prune.Channels(macs=0.4)), network, bare)
    result = pj.deliver(
        small, bare, "minimize size_bytes", reference=network, out=tmp_path / "run", seconds=0.05, threads=1
    )
    assert result.record.metric_name == "agreement with the reference"
    assert result.record.reference.measured.metric == 1
    assert result.record.source.metric < 1


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class TestRefusals:
    def refusal(self, code, module, task, tmp_path, use=pj.deliver):
        with raises_case(SourceError, code) as caught:
            use(module, task, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return caught.value

    def test_fake_quantizers_are_not_rounded_twice(self, network, task, tmp_path):
        module = pj.apply(STATIC, network, task)
        for given in (module, nn.DataParallel(module)):
            assert "pj.deliver" in self.refusal("applied", given, task, tmp_path, pj.compress).remedy
        with raises_case(SourceError, "applied"):
            pj.apply(STATIC, module, task)

    def test_what_apply_never_returned(self, network, task, tmp_path):
        assert "pj.compress" in self.refusal("not-applied", network, task, tmp_path).remedy
        error = self.refusal("not-applied", Wrapped(pj.apply(STATIC, network, task)), task, tmp_path)
        assert error.remedy == "give module.inner"

    def test_other_tensors_than_apply_gave(self, network, task, tmp_path):
        module = pj.apply(STATIC, network, task)
        nn.utils.parametrizations.weight_norm(module.body)
        assert "body.weight" in self.refusal("other-tensors", module, task, tmp_path).got

    def test_a_training_that_diverged(self, network, task, tmp_path):
        module = pj.apply(STATIC, network, task)
        with torch.no_grad():
            module.head.weight[0, 0] = float("nan")
        assert self.refusal("not-finite", module, task, tmp_path).got == "head.weight"
        module = pj.apply(STATIC, network, task, learn_ranges=True)
        with torch.no_grad():
            next(p for name, p in module.named_parameters() if "scale" in name).fill_(float("inf"))
        self.refusal("scale", module, task, tmp_path)


def test_integers_planned_for_another_runtime_are_told(network, task, tmp_path):
    module = pj.apply(STATIC, network, task, runtime="onnxruntime")
    result = pj.deliver(
        module, task, "minimize size_bytes", runtime="openvino", out=tmp_path / "run", seconds=0.05, threads=1
    )
    (told,) = [text for text in result.record.warnings if "were planned for" in text]
    assert "onnxruntime" in told and "runtime='openvino'" in told
    applied = drafted(module)
    assert applied.planned_for_another(["onnxruntime"]) is None
    assert drafted(pj.apply(STATIC, network, task)).planned_for_another(["openvino"]) is None


class Exiting:
    """Calibration data of a script that ends itself, as a metric may."""

    def __iter__(self):
        sys.exit(0)


def leaves(predict):
    sys.exit("enough")


@pytest.mark.parametrize("part", [{"evaluate": leaves}, {"calibration": Exiting(), "evaluate": None, "select": None}])
def test_code_that_ends_the_process_is_an_error_of_deliver(network, task, tmp_path, part):
    module = pj.apply(STATIC, network, task)
    with raises_case(TaskError, "raised" if "select" not in part else "exited") as caught:
        pj.deliver(module, dataclasses.replace(task, **part), out=tmp_path / "run", seconds=0.05, threads=1)
    assert "test_applied.py" in caught.value.got
