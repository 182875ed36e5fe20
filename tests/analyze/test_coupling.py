import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from penjing.analyze.coupling import couple
from penjing.analyze.masked import masked
from penjing.errors import RecipeError
from penjing.network.capture import capture_network
from penjing.surgery import replay, resize
from tests.analyze.dynamic_kernels import KERNELS
from tests.analyze.gates_and_heads import CASES, ONE_KEY
from tests.analyze.listed import assert_every_weight_is_listed
from tests.analyze.more_topologies import MORE
from tests.analyze.topologies import TOPOLOGIES, Attention, Patches, Residual, Shuffle, scattered
from tests.raises import raises_case

FREE = {**CASES, **KERNELS}
EVERY = {**TOPOLOGIES, **MORE, **ONE_KEY, **{name: (make, example) for name, (make, example, _) in FREE.items()}}


def coupled(model, *args, keep=()):
    network = capture_network(scattered(model), args)
    return network, couple(network, (args, {}), keep)


@functools.cache  # capturing takes most of the time; who changes the network copies it
def case(name):
    """A topology, its couplings, an example, and whether it is recurrent."""
    torch.manual_seed(0)
    make, example = EVERY[name]
    model, x = make(), example()
    return *coupled(model, x), x, any(isinstance(m, nn.RNNBase) for m in model.modules())


def some(coupling, seed, most=0.6):
    """At random some units of every group, never all of them."""
    random = np.random.default_rng(seed)
    removed = {}
    for name, group in coupling.groups.items():
        count = random.integers(0, max(1, int(group.units * most)) + 1) if group.units > 1 else 0
        if count:
            removed[name] = sorted(random.permutation(group.units)[:count].tolist())
    return removed


def all_of_a_layer(coupling, removed):
    """Whether a tensor would lose every channel along an axis."""
    gone = coupling.removed_atoms(removed)
    return any(gone[first : first + length].all() for first, length in coupling._walk.tensors.values())


def in_double(value):
    return value.double() if value.is_floating_point() else value


def agree(network, coupling, removed, args, tolerance):
    pruned = copy.deepcopy(network)
    resize(pruned, coupling.edits(removed))
    expected = masked(network, coupling, removed)(*args)
    with torch.no_grad():
        got = pruned(*args)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    return pruned


@pytest.mark.parametrize("name", EVERY)
def test_a_pruned_network_is_its_masked_reference(name):
    network, coupling, x, recurrent = case(name)
    assert coupling.groups
    tolerance = 1e-5 if recurrent else 1e-12
    if not recurrent:  # its first states are float32
        network, x = copy.deepcopy(network).double(), in_double(x)
    for seed in range(3):
        removed = some(coupling, seed)
        pruned = agree(network, coupling, removed, (x,), tolerance)
        fewer = sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())
        assert fewer == bool(removed)


@pytest.mark.parametrize("name", EVERY)
def test_every_topology_takes_another_batch_and_trains_after_pruning(name):
    network, coupling, x, _ = case(name)
    pruned = agree(network, coupling, some(coupling, 1), (x,), 1e-4)
    pruned.train()
    pruned(torch.cat([x, x, x[:1]])).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_is_in_a_group_or_it_is_told_why_not(name):
    network, coupling, *_ = case(name)
    assert_every_weight_is_listed(network, coupling)


@pytest.mark.parametrize("name", FREE)
def test_units_and_their_gates_heads_and_kernels_are_free(name):
    coupling = case(name)[1]
    assert {group: units.units for group, units in coupling.groups.items()} == FREE[name][2]
    assert set(coupling.not_prunable.values()) <= {"it is an output of the network"}


@pytest.mark.parametrize("name", ONE_KEY)
def test_heads_that_share_one_key_are_free_and_so_is_the_width_of_the_value(name):
    coupling = case(name)[1]
    assert {group: units.units for group, units in coupling.groups.items()} == {"q": 4, "v": 6, "p": 10}
    assert {tensor.partition(".")[0] for tensor in coupling.not_prunable} == {"k", "o"}
    members = {(m.tensor, m.axis): len(m.of([1])) for group in ("q", "v") for m in coupling.groups[group].members}
    assert members["q.weight", 0] == 6 and members["p.weight", 1] in (4, 6)


