import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.analyze.cost import cost, peak_activation, peak_activation_bytes, totals
from penjing.architectures import build
from penjing.network.capture import capture_network
from penjing.network.graph import shapes


def rows_of(model, *args, dynamic=None, **kwargs):
    return {row.name: row for row in cost(capture_network(model, args, kwargs, dynamic), (args, kwargs))}


def by_hooks(model, *args):
    """MACs of convolutions and linear layers, counted output by output on the module itself."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            window = module.weight[0, 0].numel()
            total += output.numel() * module.in_channels // module.groups * window

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        model.eval()(*args)
    for hook in hooks:
        hook.remove()
    return total


def test_a_convolution_by_hand():
    rows = rows_of(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), torch.zeros(1, 3, 32, 32))
    row = rows["0"]
    assert row.kind == "conv"
    assert row.parameters == 8 * 3 * 3 * 3 + 8
    assert row.macs == (16 * 16) * 8 * (3 * 3 * 3)
    assert row.activation_bytes == 8 * 16 * 16 * 4
    assert row.weight_bytes == (8 * 3 * 3 * 3 + 8) * 4


def test_depthwise_and_grouped_convolutions_see_their_own_group_only():
    model = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), nn.Conv2d(8, 12, 3, groups=4))
    rows = rows_of(model, torch.zeros(1, 8, 10, 10))
    assert rows["0"].macs == 10 * 10 * 8 * 5 * 5
    assert rows["0"].parameters == 8 * 5 * 5
    assert rows["1"].macs == 8 * 8 * 12 * 2 * 3 * 3
    assert rows["1"].parameters == 12 * 2 * 3 * 3 + 12


def test_a_transposed_convolution_spends_its_window_on_every_input():
    layer = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
    row = rows_of(nn.Sequential(layer), torch.zeros(1, 6, 5, 5))["0"]
    x = torch.ones(1, 6, 5, 5)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    # With ones everywhere the sum of the outputs is the number of products.
    assert row.macs == 6 * 5 * 5 * 2 * 3 * 3 == int(layer(x).sum())
    assert row.kind == "conv_transpose"


@pytest.mark.parametrize("n", [1, 3])
def test_convolutions_of_other_ranks(n):
    cls = {1: nn.Conv1d, 3: nn.Conv3d}[n]
    row = rows_of(nn.Sequential(cls(2, 5, 3)), torch.zeros(1, 2, *[7] * n))["0"]
    assert row.macs == 5 * 5**n * 2 * 3**n


def test_a_linear_layer_on_a_sequence():
    rows = rows_of(nn.Sequential(nn.Linear(16, 10)), torch.zeros(2, 7, 16))
    assert rows["0"].macs == 7 * 16 * 10  # one sample of the two
    assert rows["0"].parameters == 16 * 10 + 10
    assert rows["0"].activation_bytes == 7 * 10 * 4


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 9))
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, x):  # (batch, 5, 6)
        square = x @ x.transpose(1, 2)
        outer = torch.baddbmm(square, x, x.transpose(1, 2))
        flat = torch.addmm(self.bias, x.flatten(0, 1), self.weight)
        named = torch.einsum("bik,...kj->bij", x, self.weight)
        return outer, flat, named


def test_matrix_products_of_every_form():
    rows = list(rows_of(Products(), torch.zeros(2, 5, 6)).values())
    macs = {(row.kind, row.macs) for row in rows if row.macs}
    # With a stored weight addmm and einsum are linear layers.
    assert macs == {("matmul", 5 * 5 * 6), ("baddbmm", 5 * 5 * 6), ("linear", 5 * 9 * 6)}
    assert sum(row.macs for row in rows) == 2 * 5 * 5 * 6 + 2 * 5 * 9 * 6
    assert sum(row.parameters for row in rows) == 6 * 9 + 9  # the weight is used twice, and counted once


class Attention(nn.Module):
    def __init__(self, heads, shared):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, heads * 4), nn.Linear(12, shared * 4), nn.Linear(12, shared * 6)
        self.heads, self.shared = heads, shared

    def forward(self, x, memory):
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (self.shared, 4)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (self.shared, 6)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.shared)


@pytest.mark.parametrize("shared", [4, 2])
def test_attention_is_its_two_products(shared):
    rows = rows_of(Attention(4, shared), torch.zeros(1, 5, 12), torch.zeros(1, 7, 12))
    (row,) = [r for r in rows.values() if r.kind == "attention"]
    assert row.macs == 4 * (5 * 7 * 4) + 4 * (5 * 7 * 6)  # every head of the query, also where two share a key


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers(cls, gates):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cls(6, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0]

    model = Network()
    rows = [r for r in rows_of(model, torch.zeros(1, 11, 6)).values() if r.kind in ("lstm", "gru")]
    first = 2 * gates * 5 * (6 + 5)
    second = 2 * gates * 5 * (10 + 5)  # reads both directions of the first
    assert sum(r.macs for r in rows) == 11 * (first + second)
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in model.parameters())
    assert rows[0].activation_bytes >= 11 * 10 * 4


def test_a_plain_recurrent_layer_is_its_products():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNN(6, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x, state):
            return self.cell(x, state)[0]

    model = Network()
    rows = rows_of(
        model, torch.zeros(1, 11, 6), torch.zeros(4, 1, 5), dynamic={"x": {0: "batch"}, "state": {1: "batch"}}
    )
    first, second = 2 * 5 * (6 + 5), 2 * 5 * (10 + 5)  # the second reads both directions of the first
    assert sum(r.macs for r in rows.values()) == 11 * (first + second)
    biases = 4 * 5  # both of a cell are one
    assert sum(r.parameters for r in rows.values()) == sum(p.numel() for p in model.parameters()) - biases


def test_resnet18_has_its_published_figures():
    rows = cost(
        capture_network(build("resnet18"), (torch.zeros(1, 3, 224, 224),)), ((torch.zeros(1, 3, 224, 224),), {})
    )
    total = totals(rows)
    assert total.macs == 1_814_073_344
    assert total.parameters == 11_689_512
    assert total.weight_bytes == 4 * 11_689_512
    assert {r.kind for r in rows} >= {"conv", "batch_norm", "relu", "add", "max_pool", "avg_pool", "linear"}
    assert not {r.kind for r in rows} & {"reshape", "dropout", "sym_size"}


def test_resnet20_agrees_with_hooks_on_the_module():
    model, x = build("resnet20", in_channels=1), torch.zeros(1, 1, 28, 28)
    rows = cost(capture_network(model, (x,)), ((x.expand(3, -1, -1, -1),), {}))
    assert totals(rows).macs == by_hooks(model, x)
    assert totals(rows).parameters == sum(p.numel() for p in model.parameters())


def test_elementwise_operators_norms_and_poolings_cost_no_macs():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Sigmoid())
    rows = rows_of(model, torch.zeros(1, 4, 8, 8))
    assert [r.kind for r in rows.values()] == ["batch_norm", "relu", "max_pool", "avg_pool", "sigmoid"]
    assert all(r.macs == 0 for r in rows.values())
    assert rows["0"].parameters == 8  # its statistics are no parameters


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices):
        return self.head(self.layer(self.layer(self.table(indices))))


def test_shared_layers_work_twice_and_are_stored_once():
    rows = rows_of(Twice(), torch.zeros(1, 3, dtype=torch.long))
    assert (rows["layer"].macs, rows["layer@1"].macs) == (3 * 16, 3 * 16)
    assert (rows["layer"].parameters, rows["layer@1"].parameters) == (20, 0)
    assert (rows["table"].parameters, rows["head"].parameters) == (40, 0)
    assert rows["head"].macs == 3 * 4 * 10
    assert totals(rows.values()).parameters == 60


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.offset = nn.Parameter(torch.zeros(1, 6, 4))
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.offset
        return x * (self.mask > 0).unsqueeze(-1)


def test_parameters_of_functional_operators_are_found_behind_views():
    rows = rows_of(Token(), torch.zeros(1, 5, 4))
    kinds = {r.kind: r for r in rows.values()}
    assert kinds["cat"].parameters == 4
    assert kinds["add"].parameters == 24
    assert kinds["mul"].parameters == 0
    assert set(kinds) == {"cat", "add", "mul"}  # no row for the mask or for the views


def test_a_fixed_batch_is_counted_whole():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            return self.head(x.reshape(x.shape[0], 12))

    x = torch.zeros(4, 3, 4)
    network = capture_network(Fixed(), (x,), dynamic={})
    assert totals(cost(network, ((x,), {}))).macs == 4 * 12 * 2


def test_the_peak_of_a_chain_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.ReLU(), nn.Linear(4 * 64, 2))
    x = torch.zeros(3, 1, 8, 8)
    network = capture_network(model, (x,))
    # While the rectifier runs, its input (seen through a view) and its output are alive; the image is gone.
    peak = peak_activation(network, ((x,), {}))
    assert peak.size_bytes == 2 * (4 * 64) * 4 == peak_activation_bytes(network, ((x,), {}))
    assert peak.site == next(r.name for r in cost(network, ((x,), {})) if r.kind == "relu")


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.scale = nn.Parameter(torch.ones(2, 1000))

    def forward(self, x):
        y = self.b(self.a(x))
        return x + y, self.scale[0].sum() * y


def test_a_shortcut_keeps_its_input_alive():
    x = torch.zeros(1, 2, 4, 4)
    network = capture_network(Skip(), (x,))
    one = 2 * 16 * 4
    # x, y and the sum while the addition runs; the sum of the weight's row (4 bytes) may be alive with them.
    assert 3 * one <= peak_activation_bytes(network, ((x,), {})) <= 3 * one + 4


@pytest.mark.parametrize("model", [Skip(), Token(), build("resnet20")], ids=["skip", "token", "resnet20"])
def test_the_peak_equals_a_slow_simulation(model):
    x = torch.zeros(1, 5, 4) if isinstance(model, Token) else torch.zeros(1, 2 if isinstance(model, Skip) else 3, 8, 8)
    network = capture_network(model, (x,))
    tensors = shapes(network, ((x,), {}))
    nodes = list(network.graph.nodes)
    weights = {id(n) for n in nodes if n.op == "get_attr"}
    for n in nodes:  # views of weights
        if n.op == "call_function" and n.args and id(n.args[0]) in weights:
            if str(n.target).split(".")[1] in ("expand", "select"):
                weights.add(id(n))
    largest = 0
    for i in range(len(nodes)):
        alive = {}
        for j, node in enumerate(nodes[: i + 1]):
            if node.name in tensors and id(node) not in weights and (j == i or any(u in nodes[i:] for u in node.users)):
                storage = tensors[node.name].untyped_storage()
                alive[storage._cdata] = storage.nbytes()
        largest = max(largest, sum(alive.values()))
    assert peak_activation_bytes(network, ((x,), {})) == largest


def test_counting_leaves_the_network_as_it_was():
    x = torch.randn(2, 3, 8, 8)
    network = capture_network(build("resnet20"), (x,)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    cost(network, ((x,), {}))
    peak_activation_bytes(network, ((x,), {}))
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
