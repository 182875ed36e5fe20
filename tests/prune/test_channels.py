import subprocess
import sys

import pytest
import torch
from torch import nn

from penjing.analyze.cost import cost, totals
from penjing.analyze.coupling import couple
from penjing.distill import DKD
from penjing.errors import CheckpointError, PruningError, RecipeError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.prune import Blocks, Channels, Gradual, Magnitude, Wanda, channels, criteria
from penjing.quantize import QAT
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune
from tests.analyze.dynamic_kernels import KERNELS
from tests.analyze.gates_and_heads import CASES
from tests.analyze.topologies import Attention, Residual, Shuffle, scattered
from tests.prune.wide import TASK, Wide, draft, images, left
from tests.raises import raises_case, raises_setting


@pytest.fixture(scope="module")
def wide():
    return draft(Wide())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("unit", "what"), [("macs", "macs"), ("params", "parameters"), ("size", "weight_bytes")])
def test_a_target_is_met_as_counted_on_the_pruned_network(wide, unit, what, scope):
    pruned = Channels(**{unit: 0.5}, criterion="l2", scope=scope, round_to=1)(wide, Context(task=TASK))
    assert 0.44 < left(wide, pruned, what) <= 0.5 + (0.01 if unit == "size" else 0)


def test_a_share_of_channels_of_every_layer(wide):
    pruned = Channels(channels=0.5, criterion="l1", scope="layer", round_to=1)(wide, Context(task=TASK))
    assert [pruned.network.get_submodule(n).out_channels for n in "abc"] == [16, 24, 12]


def test_channels_come_in_multiples(wide):
    pruned = Channels(macs=0.5, round_to=8)(wide, Context(task=TASK))
    widths = [pruned.network.get_submodule(n).out_channels for n in "abc"]
    assert [n % multiple for n, multiple in zip(widths, (8, 8, 4), strict=True)] == [0, 0, 0]  # 24 are too few for 8


def test_what_is_left_agrees_with_the_masked_network_and_says_by_how_much(wide):
    told = {}
    context = Context(task=TASK, events=lambda kind, **values: told.update({kind: values}))
    Channels(macs=0.5)(wide, context)
    assert told["pruned"]["disagreement"] < 1e-5
    assert told["pruned"]["units"] > 20


def test_a_network_that_does_not_agree_is_never_given_back(wide, monkeypatch):
    monkeypatch.setattr(channels, "disagreement", lambda *_: 0.2)
    with raises_case(PruningError, "disagrees"):
        Channels(macs=0.5)(wide, Context(task=TASK))


def test_widths_under_norms_go_only_where_that_is_asked_for():
    transformer = draft(Attention())
    context = Context(task=TASK)
    exact = Channels(channels=0.5, scope="layer", round_to=1)(transformer, context)
    assert exact.network.norm.normalized_shape == (16,)
    assert exact.network.qkv.out_features == 24
    assert exact.network.up.out_features == 10
    less = Channels(channels=0.5, scope="layer", round_to=1, approximate=True)(transformer, context)
    assert less.network.norm.normalized_shape == (8,)


def test_a_layer_that_reads_few_channels_keeps_one():
    shuffled = draft(Shuffle())
    pruned = Channels(channels=0.35, criterion="random", min_keep=0, round_to=1)(shuffled, Context(task=TASK))
    assert all(block.in_channels >= 1 for block in pruned.network.blocks.children())


def test_layers_that_are_named_stay_whole(wide):
    pruned = Channels(macs=0.6, keep=("b",))(wide, Context(task=TASK))
    assert pruned.network.b.out_channels == 48
    assert pruned.network.a.out_channels < 32


def test_a_latency_is_aimed_at_by_measuring(wide):
    calls = []

    def latency(drafts, precision):
        calls.append(precision)
        return [totals(cost(d.network, TASK.call())).macs / 1e4 for d in drafts]

    step = Channels(latency=0.6, criterion="l2", round_to=1)
    pruned = step(wide, Context(task=TASK, latency=latency))
    assert step.per_runtime and not Channels(macs=0.5).per_runtime
    assert left(wide, pruned, "macs") <= 0.6
    assert set(calls) == {"fp32"}
    with raises_case(PruningError, "no-runtime"):
        step(wide, Context(task=TASK))


def test_a_target_out_of_reach_says_how_far_it_got_and_why(wide):
    with raises_case(PruningError, "unreachable") as caught:
        Channels(macs=0.05, min_keep=0.5)(wide, Context(task=TASK))
    assert "macs=0.05" in caught.value.got and "min_keep=0.5" in caught.value.remedy
    assert "out.weight:0" in caught.value.remedy


def test_a_network_without_free_channels_is_refused():
    single = Draft(capture_network(nn.Linear(4, 2), (torch.randn(2, 4),)))
    with raises_case(PruningError, "nothing-to-prune"):
        Channels(macs=0.5)(single, Context(task=Task(example=torch.zeros(1, 4))))


