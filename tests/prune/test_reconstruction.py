import copy

import pytest
import torch
from torch import nn

from penjing.analyze.coupling import couple
from penjing.errors import CalibrationError
from penjing.network.capture import capture_network
from penjing.prune import Channels, Magnitude
from penjing.prune.channels import remove
from penjing.prune.reconstruction import reconstructed
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task, calibration_calls
from tests.raises import raises_case


class Repeated(nn.Module):
    """Half of the first layer's channels are mixtures of the others: what reads them can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            mixing = torch.randn(4, 4)
            self.first.weight[4:] = torch.einsum("oi,ihwk->ohwk", mixing, self.first.weight[:4])

    def forward(self, x):
        return self.head(self.second(self.first(x)).relu().mean((2, 3)))


@pytest.fixture
def prepared():
    torch.manual_seed(1)
    task = Task(example=torch.zeros(2, 3, 12, 12), calibration=[torch.randn(16, 3, 12, 12) for _ in range(3)])
    network = capture_network(Repeated().eval(), *task.call())
    return Draft(network), Context(task=task, source=network)


def test_channels_that_others_can_stand_in_for_cost_nothing(prepared):
    draft, context = prepared
    coupling = couple(draft.network, context.task.call())
    removed = {"first": [4, 5, 6, 7]}
    before = copy.deepcopy(draft.network.state_dict())
    fitted_network = reconstructed(draft.network, coupling, removed, calibration_calls(context.task))
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        reference = draft.network(x)
        plain, fitted = (remove(d, coupling, removed).network(x) for d in (draft, Draft(fitted_network)))
    assert (fitted - reference).abs().max() < 0.02 * (plain - reference).abs().max()
    assert fitted_network.get_parameter("second.weight")[:, 4:].eq(0).all()
    assert all(torch.equal(a, before[n]) for n, a in draft.network.state_dict().items())


def test_pruning_with_reconstruction_is_nearer_to_the_source_and_passes_its_proof(prepared):
    draft, context = prepared
    x = torch.randn(20, 3, 12, 12)
    errors = {}
    for reconstruct in (False, True):
        step = Channels(macs=0.5, criterion="l2", round_to=1, reconstruct=reconstruct)
        pruned = step(draft, context)  # raises where it is not what the masked network gives
        with torch.no_grad():
            errors[reconstruct] = float((pruned.network(x) - draft.network(x)).square().mean())
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_of_few_samples_of_which_none_or_all_are_held_out(prepared, batch):
    draft, context = prepared
    coupling = couple(draft.network, context.task.call())
    x = torch.randn(12, 3, 12, 12)
    copies = [
        reconstructed(draft.network, coupling, {"first": [4, 5, 6, 7]}, [((part,), {}) for part in x.split(size)])
        for size in (12, batch)
    ]
    for whole, parts in zip(*(fitted.state_dict().values() for fitted in copies), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_zeros_that_are_to_stay_stay(prepared):
    draft, context = prepared
    sparse = Magnitude(sparsity=0.5)(draft, context)
    plain, fitted = (
        Channels(macs=0.5, criterion="l2", round_to=1, reconstruct=r)(sparse, context).network for r in (False, True)
    )
    assert {"second.weight", "head.weight"} <= set(sparse.sparse)
    for name in sparse.sparse:
        assert torch.equal(plain.get_parameter(name), fitted.get_parameter(name)), name


def test_it_needs_calibration_data(prepared):
    draft, context = prepared
    bare = Context(task=Task(example=context.task.example), source=draft.network)
    with raises_case(CalibrationError, "no-calibration"):
        Channels(macs=0.5, criterion="l2", reconstruct=True)(draft, bare)


def known(model, samples):
    """The task with these samples, the captured network, and what is coupled in it."""
    task = Task(example=torch.zeros(2, *samples.shape[1:]), calibration=[samples])
    network = capture_network(model, *task.call())
    return task, network, couple(network, task.call())


def test_layers_that_convolve_in_groups_keep_their_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()
    task, network, coupling = known(model, torch.randn(32, 3, 6, 6))
    removed = {"0": [0], "4": [1]}
    fitted = reconstructed(network, coupling, removed, calibration_calls(task))
    before, after = network.get_parameter("2.weight"), fitted.get_parameter("2.weight")
    assert after.eq(0).any() and torch.equal(after[after != 0], before[after != 0])
    assert not torch.equal(fitted.get_parameter("7.weight"), network.get_parameter("7.weight"))


@pytest.mark.parametrize("samples", [8, 16, 24, 48])
def test_few_samples_do_no_harm(samples):
    """Twice as many inputs as samples: fitted without a judge, the weights learn the samples by heart."""
    worse = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        task = Task(example=torch.zeros(2, 8), calibration=[torch.randn(samples, 8)])
        network = capture_network(model, *task.call())
        x, errors = torch.randn(500, 8), []
        for reconstruct in (False, True):
            step = Channels(channels=0.6, criterion="l2", scope="layer", round_to=1, reconstruct=reconstruct)
            with torch.no_grad():
                pruned = step(Draft(network), Context(task=task)).network
                errors.append(float((pruned(x) - network(x)).square().mean()))
        worse.append(errors[1] / errors[0])
    assert sum(worse) / len(worse) < 1.0, worse


def test_what_is_fitted_stands_behind_the_pruned_network():
    """Also behind operators that are not fitted: what goes is 0 there, as it is in the pruned network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()
    task, network, coupling = known(model, torch.randn(48, 3, 8, 8))
    removed = {"0": [0, 1, 2], "4": [0, 1]}
    fitted = reconstructed(network, coupling, removed, calibration_calls(task))
    x = task.calibration[0]
    pruned = remove(Draft(fitted), coupling, removed).network
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), fitted(x))
        plain = remove(Draft(network), coupling, removed).network(x)
        assert (pruned(x) - network(x)).square().mean() < 0.5 * (plain - network(x)).square().mean()


