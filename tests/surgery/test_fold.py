import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.architectures import build
from penjing.errors import CheckpointError
from penjing.network.capture import capture_network
from penjing.network.graph import kind
from penjing.surgery import fold_batch_norms, replay
from penjing.surgery.fold import fold_batch_norm
from tests.raises import raises_case


def with_statistics(model, seed=0):
    """Batch norms as after a training, with every number of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.track_running_stats:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def captured(model, *shape, dtype=torch.float32):
    return capture_network(with_statistics(model), (torch.zeros(1, *shape),)).to(dtype)


def kinds(network):
    return [kind(network, n) for n in network.graph.nodes if n.op in ("call_module", "call_function")]


PAIRS = {
    "conv1d": (lambda: [nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)], (3, 9)),
    "conv2d": (lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)], (3, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (2, 4, 4, 4)),
    "no bias": (lambda: [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)], (3, 9, 9)),
    "no affine": (lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)], (3, 9, 9)),
    "large eps": (lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=0.5)], (3, 9, 9)),
    "depthwise": (lambda: [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], (4, 9, 9)),
    "grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)], (4, 9, 9)),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 5, 3, stride=2), nn.BatchNorm2d(5)], (3, 4, 4)),
    "transposed in groups": (lambda: [nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)], (6, 4, 4)),
    "linear": (lambda: [nn.Linear(7, 5), nn.BatchNorm1d(5)], (7,)),
    "linear, no bias": (lambda: [nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5)], (7,)),
    "twice in a row": (lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)], (3, 9, 9)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_folded_network_computes_the_same(name, dtype, tolerance):
    torch.manual_seed(0)
    layers, shape = PAIRS[name]
    network = captured(nn.Sequential(*layers()), *shape, dtype=dtype)
    folded = copy.deepcopy(network)
    edits = fold_batch_norms(folded)
    assert len(edits) == len(list(nn.Sequential(*layers()))) - 1
    assert "batch_norm" not in kinds(folded)
    assert not any("running" in key for key in folded.state_dict())
    x = torch.randn(4, *shape, dtype=dtype)
    torch.testing.assert_close(folded(x), network(x), rtol=tolerance, atol=tolerance)


def test_the_formula_number_by_number():
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    conv, bn = model.requires_grad_(False)
    network = capture_network(model, (torch.zeros(1, 2, 4, 4),)).double()
    fold_batch_norms(network)
    new = network.get_submodule("0")
    for o in range(3):
        factor = float(bn.weight[o]) / (float(bn.running_var[o]) + bn.eps) ** 0.5
        for i in range(2):
            assert float(new.weight[o, i]) == pytest.approx(float(conv.weight[o, i]) * factor, rel=1e-12)
        expected = (float(conv.bias[o]) - float(bn.running_mean[o])) * factor + float(bn.bias[o])
        assert float(new.bias[o]) == pytest.approx(expected, rel=1e-12)


def test_resnet20_folds_whole_and_still_trains():
    torch.manual_seed(0)
    network = captured(build("resnet20"), 3, 16, 16, dtype=torch.float64)
    folded = copy.deepcopy(network)
    edits = fold_batch_norms(folded)
    assert len(edits) == 21
    assert all(set(edit) == {"edit", "layer", "norm"} and edit["edit"] == "fold" for edit in edits)
    x = torch.randn(2, 3, 16, 16).double()
    torch.testing.assert_close(folded(x), network(x), rtol=1e-11, atol=1e-11)
    folded.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


class Odd(nn.Module):
    """One layer and one norm, wired in a way that must not be folded."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        if how == "tied":
            self.other = nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.conv.weight
        if how == "statistics of the batch":
            self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "two users":
            return self.bn(y) + y
        if self.how == "layer called twice":
            return self.bn(y) + self.conv(x * 2)
        if self.how == "norm called twice":
            return self.bn(self.bn(y))
        if self.how == "relu between":
            return self.bn(F.relu(y))
        if self.how == "tied":
            return self.bn(y) + self.other(x)
        if self.how == "weight read elsewhere":
            return self.bn(y) + self.conv.weight.mean()
        if self.how == "output":
            return self.bn(y), y
        return self.bn(y)


@pytest.mark.parametrize(
    "how",
    [
        "two users",
        "layer called twice",
        "norm called twice",
        "relu between",
        "tied",
        "weight read elsewhere",
        "output",
        "statistics of the batch",
    ],
)
def test_what_cannot_be_folded_stays_as_it_is(how):
    torch.manual_seed(0)
    network = captured(Odd(how), 3, 6, 6)
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == ()
    x = torch.randn(2, 3, 6, 6)
    for a, b in zip(folded(x), network(x), strict=True):
        assert torch.equal(a, b)


def test_a_linear_layer_on_a_sequence_has_its_features_elsewhere():
    torch.manual_seed(0)
    network = captured(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)), 4, 6)
    before = copy.deepcopy(network)
    assert fold_batch_norms(network) == ()
    x = torch.randn(3, 4, 6)
    assert torch.equal(network(x), before(x))


class TestReplay:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, 6, 6)

    def test_the_log_leads_to_the_same_network_to_the_bit(self, network):
        source = copy.deepcopy(network)
        edits = fold_batch_norms(network)
        again = replay(source, edits)
        assert set(again.state_dict()) == set(network.state_dict())
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in again.state_dict().items())
        assert "1" in dict(source.named_modules())  # the given network stays whole
        assert kinds(again) == kinds(network)

    def test_an_unknown_edit_is_refused(self, network):
        with raises_case(CheckpointError, "unknown-edit") as caught:
            replay(network, [{"edit": "exec", "code": "print()"}])
        assert "fold" in caught.value.expected

    @pytest.mark.parametrize(
        "edit",
        [
            {"edit": "fold", "layer": "7", "norm": "1"},
            {"edit": "fold", "layer": "0", "norm": "9"},
            {"edit": "fold", "layer": "0"},
            {"edit": "fold", "layer": "0", "norm": "3"},
        ],
    )
    def test_an_edit_of_another_network_is_refused(self, network, edit):
        with raises_case(CheckpointError, "misfit"):
            replay(network, [edit])


def test_folding_by_name_edits_in_place():
    torch.manual_seed(0)
    network = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3, 6, 6)
    x = torch.randn(2, 3, 6, 6)
    before = network(x)
    fold_batch_norm(network, "0", "1")
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
