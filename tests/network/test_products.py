"""Products with a stored weight are linear layers by whatever operator they were written, with plain weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from penjing.analyze.cost import cost
from penjing.network.capture import capture_network
from penjing.network.graph import kind

IN, OUT = 6, 9


class Product(nn.Module):
    """A weight of any shape, and a function of it and the input."""

    def __init__(self, shape, function, buffer=False):
        super().__init__()
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        if buffer:
            self.register_buffer("w", weight)
        else:
            self.w = nn.Parameter(weight)
        self.b = nn.Parameter(torch.randn(OUT, generator=torch.Generator().manual_seed(1)))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.b)


# name: (shape of the weight, shape of a sample, function)
WRITTEN = {
    "addmm": ((IN, OUT), (IN,), lambda x, w, b: torch.addmm(b, x, w)),
    "addmm with factors": ((IN, OUT), (IN,), lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0)),
    "addmm of a number": ((IN, OUT), (IN,), lambda x, w, b: torch.addmm(b[:1], x, w)),
    "mm": ((IN, OUT), (IN,), lambda x, w, b: torch.mm(x, w) + b),
    "x @ w": ((IN, OUT), (5, IN), lambda x, w, b: x @ w + b),
    "x @ w.T": ((OUT, IN), (5, IN), lambda x, w, b: x @ w.T + b),
    "x @ vector": ((IN,), (5, IN), lambda x, w, b: x @ w + b[0]),
    "w @ x": ((OUT, IN), (IN, 5), lambda x, w, b: w @ x + b[:, None]),
    "one matrix for a batch": ((1, IN, OUT), (5, IN), lambda x, w, b: x @ w + b),
    "baddbmm": ((IN, OUT), (5, IN), lambda x, w, b: torch.baddbmm(b, x, w.expand(x.shape[0], IN, OUT))),
    "mv": ((IN,), (IN,), lambda x, w, b: torch.mv(x, w) + b[0]),
    "addmv": ((IN,), (IN,), lambda x, w, b: torch.addmv(b[:1], x, w)),
    "inner": ((OUT, IN), (5, IN), lambda x, w, b: torch.inner(x, w) + b),
    "tensordot": ((3, 2, OUT), (5, 3, 2), lambda x, w, b: torch.tensordot(x, w, 2) + b),
    "einsum": ((2, 3, OUT), (3, 5, 2), lambda x, w, b: torch.einsum("bkni,iko->bno", x, w) + b),
    "einsum, new axes": ((IN, 3, 3), (5, IN), lambda x, w, b: torch.einsum("...i,iho->...ho", x, w).flatten(-2) + b),
    "einsum, weight first": ((OUT, IN), (IN, 5), lambda x, w, b: torch.einsum("oi,bit->bto", w, x) + b),
    "einsum without an arrow": ((IN, OUT), (IN,), lambda x, w, b: torch.einsum("ai,ij", x, w) + b),
    "reshaped": ((IN * OUT,), (IN,), lambda x, w, b: F.linear(x, w.view(OUT, IN), b)),
    "one axis": ((IN,), (5, IN), lambda x, w, b: F.linear(x, w) + b[0]),
    "scaled": ((OUT, IN), (IN,), lambda x, w, b: F.linear(x, w * 0.5, b)),
    "bilinear": ((OUT, 4, 2), (IN,), lambda x, w, b: F.bilinear(x[..., :4], x[..., 4:], w, b)),
}


def of(name):
    shape, sample, function = WRITTEN[name]
    model = Product(shape, function).eval()
    return model, capture_network(model, (torch.randn(2, *sample),)), sample


@pytest.fixture(params=WRITTEN, ids=lambda name: name.replace(" ", "-"))
def written(request):
    return of(request.param)


class TestEveryProduct:
    def test_it_is_a_linear_layer_that_computes_the_same(self, written):
        model, network, sample = written
        assert [type(m) for m in network.modules() if list(m.parameters(recurse=False))].count(nn.Linear) >= 1
        for batch in (1, 2, 5):
            x = torch.randn(batch, *sample)
            torch.testing.assert_close(network(x), model(x))

    def test_every_multiplication_by_the_weight_is_counted_for_the_layer(self, written):
        model, network, sample = written
        rows = cost(network, ((torch.randn(2, *sample),), {}))
        assert {row.kind for row in rows if row.macs} == {"linear"}
        assert sum(row.parameters for row in rows) in (model.w.numel() + 1, model.w.numel() + OUT, model.w.numel())

    # A factor that is folded into the weight is no longer one of its gradient.
    @pytest.mark.parametrize("name", sorted(WRITTEN.keys() - {"scaled", "addmm with factors"}))
    def test_the_weight_is_trained_as_the_source_trains_it(self, name):
        model, network, sample = of(name)
        network = copy.deepcopy(network).train()
        x = torch.randn(3, *sample)
        for module in (model, network):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
            module(x).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(network(x), model(x))


def captured(model, *sample):
    return capture_network(model.eval(), (torch.randn(2, *sample),))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, IN)
        self.inner = nn.Linear(IN, IN)

    def forward(self, ids):
        return self.inner(self.table(ids)) @ self.table.weight.T


class Auto(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.w)), self.w.t())


class Thirds(nn.Module):
    def __init__(self, overlap=0):
        super().__init__()
        self.proj_weight = nn.Parameter(torch.randn(3 * OUT, IN))
        self.overlap = overlap

    def forward(self, x):
        a, b = self.proj_weight[: OUT + self.overlap], self.proj_weight[OUT : 2 * OUT]
        return F.linear(x, a)[..., :OUT] + F.linear(x, b) * (x @ self.proj_weight[2 * OUT :].T)


class TestTies:
    def test_a_table_and_a_head_that_is_turned_twice_stay_one_parameter(self):
        network = capture_network(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),))
        head = next(m for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == 20)
        assert head.weight is network.get_submodule("table").weight
        assert network.meta["folded"] == {}

    def test_a_weight_that_is_read_both_ways_is_trained_as_one(self):
        model = Auto().eval()
        network = captured(model, IN)
        assert len(list(network.parameters())) == 1
        x = torch.randn(4, IN)
        model(x).square().sum().backward()
        network(x).square().sum().backward()
        torch.testing.assert_close(next(network.parameters()).grad, model.w.grad)

    def test_parts_of_one_weight_are_layers_of_their_own(self):
        network = captured(Thirds(), IN)
        shapes = sorted(tuple(p.shape) for p in network.parameters())
        assert shapes == [(OUT, IN), (OUT, IN), (OUT, IN)]
        assert set(network.meta["folded"].values()) == {("proj_weight",)}
        assert set(network.meta["renamed"].values()) == {"proj_weight"}

    def test_parts_that_overlap_stay_parts_of_one_weight(self):
        network = captured(Thirds(overlap=1), IN)
        assert "proj_weight" in dict(network.named_parameters())

    def test_a_layer_under_a_parametrization_that_is_called_twice_is_one_layer(self):
        layer = parametrizations.weight_norm(nn.Linear(IN, IN))
        network = captured(nn.Sequential(layer, nn.ReLU(), layer), IN)
        assert set(dict(network.named_parameters())) == {"0.weight", "0.bias"}


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class TestParametrizations:
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize(
        ("norm", "layer"),
        [
            (parametrizations.weight_norm, nn.Conv1d),
            (parametrizations.spectral_norm, nn.Conv1d),
            (parametrizations.orthogonal, nn.Linear),
            (nn.utils.weight_norm, nn.Conv1d),
            (nn.utils.weight_norm, nn.Linear),
            (nn.utils.spectral_norm, nn.Linear),
            (symmetric, nn.Linear),
        ],
        ids=["weight", "spectral", "orthogonal", "old-weight", "old-weight-linear", "old-spectral", "own"],
    )
    def test_it_is_folded_into_a_plain_weight(self, norm, layer):
        torch.manual_seed(0)
        size, sample = ((IN, IN), (IN,)) if layer is nn.Linear else ((IN, OUT, 3), (IN, 8))
        model = nn.Sequential(norm(layer(*size)), nn.ReLU(), nn.Flatten()).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        network = captured(model, *sample)
        assert set(network.state_dict()) == {"0.weight", "0.bias"}
        assert set(network.meta["folded"]) == {"0.weight"}
        assert [kind(network, n) for n in network.graph.nodes if n.op == "call_function"] == ["relu", "reshape"]
        x = torch.randn(5, *sample)
        assert torch.equal(network(x), model(x))
        assert set(model.state_dict()) == set(before)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_standardized_weight(self):
        class Standardized(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                w = self.conv.weight
                return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))

        model = Standardized()
        network = captured(model, 3, 8, 8)
        assert [kind(network, n) for n in network.graph.nodes if "call" in n.op] == ["conv"]
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(network(x), model(x))


def test_a_buffer_that_multiplies_is_a_layer_that_is_not_trained():
    network = captured(Product((OUT, IN), lambda x, w, b: w @ x + b[:, None], buffer=True), IN, 5)
    (layer,) = (m for m in network.modules() if isinstance(m, nn.Linear))
    assert not layer.weight.requires_grad


def test_heads_with_a_matrix_each_are_a_matrix_product():
    model = Product((4, IN, OUT), lambda x, w, b: torch.einsum("bnhd,hde->bnhe", x, w) + b)
    network = captured(model, 5, 4, IN)
    assert [kind(network, n) for n in network.graph.nodes if n.op == "call_function"].count("matmul") == 1
    x = torch.randn(3, 5, 4, IN)
    torch.testing.assert_close(network(x), model(x))


class Several(nn.Module):
    """Two weights, and an equation with them and two values (batch, length, IN)."""

    def __init__(self, equation, order):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(3, IN, generator=generator))
        self.up = nn.Parameter(torch.randn(OUT, 3, generator=generator))
        self.square = nn.Parameter(torch.randn(IN, IN, generator=generator))
        self.equation, self.order = equation, order

    def forward(self, x, y):
        tensors = {"x": x, "y": y, "d": self.down, "u": self.up, "w": self.square}
        return torch.einsum(self.equation, [tensors[letter] for letter in self.order])


class TestEinsumsOfSeveral:
    # equation, its operands, how many linear layers and how many einsums are left
    @pytest.mark.parametrize(
        ("equation", "order", "layers", "left"),
        [
            ("bni,ri,or->bno", "xdu", 2, 0),
            ("or,ri,bni->bno", "udx", 2, 0),
            ("bni,ij,bmj->bnm", "xwy", 1, 0),
            ("bni,bmj,ij->bnm", "xyw", 1, 0),
            ("...ni,ij,...nj->...n", "xwy", 1, 1),
            ("bni,ri,or,bno->b", "xduv", 2, 1),
            ("bni,ij,bnj", "xwy", 1, 1),
            ("bni,ij,bni->bnj", "xwx", 1, 1),
        ],
    )
    def test_the_weights_are_linear_layers(self, equation, order, layers, left):
        model = Several(equation, order.replace("v", "y")).eval()
        width = OUT if "v" in order else IN
        call = torch.randn(2, 5, IN), torch.randn(2, 5, width)
        network = capture_network(model, call)
        assert [type(m) for m in network.modules()].count(nn.Linear) == layers
        kinds = [kind(network, n) for n in network.graph.nodes if n.op == "call_function"]
        assert kinds.count("einsum") == left
        assert not any(n.op == "get_attr" for n in network.graph.nodes)
        for batch in (1, 3):
            args = torch.randn(batch, 5, IN), torch.randn(batch, 5, width)
            torch.testing.assert_close(network(*args), model(*args), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("equation", ["bni,ii,bnj->bn", "bni,ij,bxj->bnj"])
    def test_diagonals_and_broadcasts_stay_as_they_were_written(self, equation):
        model = Several(equation, "xwy").eval()
        call = torch.randn(2, 5, IN), torch.randn(2, 1 if "x" in equation else 5, IN)
        network = capture_network(model, call)
        args = torch.randn(3, 5, IN), torch.randn(3, *call[1].shape[1:])
        torch.testing.assert_close(network(*args), model(*args))

    def test_values_alone_stay_as_they_were_written(self):
        model = Several("bni,bmi,bmj->bnj", "xyx").eval()
        network = capture_network(model, (torch.randn(2, 5, IN), torch.randn(2, 5, IN)))
        (einsum,) = (n for n in network.graph.nodes if n.op == "call_function" and kind(network, n) == "einsum")
        assert len(einsum.args[1]) == 3


class Einsum(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation = equation

    def forward(self, x, y):
        return torch.einsum(self.equation, x, y)


class TestEinsumsOfTwoValues:
    @pytest.mark.parametrize(
        ("equation", "left", "right"),
        [
            ("bnc,bmc->bnm", (4, 6), (5, 6)),
            ("nlc,ncm->nml", (4, 6), (6, 5)),
            ("bqhd,bkhd->bhqk", (4, 3, 6), (5, 3, 6)),
            ("bhqk,bkhd->bqhd", (3, 4, 5), (5, 3, 6)),
            ("bij,bklij->bkl", (4, 6), (2, 3, 4, 6)),
            ("bcij,bcd->bijd", (6, 2, 3), (6, 5)),
            ("bd,bnd->bn", (6,), (4, 6)),
            ("bnd,bd->nb", (4, 6), (6,)),
            ("b...qc,b...kc->b...qk", (3, 4, 6), (3, 5, 6)),
            ("bijx,bxkl", (2, 3, 6), (6, 4, 5)),
        ],
    )
    def test_are_matrix_products(self, equation, left, right):
        def call(n):
            return torch.randn(n, *left), torch.randn(n, *right)

        model = Einsum(equation)
        network = capture_network(model, call(2))
        kinds = [kind(network, n) for n in network.graph.nodes if n.op == "call_function"]
        assert kinds.count("matmul") == 1 and "einsum" not in kinds
        for batch in (1, 3):
            args = call(batch)
            torch.testing.assert_close(network(*args), model(*args), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("equation", "left", "right"),
        [
            ("bii,bic->bic", (4, 4), (4, 6)),
            ("bnc,bmd->bnm", (4, 6), (5, 6)),
            ("bnc,bmc->bnmc", (4, 6), (5, 6)),
            ("bn,bn->b", (4,), (4,)),
            ("bnc,bmc->bnm", (4, 1), (5, 6)),
        ],
    )
    def test_others_stay_as_they_were_written(self, equation, left, right):
        args = torch.randn(2, *left), torch.randn(2, *right)
        network = capture_network(Einsum(equation), args)
        kinds = [kind(network, n) for n in network.graph.nodes if n.op == "call_function"]
        assert "einsum" in kinds and "matmul" not in kinds
        torch.testing.assert_close(network(*args), Einsum(equation)(*args))


def test_what_no_layer_says_stays_as_it_was_written():
    model = Product((IN, IN), lambda x, w, b: torch.einsum("bi,ii->bi", x, w) + torch.einsum("bi,jk->b", x, w)[:, None])
    network = captured(model, IN)
    x = torch.randn(3, IN)
    assert torch.equal(network(x), model(x))


def test_a_layer_without_a_bias_leaves_the_name_of_one_that_an_operator_reads():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(IN, OUT)

        def forward(self, x):
            return F.linear(x, self.layer.weight).relu() + self.layer.bias

    model = Late()
    network = captured(model, IN)
    x = torch.randn(3, IN)
    assert torch.equal(network(x), model(x))


def test_random_numbers_are_no_constants():
    def noisy(x, w, b):
        noise = torch.rand(OUT, IN)
        return F.linear(x, w + noise, b)

    network = captured(Product((OUT, IN), noisy), IN)
    x = torch.randn(3, IN)
    assert not torch.equal(network(x), network(x))
