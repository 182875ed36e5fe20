import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from examples import data
from penjing.architectures import build
from penjing.errors import ExportError, TaskError
from penjing.network.capture import capture_network
from penjing.network.exporting import export, export_module, input_names
from penjing.network.graph import arguments, flat_inputs, kind, shapes, site, sites, tensor_inputs
from penjing.tasks.usercode import load_named
from tests.raises import raises_case


def tensors(outputs):
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def assert_same_bits(a, b):
    a, b = tensors(a), tensors(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@torch.no_grad()
@pytest.fixture(autouse=True)
def unfused_attention():
    """Outside an export, nn.MultiheadAttention may take a fused kernel that adds in another order on two threads."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def run(module, args=(), kwargs=None):
    return module.eval()(*pytree.tree_map_only(torch.Tensor, torch.clone, args), **(kwargs or {}))


def rerun_of(network, args=(), kwargs=None, dynamic=None):
    """The network exported and captured a second time."""
    return capture_network(export(network, (args, kwargs or {}), dynamic))


def assert_trains(network, args=(), kwargs=None):
    network.train()
    sum(x.float().square().sum() for x in tensors(network(*args, **(kwargs or {})))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def randomized(model):
    """Statistics and affine values other than 0 and 1, so that a mix-up of two shows."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.9)
    return model


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y = self.relu(self.bn(self.conv(y)))
        y += x
        return {"pooled": y.mean((2, 3)), "map": y}


class Writes(nn.Module):
    """In-place operators that can't be replaced one by one: a view is written to."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(36)
        self.linear = nn.Linear(36, 5)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y += 1
        y[:, 0] *= 2
        return self.linear(self.drop(self.norm(y.mean(1).flatten(1))))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cell = cls(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Split(nn.Module):
    """Convolutions of every sort, a split, a concatenation, a table."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", padding_mode="zeros")
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, output_padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("offset", torch.rand(4, 1, 1))

    def forward(self, x):
        a, b = self.stem(x).chunk(2, dim=1)
        y = F.hardswish(torch.cat([self.depthwise(a), b], 1))
        return F.max_pool2d(self.norm(self.up(y)) * self.gain + self.offset, 2)


