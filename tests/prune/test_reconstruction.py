import copy

import pytest
import torch
from torch import nn

from penjing.analyze.coupling import couple
from penjing.draft import Draft
from penjing.errors import CalibrationError
from penjing.network import raise_network
from penjing.prune import Channels, Magnitude
from penjing.prune.channels import remove
from penjing.prune.reconstruction import correction, reconstructed
from penjing.step import Context
from penjing.task import Task, calibration_calls


def test_the_correction_is_what_least_squares_over_all_rows_finds():
    torch.manual_seed(0)
    x, error = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    ridge = 0.1 * (x.T @ x).diagonal().mean()
    # The obvious way: the penalty as rows of their own.
    rows = torch.cat([x, ridge.sqrt() * torch.eye(7, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([error, torch.zeros(7, 3, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(correction(x.T @ x, error.T @ x, ridge=0.1), wanted)


def test_inputs_that_are_all_zeros_change_nothing():
    found = correction(torch.zeros(4, 4), torch.zeros(2, 4))
    assert torch.equal(found, torch.zeros(2, 4, dtype=torch.float64))


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
    network = raise_network(Repeated().eval(), *task.call())
    return Draft(network), Context(task=task, source=network)


def group_of(coupling, tensor):
    return next(n for n, g in coupling.groups.items() if any(m.tensor == tensor for m in g.members))


def test_channels_that_others_can_stand_in_for_cost_nothing(prepared):
    draft, context = prepared
    coupling = couple(draft.network, context.task.call())
    removed = {group_of(coupling, "first.weight"): [4, 5, 6, 7]}
    before = copy.deepcopy(draft.network.state_dict())
    made = reconstructed(draft.network, coupling, removed, calibration_calls(context.task))
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        wanted = draft.network(x)
        plain, fitted = (remove(d, coupling, removed).network(x) for d in (draft, Draft(made)))
    assert (fitted - wanted).abs().max() < 0.02 * (plain - wanted).abs().max()
    assert made.get_parameter("second.weight")[:, 4:].eq(0).all()
    assert all(torch.equal(a, before[n]) for n, a in draft.network.state_dict().items())


def test_pruning_with_reconstruction_is_nearer_to_the_source_and_passes_its_proof(prepared):
    draft, context = prepared
    x = torch.randn(20, 3, 12, 12)
    errors = {}
    for reconstruct in (False, True):
        step = Channels(macs=0.5, criterion="l2", round_to=1, reconstruct=reconstruct)
        made = step(draft, context)  # raises where it is not what the masked network gives
        with torch.no_grad():
            errors[reconstruct] = float((made.network(x) - draft.network(x)).square().mean())
        assert torch.equal(step(draft, context).network(x), made.network(x))
    assert errors[True] < 0.5 * errors[False]


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
    with pytest.raises(CalibrationError):
        Channels(macs=0.5, criterion="l2", reconstruct=True)(draft, bare)


def test_layers_that_convolve_in_groups_keep_their_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()
    task = Task(example=torch.zeros(2, 3, 6, 6), calibration=[torch.randn(32, 3, 6, 6)])
    network = raise_network(model, *task.call())
    coupling = couple(network, task.call())
    removed = {group_of(coupling, "0.weight"): [0, 3]}
    made = reconstructed(network, coupling, removed, calibration_calls(task))
    assert torch.equal(made.get_parameter("2.weight"), network.get_parameter("2.weight"))
    assert not torch.equal(made.get_parameter("4.weight"), network.get_parameter("4.weight"))