def test_groups_say_what_belongs_together_and_why():
    _, coupling = coupled(Residual(), torch.randn(2, 3, 6, 6))
    stem, inner = coupling.groups["stem"], coupling.groups["a"]
    assert {(m.tensor, m.axis) for m in stem.members} == {
        ("stem.weight", 0), ("stem.bias", 0), ("a.weight", 1), ("b.weight", 0), ("b.bias", 0), ("out.weight", 1),
    }  # fmt: skip
    assert {m.tensor for m in inner.members} >= {"norm.weight", "norm.running_mean", "b.weight"}
    assert (stem.units, inner.units) == (8, 12)
    assert "/add#0 combines it" in stem.because
    assert "a.weight axis 0 (its outputs): 12 positions" in str(inner)
    assert coupling.not_prunable == {
        "out.weight:0": "it is an output of the network",
        "out.bias:0": "it is an output of the network",
    }


def test_heads_go_whole_and_attention_keeps_its_scale():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Attention(), x)
    heads = coupling.groups["qkv"]
    assert heads.units == 4
    qkv = next(m for m in heads.members if m.tensor == "qkv.weight")
    assert qkv.of([1]).tolist() == [*range(4, 8), *range(20, 24), *range(36, 40)]
    agree(network.double(), coupling, {"qkv": [0, 2]}, (x.double(),), 1e-12)


def test_a_width_under_a_norm_is_called_approximate():
    _, coupling = coupled(Attention(), torch.randn(2, 3, 6, 6))
    approximate = {name: group.statistics for name, group in coupling.groups.items() if group.statistics}
    assert approximate == {"tokens": ("norm", "norm2")}
    assert "approximate: norm takes statistics over them" in str(coupling.groups["tokens"])


def test_a_shuffle_leaves_every_channel_free():
    network, coupling = coupled(Shuffle(), torch.randn(2, 3, 6, 6))
    assert sum(group.units for group in coupling.groups.values()) == 12 + 4 * 6
    pruned = copy.deepcopy(network)
    resize(pruned, coupling.edits({"stem": [0, 1, 2]}))
    assert pruned.stem.out_channels == 9


def test_a_pruned_shuffle_is_pruned_again():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Shuffle(), x)
    first = coupling.edits(some(coupling, 2, most=0.3))
    once = replay(network, first)
    again = couple(once, ((x,), {}))
    assert sum(g.units for g in again.groups.values()) == sum(
        m.out_channels for m in [once.stem, *once.blocks.children()]
    )
    removed = some(again, 5)
    agree(once.double(), again, removed, (x.double(),), 1e-12)
    twice = replay(network, [*first, *again.edits(removed)])
    assert len([n for n in twice.graph.nodes if n.op == "get_attr"]) == 4


def test_the_log_of_edits_rebuilds_the_network_to_the_bit():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Shuffle(), x)
    edits = coupling.edits(some(coupling, 2))
    pruned = copy.deepcopy(network)
    resize(pruned, edits)
    again = replay(network, edits)
    assert torch.equal(pruned(x), again(x))
    assert {k: v.shape for k, v in pruned.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def test_what_is_not_known_is_refused_by_name_and_the_rest_goes_on():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(F.relu(self.b(torch.cumsum(self.a(x), -1))))

    _, coupling = coupled(Odd(), torch.randn(2, 4))
    assert set(coupling.groups) == {"b"}
    assert "cumsum#0" in coupling.not_prunable["a.weight:0"]


def test_a_computed_size_is_what_is_left_over():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Patches(), x)
    assert {name: group.units for name, group in coupling.groups.items()} == {"stem": 8, "join": 6}
    assert set(coupling.not_prunable) == {"out.weight:0", "out.bias:0"}
    edits = coupling.edits({"stem": [0, 5]})
    computed = [e["argument"] for e in edits if e["edit"] == "literal" and e["value"] == -1]
    assert computed == [["shape", 0], ["shape", 0]]
    again = couple(replay(network, edits), ((x,), {}))  # -1 is a size like any other
    assert {name: group.units for name, group in again.groups.items()} == {"stem": 6, "join": 6}