ZOO = {
    "residual": (Residual, (3, 8, 8)),
    "writes": (Writes, (3, 8, 8)),
    "attending": (Attending, (5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (6, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (6, 4)),
    "split": (Split, (3, 6, 6)),
    "resnet20": (lambda: build("resnet20"), (3, 16, 16)),
}


@pytest.fixture(params=ZOO, scope="module")
def example(request):
    torch.manual_seed(0)
    make, shape = ZOO[request.param]
    model = randomized(make()) if request.param != "resnet20" else make()
    return model, capture_network(model, (torch.zeros(1, *shape),)), shape


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # recurrent layers keep lists of their weights
class TestEveryNetwork:
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_a_captured_network_computes_the_bits_of_its_source(self, example, batch):
        model, network, shape = example
        x = torch.randn(batch, *shape)
        assert_same_bits(run(network, (x,)), run(model, (x,)))

    def test_every_key_of_the_state_is_kept_under_its_name_or_a_noted_one(self, example):
        model, network, _ = example
        mine, source = network.state_dict(), model.state_dict()
        renamed = network.meta["renamed"]
        assert {renamed.get(key, key) for key in mine} == set(source)
        for key, value in mine.items():
            assert torch.equal(value, source[renamed.get(key, key)])
        assert {renamed.get(k, k) for k, _ in network.named_parameters()} == {k for k, _ in model.named_parameters()}

    def test_it_exports_again_and_is_still_equal(self, example):
        model, network, shape = example
        again = rerun_of(network, (torch.zeros(1, *shape),))
        x = torch.randn(3, *shape)
        assert_same_bits(run(again, (x,)), run(model, (x,)))
        assert set(again.state_dict()) == set(network.state_dict())

    def test_it_trains(self, example):
        _, network, shape = example
        assert_trains(copy.deepcopy(network), (torch.randn(4, *shape),))

    def test_it_shares_no_memory_with_its_source(self, example):
        model, network, _ = example
        theirs = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
        assert not theirs & {t.data_ptr() for t in [*network.parameters(), *network.buffers()]}

    def test_a_copy_lives_on_its_own(self, example):
        model, network, shape = example
        other = copy.deepcopy(network)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        x = torch.randn(2, *shape)
        assert_same_bits(run(network, (x,)), run(model, (x,)))
        assert list(sites(other)) == list(sites(network))
        assert other.meta["renamed"] == network.meta["renamed"]

    def test_a_saved_program_raises_to_the_same_network(self, example, tmp_path):
        model, network, shape = example
        program = export_module(model, (torch.zeros(1, *shape),))
        torch.export.save(program, tmp_path / "network.pt2")
        loaded = capture_network(torch.export.load(tmp_path / "network.pt2"))
        assert list(sites(loaded)) == list(sites(network))
        assert set(loaded.state_dict()) == set(network.state_dict())
        x = torch.randn(2, *shape)
        assert_same_bits(run(loaded, (x,)), run(model, (x,)))

    def test_sites_are_unique_and_name_their_kind(self, example):
        _, network, _ = example
        operators = [n for n in network.graph.nodes if n.op in ("call_module", "call_function")]
        assert len(sites(network)) == len(operators)
        assert all(kind(network, n) for n in operators)


def test_layers_are_modules_under_their_own_names():
    network = capture_network(Split(), (torch.zeros(1, 3, 6, 6),))
    types = {name: type(network.get_submodule(name)) for name in ("stem", "depthwise", "up", "norm")}
    assert types == {"stem": nn.Conv2d, "depthwise": nn.Conv2d, "up": nn.ConvTranspose2d, "norm": nn.GroupNorm}
    assert network.get_submodule("depthwise").groups == 4
    assert network.get_submodule("stem").padding == "same"
    assert not network.training


def test_the_source_keeps_its_training_flags_and_gradients():
    model = build("resnet20").train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    flags = {name: m.training for name, m in model.named_modules()}
    network = capture_network(model, (torch.zeros(1, 3, 16, 16),))
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert not network.get_submodule("conv1").weight.requires_grad
    assert network.get_submodule("classifier").weight.requires_grad


def test_a_failed_export_gives_the_flags_back_too():
    model = Branches().train()
    with raises_case(ExportError, "control-flow"):
        capture_network(model, (torch.zeros(1, 3),))
    assert all(m.training for m in model.modules())


def test_a_layer_called_twice_is_one_module_with_two_sites():
    network = capture_network(Residual(), (torch.zeros(1, 3, 8, 8),))
    by_site = sites(network)
    assert [name for name in by_site if "conv" in name or "bn" in name] == ["conv", "bn", "conv@1", "bn@1"]
    assert by_site["conv"].target == by_site["conv@1"].target == "conv"
    assert "/add#0" in by_site
    assert [kind(network, n) for n in by_site.values()][:3] == ["conv", "batch_norm", "relu"]


def test_in_place_operators_leave_the_inputs_alone():
    class Doubles(nn.Module):
        def forward(self, x):
            x += 1
            return x * 2

    network = capture_network(Doubles(), (torch.zeros(1, 3),))
    x = torch.zeros(2, 3)
    assert torch.equal(network(x), torch.full((2, 3), 2.0))
    assert torch.equal(x, torch.zeros(2, 3))


@pytest.mark.parametrize("view", [lambda x: x.view(-1, 2), lambda x: x.chunk(2, 1)[1], lambda x: x[:, 1:]])
def test_a_view_taken_before_sees_what_is_written_after(view):
    class Late(nn.Module):
        def forward(self, x):
            seen = view(x)
            x += 1
            return seen * 2

    network = capture_network(Late(), (torch.zeros(1, 4),))
    x = torch.randn(3, 4)
    before = x.clone()
    assert torch.equal(network(x), view(before + 1) * 2)
    assert torch.equal(x, before)
    assert torch.equal(rerun_of(network, (before,))(x), view(before + 1) * 2)


def test_numbers_written_in_the_forward_are_kept():
    class Scales(nn.Module):
        def forward(self, x):
            x = x * torch.tensor([1.0, 2.0, 3.0])
            x[:, 0] = 5
            return x

    network = capture_network(Scales(), (torch.zeros(1, 3),))
    expected = torch.tensor([[5.0, 2.0, 3.0]] * 2)
    assert torch.equal(network(torch.ones(2, 3)), expected)
    assert torch.equal(copy.deepcopy(network)(torch.ones(2, 3)), expected)
    assert torch.equal(rerun_of(network, (torch.ones(2, 3),))(torch.ones(2, 3)), expected)


class TestWritingToAView:
    """The exporter then takes layers apart; they come back whole."""

    @pytest.fixture
    def pair(self):
        torch.manual_seed(0)
        model = randomized(Writes())
        model.bn.num_batches_tracked.fill_(7)
        return model, capture_network(model, (torch.zeros(1, 3, 8, 8),))

    def test_batch_norms_stay_modules(self, pair):
        model, network = pair
        for name in ("bn", "norm"):
            mine, theirs = network.get_submodule(name), model.get_submodule(name)
            assert type(mine) is type(theirs)
            assert (mine.eps, mine.momentum) == (theirs.eps, theirs.momentum)
            assert torch.equal(mine.num_batches_tracked, theirs.num_batches_tracked)
        assert set(network.state_dict()) == set(model.state_dict())
        assert "bn" in sites(network) and "norm" in sites(network)
        assert kind(network, sites(network)["bn"]) == "batch_norm"

    def test_their_statistics_train_as_the_sources_do(self, pair):
        model, network = pair
        x = torch.randn(6, 3, 8, 8)
        model.train()
        network.train()
        with torch.no_grad():
            model(x.clone())
            network(x.clone())
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(network.get_submodule("bn"), key), getattr(model.bn, key))
        assert int(model.bn.num_batches_tracked) == 8

    def test_dropout_still_drops_in_training(self, pair):
        _, network = pair
        assert isinstance(network.get_submodule("drop"), nn.Dropout)
        assert network.get_submodule("drop").p == 0.4
        x = torch.randn(4, 3, 8, 8)
        network.eval()
        network.get_submodule("drop").train()
        assert not torch.equal(network(x), network(x))


class TestFusedAttention:
    def test_the_projection_is_a_layer_and_its_new_keys_are_noted(self):
        model = Attending()
        network = capture_network(model, (torch.zeros(1, 5, 8),))
        assert isinstance(network.get_submodule("attend.in_proj"), nn.Linear)
        assert network.meta["renamed"] == {
            "attend.in_proj.weight": "attend.in_proj_weight",
            "attend.in_proj.bias": "attend.in_proj_bias",
        }
        assert copy.deepcopy(copy.deepcopy(network)).meta["renamed"] == network.meta["renamed"]

    def test_nothing_is_noted_where_nothing_was_renamed(self):
        assert capture_network(build("resnet20"), (torch.zeros(1, 3, 8, 8),)).meta["renamed"] == {}

    @pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 6}], ids=["one", "three"])
    def test_query_and_key_of_their_own(self, sizes):
        class Cross(nn.Module):
            def __init__(self):
                super().__init__()
                self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

            def forward(self, x, memory):
                return self.attend(x, memory, memory)

        torch.manual_seed(0)
        model, width = Cross(), 6 if sizes else 8
        network = capture_network(model, (torch.zeros(1, 5, 8), torch.zeros(1, 7, width)))
        inputs = (torch.randn(3, 5, 8), torch.randn(3, 7, width))
        assert_same_bits(run(network, inputs), run(model, inputs))
        renamed = network.meta["renamed"]
        assert {renamed.get(k, k) for k in network.state_dict()} == set(model.state_dict())
        assert_trains(network, inputs)


