import sys

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze import meter, noise
from penjing.decompose import LowRank, cp, moments
from penjing.errors import CalibrationError, DecompositionError, MissingDependency, RecipeError
from penjing.network.capture import capture_network
from penjing.recipes.recipe import Recipe
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task, calibration_calls
from tests.raises import raises_case, raises_setting

pytest.importorskip("tensorly")


class Network(nn.Module):
    """Something of everything: a strided convolution, a 1×1, groups, a shared layer, a transposed one, and linears."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.point = nn.Conv2d(48, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.shared = nn.Conv2d(64, 64, 1)
        self.up = nn.ConvTranspose2d(64, 32, 2)
        self.wide, self.head = nn.Linear(32, 96), nn.Linear(96, 8)

    def forward(self, x):
        x = torch.relu(self.norm(self.down(torch.relu(self.stem(x)))))
        x = torch.relu(self.grouped(torch.relu(self.point(x))))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.head(torch.relu(self.wide(self.up(x).mean((2, 3)))))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    x = torch.randn(96, 3, 12, 12)
    task = Task(example=x[:2], calibration=list(x.split(24)))
    network = capture_network(Network(), *task.call())
    return Draft(network.eval()), task


def ran(prepared, step, **fields):
    draft, task = prepared
    events = {}
    context = Context(task=task, events=lambda kind, **values: events.update({kind: values}), **fields)
    return step(draft, context), events


def left(prepared, result, unit="macs"):
    draft, task = prepared
    return meter.amount(unit, result.network, task.call()) / meter.amount(unit, draft.network, task.call())


def snr_db(prepared, result):
    draft, task = prepared
    return noise.signal_to_noise(draft.network, result.network, list(calibration_calls(task)))


@pytest.mark.parametrize("unit", ["macs", "params", "size"])
def test_a_budget_is_met_and_hardly_undershot(prepared, unit):
    result, events = ran(prepared, LowRank(**{unit: 0.8}))
    assert 0.75 <= left(prepared, result, unit) <= 0.8
    assert events["decomposed"]["macs"] == pytest.approx(left(prepared, result))
    assert set(events["decomposed"]["layers"]) == {edit["layer"] for edit in result.edits}


def test_layers_that_can_not_be_decomposed_stay_and_the_reasons_are_told(prepared):
    result, events = ran(prepared, LowRank(energy=0.9))
    refused = events["decomposed"]["refused"]
    assert refused["grouped"] == "a convolution in 4 groups"
    assert refused["shared"] == "it is called several times, or shares its weights"
    assert refused["up"] == "a transposed convolution"
    draft, _ = prepared
    for name in refused:
        assert torch.equal(result.network.get_submodule(name).weight, draft.network.get_submodule(name).weight)


def test_every_layer_keeps_the_energy_that_is_asked_for(prepared):
    more, _ = ran(prepared, LowRank(energy=0.99, refit=False))
    less, _ = ran(prepared, LowRank(energy=0.6, refit=False))
    assert left(prepared, less) < left(prepared, more) <= 1
    assert snr_db(prepared, less) < snr_db(prepared, more)


def test_moments_of_the_inputs_and_the_refit_each_bring_the_outputs_closer(prepared):
    plain, moments, both = (
        snr_db(prepared, ran(prepared, LowRank(macs=0.8, methods=("svd", "tucker"), **settings))[0])
        for settings in ({"activations": False, "refit": False}, {"refit": False}, {})
    )
    assert plain < moments < both


def test_whole_layers_behind_decomposed_ones_are_refitted_where_that_is_asked_for(prepared):
    draft, _ = prepared
    ranks = {"down": (16, 16)}
    for refit in (False, True):
        as_they_were, _ = ran(prepared, LowRank(ranks=ranks, refit=refit))
        fitted, _ = ran(prepared, LowRank(ranks=ranks, refit=refit, reconstruct=True))
        assert snr_db(prepared, fitted) > snr_db(prepared, as_they_were) + 0.5
        old, new = (dict(d.network.named_parameters()) for d in (as_they_were, fitted))
        changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
        assert {"point", "wide"} <= changed <= {"point", "wide", "head"}
        assert all(torch.equal(old[name], p) for name, p in draft.network.named_parameters() if name in changed)


def test_whole_layers_that_are_sparse_or_shared_keep_their_weights(prepared):
    draft, task = prepared
    pruned = pj.prune.Magnitude(sparsity=0.5, layers=("wide",))(draft, Context(task=task))
    result, _ = ran((pruned, task), LowRank(ranks={"down": (16, 16)}, reconstruct=True))
    assert torch.equal(result.network.get_submodule("wide").weight, pruned.network.get_submodule("wide").weight)
    assert not torch.equal(result.network.get_submodule("head").weight, draft.network.get_submodule("head").weight)

    class Tied(Network):
        def forward(self, x):
            return super().forward(x) + self.wide.weight[:8].sum(1)

    torch.manual_seed(0)
    tied = Draft(capture_network(Tied(), *task.call()).eval())
    result, events = ran((tied, task), LowRank(ranks={"down": (16, 16)}, reconstruct=True))
    assert torch.equal(result.network.get_submodule("wide").weight, tied.network.get_submodule("wide").weight)
    assert "shares its weights" in events["decomposed"]["refused"]["wide"]


def test_without_data_it_works_on_the_weights_alone(prepared):
    draft, task = prepared
    bare = Task(example=task.example)
    result, events = ran((draft, bare), LowRank(macs=0.8))
    assert left(prepared, result) <= 0.8 and "warning" not in events
    with raises_case(CalibrationError, "no-calibration"):
        ran((draft, bare), LowRank(macs=0.8, activations=True))
    with raises_case(CalibrationError, "no-calibration"):
        ran((draft, bare), LowRank(macs=0.8, activations=False, refit=False, reconstruct=True))


def test_data_that_can_be_read_once_are_read_once(prepared):
    draft, task = prepared
    calls = [x for x in task.calibration]
    expected, _ = ran(prepared, LowRank(macs=0.8))
    result, events = ran((draft, Task(example=task.example, calibration=iter(calls))), LowRank(macs=0.8))
    assert "warning" not in events and result.edits == expected.edits
    assert torch.equal(result.network(task.example), expected.network(task.example))


class Classes(Network):
    def forward(self, x):
        return super().forward(x).argmax(1)


def test_outputs_that_are_classes_show_no_noise_and_layers_keep_their_own_energy(prepared):
    _, task = prepared
    torch.manual_seed(0)
    draft = Draft(capture_network(Classes(), *task.call()).eval())
    result, _ = ran((draft, task), LowRank(macs=0.8))
    assert result.edits and all(min(edit["ranks"]) > 1 for edit in result.edits)  # none at its smallest rank


def test_cp_is_used_where_it_is_asked_for(prepared):
    result, _ = ran(prepared, LowRank(macs=0.9, methods=("cp",)))
    assert {edit["form"] for edit in result.edits} == {"cp"}


def test_ranks_by_layer_are_taken_as_they_are(prepared):
    result, _ = ran(prepared, LowRank(ranks={"wide": 7, "down": (9, 10)}))
    assert [(e["layer"], e["form"], e["ranks"]) for e in result.edits] == [
        ("down", "tucker", [9, 10]), ("wide", "svd", [7]),
    ]  # fmt: skip
    both, _ = ran(prepared, LowRank(ranks={"down": (20,), "stem": (2, 8)}, methods=("tucker", "cp")))
    assert [(e["layer"], e["form"]) for e in both.edits] == [("stem", "tucker"), ("down", "cp")]


def test_full_rank_gains_nothing_and_is_refused(prepared):
    result, events = ran(prepared, LowRank(ranks={"wide": 32, "down": (9, 10)}))
    assert [e["layer"] for e in result.edits] == ["down"]
    assert events["decomposed"]["refused"]["wide"] == "svd 32 takes 1.33× its MACs and 1.33× its parameters"


def test_vbmf_finds_the_rank_that_was_planted(prepared):
    draft, task = prepared
    draft = draft.copy()
    torch.manual_seed(3)
    with torch.no_grad():
        weight = draft.network.get_submodule("wide").weight
        weight.copy_(torch.randn(96, 8) @ torch.randn(8, 32) + 0.3 * torch.randn(96, 32))
    result, _ = ran((draft, task), LowRank(ranks="vbmf", round_to=1))
    assert next(e["ranks"] for e in result.edits if e["layer"] == "wide") == [8]


def test_a_layer_whose_factors_take_longer_stays(prepared):
    """Every operator takes as long as any other, but the strided convolution: two are slower than one."""

    def profile(draft, _):
        layers = [str(n.target) for n in draft.network.graph.nodes if n.op == "call_module"]
        return [((name,), 9.0 if name == "down" and "down_in" not in layers else 1.0) for name in layers]

    def latency(drafts, _):
        return [meter.amount("macs", d.network, prepared[1].call()) for d in drafts]

    result, events = ran(prepared, LowRank(latency=0.72), latency=latency, profile=profile)
    assert LowRank(latency=0.72).per_runtime and not LowRank(macs=0.8).per_runtime
    assert [edit["layer"] for edit in result.edits] == ["down"]
    assert "ms, the layer" in events["decomposed"]["refused"]["point"]


def test_a_latency_budget_is_spent_on_the_layers_that_take_the_time(prepared):
    """A runtime whose time goes into the linear layer `wide`, a hundredth of all multiply-accumulates."""

    def milliseconds(network):
        sizes = {name: p.numel() for name, p in network.named_parameters() if p.dim() > 1}
        return {
            name.removesuffix(".weight"): size * (1 if name.startswith("wide") else 1e-4)
            for name, size in sizes.items()
        }

    def latency(drafts, _):
        return [sum(milliseconds(d.network).values()) for d in drafts]

    def profile(draft, _):
        return [((name,), ms) for name, ms in milliseconds(draft.network).items()]

    by_time, _ = ran(prepared, LowRank(latency=0.7), latency=latency, profile=profile)
    assert [edit["layer"] for edit in by_time.edits] == ["wide"]
    by_macs, _ = ran(prepared, LowRank(latency=0.7), latency=latency)
    assert len(by_macs.edits) > 1


def test_weights_that_were_pruned_lose_their_zeros_and_a_warning_says_so(prepared):
    draft, task = prepared
    pruned = pj.prune.Magnitude(sparsity=0.5)(draft, Context(task=task))
    _, events = ran((pruned, task), LowRank(macs=0.8))
    assert "zeros" in events["warning"]["text"]


def test_it_works_again_on_its_own_factors(prepared):
    once, _ = ran(prepared, LowRank(ranks={"wide": 16}))
    twice, _ = ran((once, prepared[1]), LowRank(ranks={"wide": 8}))
    assert twice.edits[: len(once.edits)] == once.edits
    assert twice.network.get_submodule("wide").weight.shape == (96, 8)


BAD = {
    "macs": ({"macs": 0}, {"macs": 1.2}, {"macs": "half"}),
    "energy": ({"energy": 0}, {"energy": 1.01}),
    "ranks": ({"ranks": "evbmf"}, {"ranks": {}}, {"ranks": {"wide": 0}}, {"ranks": {"wide": (1, "a")}}),
    "methods": ({"macs": 0.5, "methods": ()}, {"macs": 0.5, "methods": ("qr",)}),
    "round_to": ({"macs": 0.5, "round_to": 0},),
}


@pytest.mark.parametrize(("name", "settings"), [(name, s) for name, every in BAD.items() for s in every])
def test_settings_are_checked(name, settings):
    with raises_setting(name):
        LowRank(**settings)


@pytest.mark.parametrize("settings", [{}, {"macs": 0.5, "energy": 0.9}, {"params": 0.5, "ranks": "vbmf"}])
def test_there_is_one_way_of_choosing_ranks(settings):
    with raises_case(RecipeError, "one-target"):
        LowRank(**settings)


def test_what_does_not_fit_the_network_is_named(prepared):
    with raises_case(RecipeError, "rank") as caught:
        ran(prepared, LowRank(ranks={"wide": 33}))
    assert "wide" in caught.value.what and "32" in caught.value.expected
    for settings in ({"ranks": {"wyde": 3}}, {"macs": 0.8, "keep": ("wyde",)}, {"macs": 0.8, "layers": ("wyde",)}):
        with raises_case(RecipeError, "no-layer"):
            ran(prepared, LowRank(**settings))
    with raises_case(DecompositionError, "unreachable"):
        ran(prepared, LowRank(macs=0.01))
    with raises_case(DecompositionError, "nothing-to-decompose"):
        ran(prepared, LowRank(macs=0.5, layers=("grouped", "up")))


def test_a_recipe_holds_ranks_by_layer():
    recipe = Recipe(LowRank(ranks={"wide": 7, "down": (9, 10)}))
    assert Recipe.from_yaml(recipe.to_yaml()).to_data() == recipe.to_data()
    step = Recipe.from_yaml("- decompose.LowRank: {ranks: {down: [9, 10]}}").steps[0]
    assert step.ranks["down"] in ((9, 10), [9, 10])


def test_without_tensorly_svd_works_and_tucker_says_what_to_install(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly.backend", None)
    result, _ = ran(prepared, LowRank(energy=0.7, methods=("svd",)))
    assert result.edits
    with raises_case(MissingDependency, "not-installed") as caught:
        ran(prepared, LowRank(energy=0.7))
    assert "pip install" in caught.value.remedy


def test_the_backend_that_somebody_has_set_stays():
    tensorly = pytest.importorskip("tensorly")
    tensorly.set_backend("pytorch", local_threadsafe=True)
    tensorly.tenalg.set_backend("einsum", local_threadsafe=True)
    try:
        cp.factors(torch.randn(4, 3, 3, 3).double(), moments.plain(nn.Conv2d(3, 4, 3)), 2)
        assert (tensorly.get_backend(), tensorly.tenalg.get_backend()) == ("pytorch", "einsum")
    finally:
        tensorly.set_backend("numpy", local_threadsafe=True)
        tensorly.tenalg.set_backend("core", local_threadsafe=True)