def test_two_sizes_that_are_computed_or_open_hold_what_they_read():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            n, length, _ = x.shape
            y = self.a(x).transpose(1, 2).reshape(n * 6, -1, 1)
            return self.b(y.reshape(n, 6, length).transpose(1, 2))

    _, coupling = coupled(Odd(), torch.randn(2, 5, 4))
    assert not coupling.groups
    assert coupling.not_prunable["a.weight:0"] == "/reshape#0: the size is computed, and another one is open"


class Positions(nn.Module):
    """Token ids (batch, length): a table of positions is cut to the length by `cut`."""

    def __init__(self, cut):
        super().__init__()
        self.embed, self.table = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 16, 8))
        self.out, self.cut = nn.Linear(8, 3), cut

    def forward(self, ids):
        return self.out(self.embed(ids) + self.cut(self.table, ids.shape[1]))


@pytest.mark.parametrize(
    "cut",
    [
        lambda table, n: table[:, :n],
        lambda table, n: table[:, 16 - n :],
        lambda table, n: table.narrow(1, 0, n),
        lambda table, n: table[:, 1::3][:, :1] + table[:, :n],
    ],
)
def test_the_width_of_what_is_cut_at_a_computed_place_is_free(cut):
    ids = torch.arange(10).reshape(2, 5) % 9
    network = capture_network(scattered(Positions(cut)), (ids,), dynamic={"ids": {0: "batch", 1: "length"}})
    coupling = couple(network, ((ids,), {}))
    assert {name: group.units for name, group in coupling.groups.items()} == {"embed": 8}
    agree(network, coupling, {"embed": [0, 3, 6]}, (ids[:, :4],), 1e-5)


@pytest.mark.parametrize("axes", [(1,), (2,), (1, -1)])
def test_what_is_flipped_is_free(axes):
    class Flips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(F.relu(self.a(x).flip(axes)) + self.b(x))

    x = torch.randn(2, 5, 4)
    network, coupling = coupled(Flips(), x)
    assert {name: group.units for name, group in coupling.groups.items()} == {"a": 8}
    agree(network, coupling, {"a": [0, 1, 5]}, (x,), 1e-5)


def test_an_operator_without_a_rule_holds_what_it_reads():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(F.relu(self.b(torch.linalg.vander(self.a(x), N=6)[:, 0])))

    _, coupling = coupled(Odd(), torch.randn(2, 4))
    assert "nothing is known about the channels of" in coupling.not_prunable["a.weight:0"]
    assert "b" in coupling.groups


def test_channels_added_to_an_input_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x) + x)

    _, coupling = coupled(Odd(), torch.randn(2, 4))
    assert not coupling.groups
    assert coupling.not_prunable["a.weight:0"] == "/add#0 combines it"


def test_the_last_channel_is_never_removed():
    _, coupling = coupled(Residual(), torch.randn(2, 3, 6, 6))
    with raises_case(RecipeError, "every-channel") as caught:
        coupling.edits({"a": range(12)})
    assert "a.weight" in caught.value.what


def test_layers_that_stay_whole_are_held_and_a_wrong_name_gets_the_nearest():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Residual(), x, keep=["a"])
    assert set(coupling.groups) == {"stem"}
    assert coupling.not_prunable["a.weight:0"] == "a is excluded by keep"
    with raises_case(RecipeError, "no-layer") as caught:
        couple(network, ((x,), {}), keep=["stm"])
    assert caught.value.got == "stm" and "stem" in caught.value.remedy
    with raises_case(RecipeError, "unknown-group") as caught:
        coupling.edits({"a": [0]})
    assert caught.value.got == "a"