class TestForms:
    """Inputs and outputs in all the forms that a forward may have."""

    def test_outputs_keep_their_structure(self):
        model = randomized(Residual())
        network = capture_network(model, (torch.zeros(1, 3, 8, 8),))
        out = run(network, (torch.randn(2, 3, 8, 8),))
        assert set(out) == {"pooled", "map"}
        assert out["pooled"].shape == (2, 3)

    def test_keyword_inputs(self):
        class Two(nn.Module):
            def forward(self, left, right, scale=2.0):
                return (left @ right.transpose(1, 2)) * scale, right

        call = {"right": torch.zeros(1, 4, 3), "left": torch.zeros(1, 5, 3)}
        network = capture_network(Two(), (), call)
        more = {"right": torch.randn(6, 4, 3), "left": torch.randn(6, 5, 3)}
        out = run(network, (), more)
        assert isinstance(out, tuple)
        assert_same_bits(out, run(Two(), (), more))
        placeholders = [n.name for n in network.graph.nodes if n.op == "placeholder"]
        assert placeholders == ["right", "left"] or placeholders == ["left", "right"]
        named = dict(zip(placeholders, flat_inputs(network, ((), more)), strict=True))
        assert all(torch.equal(named[name], more[name]) for name in more)
        assert_same_bits(run(rerun_of(network, (), call), (), more), out)

    def test_a_positional_and_a_keyword_input(self):
        class Two(nn.Module):
            def forward(self, x, *, offset):
                return x + offset

        network = capture_network(Two(), (torch.zeros(1, 3),), {"offset": torch.zeros(1, 3)})
        x, offset = torch.randn(4, 3), torch.randn(4, 3)
        assert torch.equal(network(x, offset=offset), x + offset)

    def test_starred_inputs(self):
        class Sum(nn.Module):
            def forward(self, *parts):
                return parts[0] + 2 * parts[1]

        call = (torch.zeros(1, 3), torch.zeros(1, 3))
        assert input_names(Sum(), call, {}) == ["parts_0", "parts_1"]
        network = capture_network(Sum(), call)
        a, b = torch.randn(4, 3), torch.randn(4, 3)
        assert torch.equal(network(a, b), a + 2 * b)

    def test_a_nested_input(self):
        class Pair(nn.Module):
            def forward(self, pair):
                return pair[0] - pair[1]

        network = capture_network(Pair(), ((torch.zeros(1, 3), torch.zeros(1, 3)),))
        a, b = torch.randn(4, 3), torch.randn(4, 3)
        assert torch.equal(network((a, b)), a - b)

    def test_an_example_that_does_not_fit_the_forward(self):
        with raises_case(TaskError, "misfit") as caught:
            capture_network(nn.Linear(3, 2), (torch.zeros(1, 3), torch.zeros(1, 3)))
        assert caught.value.got.startswith("2 positional") and "forward(input" in caught.value.expected
        assert caught.value.remedy
        with raises_case(TaskError, "misfit"):
            capture_network(nn.Linear(3, 2), (), {"image": torch.zeros(1, 3)})


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, words, weights):
        return self.head((self.table(words) * weights.unsqueeze(-1)).mean(1))


