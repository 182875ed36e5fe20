import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.coupling import couple
from penjing.network.capture import capture_network
from penjing.prune import criteria
from penjing.prune.by_curvature import diagonal
from penjing.prune.scoring import Evidence
from penjing.steps.step import Context
from penjing.tasks.task import Task

TORCH = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 3, generator=TORCH), torch.randint(0, 2, (16,), generator=TORCH)


def evidence(model, batches=400):
    task = Task(example=X[:2], calibration=[X], train=[(X, Y)] * batches, loss=F.cross_entropy)
    network = capture_network(model.eval(), (X[:2],))
    return Evidence(network=network, context=Context(task=task), batches=batches, seed=0)


def whole_diagonal(network, name):
    """Slow and sure: every second derivative."""
    parameter = network.get_parameter(name)
    others = {k: v.detach() for k, v in network.named_parameters()}

    def loss(value):
        return F.cross_entropy(torch.func.functional_call(network, {**others, name: value}, (X,)), Y)

    matrix = torch.autograd.functional.hessian(loss, parameter.detach())
    return matrix.reshape(parameter.numel(), parameter.numel()).diagonal().reshape(parameter.shape)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_the_estimate_is_the_diagonal_of_the_hessian():
    read = evidence(small(), batches=4000)
    estimates = diagonal(read, ("0.weight", "2.weight"))
    for name, value in estimates.items():
        exact = whole_diagonal(read.network, name)
        assert (value - exact).abs().max() < 0.25 * exact.abs().max()  # 4000 draws of signs


def test_a_weight_scores_half_its_square_by_the_curvature():
    read = evidence(small(), batches=3)
    scores = criteria.score_weights("hessian", read.network, {"0": read.network.get_submodule("0")}, read.context, 3)
    curvature = diagonal(Evidence(network=read.network, context=read.context, batches=3, seed=0), ("0.weight",))
    expected = read.network.get_parameter("0.weight").detach() ** 2 * curvature["0.weight"].clamp(min=0) / 2
    assert torch.equal(scores["0"], expected) and scores["0"].max() > 0


def test_a_unit_that_the_loss_does_not_bend_for_scores_least():
    model = small()
    with torch.no_grad():
        model[2].weight[:, 1] = 0.0  # nothing reads the second unit
        model[0].weight[1] *= 1e-3
    read = evidence(model, batches=50)
    coupling = couple(read.network, read.context.task.call())
    scores = criteria.score_units("hessian", read.network, coupling, read.context, 50)["0"]
    assert scores.argmin() == 1


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0])


@pytest.mark.parametrize("model", [Attends, lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))])
def test_networks_with_fused_kernels_and_kinks_are_scored(model):
    torch.manual_seed(0)
    read = evidence(model(), batches=2)
    names = tuple(name for name, _ in read.network.named_parameters() if name.endswith("weight"))
    assert all(value.isfinite().all() for value in diagonal(read, names).values())