class Query(nn.Module):
    """A layer that reads one vector of its own, and inputs in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8))
        self.mix, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, xs):
        return self.b(torch.relu(self.a(xs[0] + xs[1] + self.mix(self.query))))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x).reshape(6, 2, 32)))


def test_nested_inputs_and_layers_without_samples():
    model = Query().eval()
    xs = [torch.randn(40, 8), torch.randn(40, 8)]
    task = Task(example=([x[:2] for x in xs],), calibration=[(xs,)])
    network = capture_network(model, *task.call())
    pruned = Channels(macs=0.5, criterion="l2", round_to=1)(Draft(network), Context(task=task)).network
    assert pruned.get_submodule("a").out_features < 32
    assert torch.isfinite(pruned(xs)).all()


def test_a_batch_that_does_not_vary_stays_whole():
    calibration = [torch.randn(12, 8) for _ in range(60)]
    task = Task(example=torch.zeros(12, 8), calibration=calibration, dynamic={})
    network = capture_network(Fixed().eval(), *task.call(), task.dynamic)
    small = Channels(macs=0.5, criterion="l2", round_to=1, reconstruct=True)(Draft(network), Context(task=task)).network
    assert small(calibration[0]).shape == (6, 2, 4)


def test_data_that_can_be_read_once_are_told_of_and_pruned_without(prepared):
    draft, context = prepared
    task = Task(example=context.task.example, calibration=iter(context.task.calibration))
    events = []
    once = Context(task=task, source=draft.network, events=lambda kind, **values: events.append((kind, values)))
    pruned = Channels(macs=0.5, criterion="jacobian", round_to=1)(draft, once)
    assert pruned.network.get_submodule("first").out_channels < 8
    assert any("without reconstruction" in v.get("text", "") for k, v in events if k == "warning")