class TestDynamicAxes:
    call = (torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8))

    def words(self, batch, length):
        return torch.randint(0, 20, (batch, length)), torch.rand(batch, length)

    @pytest.mark.parametrize("keys", [("words", "weights"), (0, 1)], ids=["names", "positions"])
    def test_another_axis_by_name_or_position(self, keys):
        axes = {0: "batch", 1: "length"}
        model = Pooled()
        network = capture_network(model, self.call, dynamic=dict.fromkeys(keys, axes))
        for batch, length in ((1, 8), (3, 5), (2, 31)):
            inputs = self.words(batch, length)
            assert_same_bits(run(network, inputs), run(model, inputs))

    def test_a_length_that_is_not_named_is_fixed(self):
        program = export_module(Pooled(), self.call)
        with pytest.raises(AssertionError):
            program.module()(*self.words(2, 9))
        assert program.module()(*self.words(7, 8)).shape == (7, 2)

    def test_an_empty_mapping_fixes_every_axis(self):
        class Flat(nn.Module):
            def forward(self, x):
                return x.reshape(x.shape[0] * 3)

        network = capture_network(Flat(), (torch.zeros(1, 3),), dynamic={})
        assert network(torch.ones(1, 3)).shape == (3,)
        literals = [n.args[1] for n in network.graph.nodes if n.op == "call_function"]
        assert literals == [[3]]  # no arithmetic on sizes is left, and the example of 1 stayed 1

    def test_an_unknown_name_is_refused(self):
        with raises_case(TaskError, "unknown-input") as caught:
            capture_network(Pooled(), self.call, dynamic={"images": {0: "batch"}})
        assert caught.value.got == "'images'" and "words" in caught.value.expected
        with raises_case(TaskError, "unknown-input"):
            capture_network(Pooled(), self.call, dynamic={2: {0: "batch"}})

    def test_an_axis_may_be_limited_by_a_table_of_positions(self):
        class Placed(Pooled):
            def __init__(self):
                super().__init__()
                self.places = nn.Parameter(torch.randn(12, 6))

            def forward(self, words, weights):
                y = self.table(words) + self.places[: words.shape[1]]
                return self.head((y * weights.unsqueeze(-1)).mean(1))

        model, dynamic = Placed(), dict.fromkeys((0, 1), {0: "batch", 1: "length"})
        network = capture_network(model, self.call, dynamic=dynamic)
        again = rerun_of(network, self.call, dynamic=dynamic)
        for batch, length in ((1, 2), (4, 12)):
            inputs = self.words(batch, length)
            assert_same_bits(run(network, inputs), run(model, inputs))
            assert_same_bits(run(again, inputs), run(model, inputs))

    def test_an_axis_that_the_network_fixes_is_an_error(self):
        class Fixed(nn.Module):
            def forward(self, x):
                return x.reshape(-1, 12)[:, :3] + x[:, :1, 0]

        with raises_case(ExportError, "fixed-size") as caught:
            capture_network(Fixed(), (torch.zeros(1, 3, 4),), dynamic={0: {0: "batch", 1: "length"}})
        assert "length" in caught.value.got

    def test_an_example_of_one_sample_does_not_fix_the_batch(self):
        network = capture_network(nn.Flatten(), (torch.zeros(1, 3, 4),))
        assert network(torch.zeros(9, 3, 4)).shape == (9, 12)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:  # depends on the data
            y = -y
        return y