@pytest.mark.parametrize(
    "settings",
    [
        {"macs": 0}, {"macs": 1.2}, {"channels": -0.1}, {"min_keep": 1}, {"criterion": "magic"}, {"scope": "some"},
        {"round_to": 0}, {"batches": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings):
    (name,) = settings
    with raises_setting(name):
        Channels(**settings, **({} if name in channels.UNITS else {"macs": 0.5}))


@pytest.mark.parametrize("targets", [{}, {"macs": 0.5, "params": 0.5}])
def test_there_is_one_target(targets):
    with raises_case(RecipeError, "one-target") as caught:
        Channels(**targets)
    assert all(name in caught.value.got for name in targets)


def test_a_layer_that_does_not_exist_gets_the_nearest_name(wide):
    with raises_case(RecipeError, "no-layer") as caught:
        Channels(macs=0.5, keep=("nrm",))(wide, Context(task=TASK))
    assert caught.value.got == "nrm" and "norm" in caught.value.remedy


@pytest.mark.parametrize("criterion", ["auto", "l2"])
def test_auto_takes_what_the_task_has(criterion):
    step, bare = Channels(macs=0.5, criterion=criterion), Task(example=images(1))
    tasks = (TASK, Task(example=images(1), calibration=[images(2)]), bare)
    chosen = [criteria.for_context(step.criterion, Context(task=t)) for t in tasks]
    assert chosen == (["taylor", "jacobian", "l2"] if criterion == "auto" else ["l2"] * 3)


LOADING = """
import sys, torch
sys.path[:0] = {paths}
from penjing.storage.checkpoint import restore
from tests.prune.wide import TASK, images
from tests.analyze.topologies import {model}
draft = restore({folder!r}, {model}(), TASK)
with torch.no_grad():
    torch.save(draft.network(images(3, seed=9)), {out!r})
"""


@pytest.mark.parametrize("model", [Residual, Shuffle, Attention])
def test_another_process_rebuilds_it_from_the_factory_to_the_bit(model, tmp_path):
    pruned = Channels(channels=0.6, criterion="random", round_to=1)(draft(model()), Context(task=TASK))
    checkpoint.save(pruned, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"edits.json", "plan.json", "weights.safetensors"}
    out = str(tmp_path / "out.pt")
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"  # sums come in another order on others
    code += LOADING.format(paths=sys.path, model=model.__name__, folder=str(tmp_path), out=out)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(out, weights_only=True), pruned.network(images(3, seed=9)))


def test_a_factory_that_has_changed_is_named(tmp_path):
    pruned = Channels(macs=0.6, criterion="l2")(draft(Residual()), Context(task=TASK))
    checkpoint.save(pruned, tmp_path)

    class Changed(Residual):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 6, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.b = nn.Conv2d(6, 8, 1)

    with raises_case(CheckpointError, "misfit"):
        checkpoint.restore(tmp_path, Changed(), TASK)


def test_removing_nothing_is_no_edit(wide):
    assert Channels(macs=1)(wide, Context(task=TASK)).edits == ()
    assert couple(wide.network, TASK.call()).edits({}) == ()


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: Channels(macs=50), 0.5),
        (lambda: Channels(latency="30%"), 0.3),
        (lambda: Channels(macs=0.5, min_keep=10), 0.1),
        (lambda: Blocks(macs=75), 0.75),
        (lambda: Magnitude(sparsity=90), 0.9),
        (lambda: Wanda(sparsity="50%"), 0.5),
        (lambda: Gradual(step=Magnitude(sparsity=0.5), finetune=Finetune(), end=80), 0.8),
        (lambda: QAT(freeze_norms=70), 0.7),
        (lambda: Finetune(warmup=5), 0.05),
        (lambda: DKD(warmup=10), 0.1),
    ],
)
def test_percent_in_the_place_of_a_fraction_is_told(make, meant):
    with raises_case(RecipeError, "settings") as error:
        make()
    assert error.value.remedy.startswith(f"did you mean {meant:g}?")


@pytest.mark.parametrize("wrong", [-1, 0, 101, "half", True, float("nan")])
def test_other_numbers_have_no_such_remedy(wrong):
    with raises_setting("macs") as error:
        Channels(macs=wrong)
    assert error.value.remedy is None


@pytest.mark.parametrize("name", ["maxout", "glu", "torch attention", "gate by slices"])
def test_gates_maxout_units_and_heads_are_pruned_by_the_step(name):
    torch.manual_seed(0)
    make, example, _ = CASES[name]
    x = example()
    task = Task(example=x, calibration=[torch.cat([x] * 8) + torch.randn(16, *x.shape[1:])])
    network = capture_network(scattered(make()), (x,))
    pruned = Channels(channels=0.6, round_to=1)(Draft(network), Context(task=task)).network
    assert sum(p.numel() for p in pruned.parameters()) < 0.9 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", ["mixed", "flat, with biases", "in groups", "depthwise", "made by a layer"])
def test_kernels_of_every_sample_are_pruned_by_the_step_and_run_in_the_runtimes(name, tmp_path):
    torch.manual_seed(0)
    make, example, _ = KERNELS[name]
    task = Task(example=example(), calibration=[torch.randn(16, 3, 8, 8)])
    before = Draft(capture_network(scattered(make()), (example(),)))
    pruned = Channels(macs=0.5, round_to=1)(before, Context(task=task))
    macs = [totals(cost(draft.network, task.call())).macs for draft in (before, pruned)]
    assert macs[1] <= 0.5 * macs[0]
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        answer = pruned.network(x)
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(pruned, runtime, "fp32", task, flatten_outputs(answer)[1], folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        torch.testing.assert_close(torch.from_numpy(predict(x.numpy())), answer, rtol=1e-4, atol=1e-5)