def test_a_sizes_prediction_is_what_pruning_gives():
    x = torch.randn(2, 3, 6, 6)
    network, coupling = coupled(Attention(), x)
    removed = some(coupling, 3)
    values, stored = coupling.sizes(coupling.removed_atoms(removed))
    pruned = replay(network, coupling.edits(removed))
    tensors = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    assert {name: tuple(tensors[name].shape) for name in stored} == stored
    from penjing.network.graph import shapes

    actual = {name: tuple(t.shape) for name, t in shapes(pruned, ((x,), {})).items()}
    assert {name: values[name] for name in actual if name in values} == {n: s for n, s in actual.items() if n in values}


class Random(nn.Module):
    """A network drawn from a list of numbers: convolutions, norms, additions, products, concatenations, splits."""

    def __init__(self, plan):
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps = []
        widths = [3]
        for kind, left, right, width in plan:
            a, b = left % len(widths), right % len(widths)
            if kind == "conv":
                self.steps.append(("layer", a, len(self.layers)))
                self.layers.append(nn.Conv2d(widths[a], width, 3, padding=1))
                widths.append(width)
            elif kind == "depthwise":
                self.steps.append(("layer", a, len(self.layers)))
                self.layers.append(nn.Conv2d(widths[a], widths[a], 3, padding=1, groups=widths[a]))
                widths.append(widths[a])
            elif kind == "norm":
                self.steps.append(("layer", a, len(self.layers)))
                self.layers.append(nn.BatchNorm2d(widths[a]))
                widths.append(widths[a])
            elif kind == "cat":
                self.steps.append(("cat", a, b))
                widths.append(widths[a] + widths[b])
            elif kind == "half" and widths[a] % 2 == 0:
                self.steps.append(("half", a, b))
                widths.append(widths[a] // 2)
            elif kind in ("add", "mul") and widths[a] == widths[b]:
                self.steps.append((kind, a, b))
                widths.append(widths[a])
        self.out = nn.Linear(widths[-1], 2)

    def forward(self, x):
        values = [x]
        for step, a, b in self.steps:
            if step == "layer":
                values.append(torch.sigmoid(self.layers[b](values[a])))
            elif step == "cat":
                values.append(torch.cat([values[a], values[b]], 1))
            elif step == "half":
                values.append(values[a].chunk(2, 1)[b % 2])
            else:
                values.append(values[a] + values[b] if step == "add" else values[a] * values[b])
        return self.out(values[-1].mean((2, 3)))


STEP = st.tuples(
    st.sampled_from(["conv", "conv", "conv", "depthwise", "norm", "cat", "half", "add", "mul"]),
    st.integers(0, 20), st.integers(0, 20), st.sampled_from([4, 6]),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=st.lists(STEP, min_size=2, max_size=9), seed=st.integers(0, 1000))
@example(plan=[("conv", 0, 0, 4), ("conv", 0, 0, 4), ("conv", 1, 0, 4), ("half", 3, 0, 4)], seed=355)
def test_random_networks_are_their_masked_reference(plan, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 4, 4)
    network, coupling = coupled(Random(plan), x)
    removed = some(coupling, seed, most=0.7)
    assume(removed)  # without a group that can lose a channel there is nothing to compare
    if all_of_a_layer(coupling, removed):  # of a half alone, what was drawn can be all
        with raises_case(RecipeError, "every-channel"):
            coupling.edits(removed)
        return
    pruned = agree(network.double(), coupling, removed, (x.double(),), 1e-11)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)),
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 4, 1)),
    ],
)
def test_of_convolutions_in_groups_it_is_told_why_they_are_not_prunable(network):
    x = torch.randn(2, 6, 8, 8)
    coupling = couple(capture_network(network.eval(), (x,), {}), ((x,), {}))
    assert not coupling.groups and coupling.not_prunable["0.weight:0"] == "0: the number of its groups never changes"