class TestWhatCannotBeExported:
    def test_control_flow_on_data_names_the_users_line(self):
        with raises_case(ExportError, "control-flow") as caught:
            capture_network(nn.Sequential(Branches()), (torch.zeros(1, 3),))
        assert "test_network.py" in caught.value.what
        assert "if y.sum() > 0" in caught.value.what

    def test_the_users_line_is_named_whatever_its_folder_is_called(self, tmp_path):
        folder = tmp_path / "penjing" / "torch"
        folder.mkdir(parents=True)
        text = "from torch import nn\n\nclass Net(nn.Module):\n    def forward(self, x):\n        return x.item() + x\n"
        (folder / "net.py").write_text(text, encoding="utf-8")
        network = load_named(str(folder / "net.py"), "Net", error=AssertionError, role="source")()
        with raises_case(ExportError, "untraceable") as caught:
            capture_network(nn.Sequential(network), (torch.zeros(1, 1),))
        assert "net.py:5: return x.item() + x" in caught.value.what

    def test_a_forward_that_fails(self):
        with raises_case(ExportError, "untraceable") as caught:
            capture_network(Branches(), (torch.zeros(1, 7),))
        assert "self.linear(x)" in caught.value.what


class TestTransformers:
    """Architectures of a library that is not ours, from small configurations."""

    def test_vit(self):
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
        model = ViTModel(config).eval()
        network = capture_network(model, (torch.zeros(1, 3, 32, 32),))
        x = torch.randn(5, 3, 32, 32)
        assert_same_bits(run(network, (x,)), run(model, (x,)))
        assert set(network.state_dict()) == set(model.state_dict())
        assert_same_bits(run(rerun_of(network, (x,)), (x,)), run(model, (x,)))
        assert_trains(network, (x,))

    def test_tied_weights_stay_tied(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=99, use_cache=False)).eval()
        ids = {"input_ids": torch.randint(0, 99, (1, 12))}
        network = capture_network(model, (), ids)
        more = {"input_ids": torch.randint(0, 99, (5, 12))}
        assert_same_bits(run(network, (), more), run(model, (), more))
        for one in (network, copy.deepcopy(network)):
            assert one.get_submodule("lm_head").weight is one.get_submodule("transformer.wte").weight
        assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
class TestRealWeights:
    def test_efficientnet_lite0(self):
        model = data.lite0()
        x = torch.randn(2, 3, 224, 224)
        network = capture_network(model, (x[:1],))
        assert_same_bits(run(network, (x,)), run(model, (x,)))
        assert set(network.state_dict()) == set(model.state_dict())
        assert_same_bits(run(rerun_of(network, (x,)), (x,)), run(model, (x,)))
        assert_trains(network, (x,))

    def test_minilm(self):
        from transformers import AutoModel

        model = AutoModel.from_pretrained(data.minilm()).eval()
        ids = torch.randint(0, 1000, (1, 16))
        axes = {0: "batch", 1: "length"}
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        network = capture_network(model, (), call, dynamic=dict.fromkeys(call, axes))
        mask = (torch.arange(23) < torch.tensor([[23], [9], [17]])).long()
        more = {"input_ids": torch.randint(0, 1000, (3, 23)), "attention_mask": mask}
        assert_same_bits(run(network, (), more), run(model, (), more))
        stored = {*model.state_dict(), *(name for name, _ in model.named_buffers())}  # positions are not in the state
        assert set(network.state_dict()) <= stored
        assert_trains(network, (), more)


class TestReading:
    """The small questions that other code asks of a captured network."""

    def test_shapes_are_those_of_a_real_run_and_touch_nothing(self):
        network = capture_network(Writes(), (torch.zeros(1, 3, 8, 8),)).train()
        before = {k: v.clone() for k, v in network.state_dict().items()}
        values = shapes(network, ((torch.zeros(6, 3, 8, 8),), {}))
        assert tuple(values["x"].shape) == (6, 3, 8, 8)
        (linear,) = [n for n in network.graph.nodes if kind(network, n) == "linear"]
        assert tuple(values[linear.name].shape) == (6, 5)
        assert network.training
        assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())

    def test_ports_are_tensors_in_the_order_of_the_operator(self):
        class Cat(nn.Module):
            def forward(self, a, b, c):
                return torch.cat([b, a, c.reshape(a.shape[0], -1)], 1)

        network = capture_network(Cat(), (torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2, 2)))
        by_site = sites(network)
        assert [site(n) for n in tensor_inputs(by_site["/cat#0"])] == ["b", "a", "/reshape#0"]
        assert [site(n) for n in tensor_inputs(by_site["/reshape#0"])] == ["c"]  # the size is no port

    def test_arguments_carry_their_names_and_defaults(self):
        class Pool(nn.Module):
            def forward(self, x):
                return F.max_pool2d(x, 3, padding=1)

        network = capture_network(Pool(), (torch.zeros(1, 1, 9, 9),))
        (pool,) = sites(network).values()
        a = arguments(pool)
        assert (a["kernel_size"], a["padding"], a["ceil_mode"]) == ([3, 3], [1, 1], False)
        assert a["dilation"] == [1, 1] or a["dilation"] == 1

    @pytest.mark.parametrize(
        ("operator", "expected"),
        [
            (lambda x: x.mean((2, 3)), "avg_pool"),
            (lambda x: x.mean((-1, -2), keepdim=True), "avg_pool"),
            (lambda x: F.adaptive_avg_pool2d(x, 1), "avg_pool"),
            (lambda x: x.mean(1), "mean"),
            (F.relu6, "clip"),
            (lambda x: x.clamp(0, 6), "clip"),
            (lambda x: x.flatten(1), "reshape"),
            (lambda x: x.permute(0, 2, 3, 1), "transpose"),
            (lambda x: x @ x, "matmul"),
        ],
    )
    def test_kinds_of_functional_operators(self, operator, expected):
        class One(nn.Module):
            def forward(self, x):
                return operator(x)

        network = capture_network(One(), (torch.zeros(1, 4, 6, 6),))
        assert [kind(network, n) for n in sites(network).values()] == [expected]


LAYERS = st.sampled_from(["conv", "bn", "relu", "pool", "average", "add"])


class Stack(nn.Module):
    def __init__(self, layers, inplace):
        super().__init__()
        self.names = layers
        self.inplace = inplace
        make = {"conv": lambda: nn.Conv2d(4, 4, 3, padding=1), "bn": lambda: nn.BatchNorm2d(4)}
        make |= {"relu": lambda: nn.ReLU(inplace), "pool": lambda: nn.MaxPool2d(3, 1, 1)}
        make |= {"average": lambda: nn.AvgPool2d(3, 1, 1), "add": nn.Identity}
        self.layers = nn.ModuleList(make[name]() for name in layers)
        self.head = nn.Linear(4 * 25, 3)

    def forward(self, x):
        skip = x
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(x)
            if name == "add":
                x += skip
                if self.inplace:
                    x[:, 1:3] *= 0.5
                skip = x
        return self.head(x.flatten(1))


@settings(max_examples=12, deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=6), st.booleans(), st.integers(1, 4))
def test_any_small_stack_is_equal_to_the_bit(layers, inplace, batch):
    torch.manual_seed(len(layers))
    model = randomized(Stack(layers, inplace))
    network = capture_network(model, (torch.zeros(1, 4, 5, 5),))
    x = torch.randn(batch, 4, 5, 5)
    assert_same_bits(run(network, (x,)), run(model, (x,)))
    assert set(network.state_dict()) == set(model.state_dict())
