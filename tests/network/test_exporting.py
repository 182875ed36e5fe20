"""Exporting: sizes that vary, and what is advised where a network can't be exported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.network.exporting import export, export_module, input_names
from tests.raises import raises_case


def rerun_of(network, args, dynamic):
    return capture_network(export(network, (args, {}), dynamic))


class TestRemedies:
    """What an error advises is done, and then it exports."""

    def test_a_branch_on_values_is_written_with_where_or_cond(self):
        class Branch(nn.Module):
            def forward(self, x):
                return x * 2 if x.sum() > 0 else x

        class Where(nn.Module):
            def forward(self, x):
                return torch.where(x.sum() > 0, x * 2, x)

        class Cond(nn.Module):
            def forward(self, x):
                return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 0.0, (x,))

        with raises_case(ExportError, "control-flow"):
            capture_network(Branch(), (torch.zeros(1, 3),))
        for remedy in (Where(), Cond()):
            network = capture_network(remedy, (torch.zeros(1, 3),))
            for x in (torch.ones(4, 3), -torch.ones(4, 3)):
                assert torch.equal(network(x), Branch()(x))

    @pytest.mark.parametrize("fixed", [lambda x: x.reshape(1, 12), lambda x: x.reshape(2, 12)], ids=["one", "two"])
    def test_a_size_that_is_written_as_a_number(self, fixed):
        class Fixed(nn.Module):
            def forward(self, x):
                return fixed(x)

        class Free(nn.Module):
            def forward(self, x):
                return x.flatten(1)

        with raises_case(ExportError, "fixed-size"):
            capture_network(Fixed(), (torch.zeros(2, 3, 4),))
        assert capture_network(Free(), (torch.zeros(2, 3, 4),))(torch.ones(5, 3, 4)).shape == (5, 12)

    def test_fixed_sizes_are_the_other_remedy(self):
        class Fixed(nn.Module):
            def forward(self, x):
                return x.reshape(2, 12) + x.flatten(1)

        with raises_case(ExportError, "fixed-size"):
            capture_network(Fixed(), (torch.zeros(2, 3, 4),))
        network = capture_network(Fixed(), (torch.zeros(2, 3, 4),), dynamic={})
        assert network(torch.ones(2, 3, 4)).shape == (2, 12)

    def test_anything_else_points_at_torch_export(self):
        class Foreign(nn.Module):
            def forward(self, x):
                return torch.from_numpy(x.numpy() * 2)

        with raises_case(ExportError, "untraceable"):
            capture_network(Foreign(), (torch.zeros(1, 3),))


class TestMultiples:
    """Axes that may be multiples of a number alone."""

    class Blocks(nn.Module):
        def forward(self, x):
            return F.pixel_unshuffle(x, 2), F.pixel_unshuffle(x, 4).mean((2, 3))

    def test_they_vary_as_multiples_and_export_again(self):
        free = {"x": {0: "batch", 2: "height", 3: "width"}}
        network = capture_network(self.Blocks(), (torch.zeros(2, 3, 16, 8),), dynamic=free)
        for again in (network, rerun_of(network, (torch.zeros(2, 3, 16, 8),), free)):
            x = torch.randn(3, 3, 8, 20)
            for mine, right in zip(again(x), self.Blocks()(x), strict=True):
                assert torch.equal(mine, right)

    def test_a_batch_may_not_be_one(self):
        class Pairs(nn.Module):
            def forward(self, x):
                return F.pixel_unshuffle(x.movedim(0, 2), 2)

        with raises_case(ExportError, "fixed-size"):
            capture_network(Pairs(), (torch.zeros(4, 3, 8, 8),))


@pytest.mark.parametrize("number", [lambda x: x.shape[0], lambda x: x.numel() // 2, lambda x: x.shape[0] / 2])
def test_an_output_that_is_a_number_of_the_sizes_is_refused_with_its_line(number):
    class Sizes(nn.Module):
        def forward(self, x):
            return x * 2, number(x)

    with raises_case(ExportError, "number"):
        capture_network(Sizes(), (torch.zeros(2, 3),))
    assert capture_network(Sizes(), (torch.zeros(2, 3),), dynamic={})(torch.ones(2, 3))[1] == number(torch.ones(2, 3))


class FreeHeight(nn.Module):
    """Strides beside a pool: torch can't prove that both give one height."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.short, self.head = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        return self.head(torch.relu(self.conv(x) + self.short(x)).mean((2, 3)))


def test_free_sizes_in_strided_residual_networks():
    net = FreeHeight().eval()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    network = capture_network(net, (torch.zeros(1, 3, 32, 32),), dynamic=axes)
    again = rerun_of(network, (torch.zeros(1, 3, 32, 32),), dynamic=axes)
    for height, width in ((32, 32), (45, 31), (17, 64)):
        x = torch.randn(2, 3, height, width)
        assert torch.equal(network(x), net(x))
        assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM])
def test_a_recurrent_layer_of_any_length_is_refused_with_what_can_be_done(make):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = make(4, 4, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0]

    with raises_case(ExportError, "recurrent-length"):
        export_module(Tagger(), (torch.zeros(2, 6, 4),), {}, {"x": {0: "batch", 1: "time"}})
    fixed = export_module(Tagger(), (torch.zeros(2, 6, 4),), {}, {"x": {0: "batch"}})
    assert fixed.module()(torch.zeros(5, 6, 4)).shape == (5, 6, 4)


class Encoder(nn.Module):
    def __init__(self, **causal):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        self.layers, self.causal = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), causal

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.layers(tokens, mask=mask, **self.causal)


def test_a_mask_whose_values_torch_would_compare_is_refused_with_what_to_say():
    free = {"tokens": {0: "batch", 1: "length"}}
    with raises_case(ExportError, "causal-mask"):
        export_module(Encoder(), (torch.zeros(2, 6, 8),), {}, free)
    told = Encoder(is_causal=True)
    program = export_module(told, (torch.zeros(2, 6, 8),), {}, free)
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(program.module()(x), told.eval()(x))


def test_a_remedy_calls_the_input_by_its_name():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.GRU(4, 4, batch_first=True)

        def forward(self, frames):
            return self.cells(frames)[0]

    with raises_case(ExportError, "recurrent-length") as error:
        export_module(Tagger(), (torch.zeros(2, 6, 4),), {}, {"frames": {0: "batch", 1: "time"}})
    assert "{'frames': {0: 'batch'}}" in error.value.remedy


def test_inputs_that_a_forward_collects_by_name_have_to_be_named():
    class Collects(nn.Module):
        def forward(self, **inputs):
            return inputs["a"] * inputs["b"]

    with raises_case(ExportError, "unnamed-inputs"):
        export_module(Collects(), (), {name: torch.ones(2, 4) for name in ("a", "b")})


def test_inputs_that_a_forward_collects_stand_behind_those_it_names():
    class Sums(nn.Module):
        def forward(self, first, *others):
            return first + sum(others)

    example = tuple(torch.ones(2, 4) for _ in range(3))
    assert input_names(Sums(), example, {}) == ["first", "others_0", "others_1"]
    network = capture_network(Sums(), example)
    assert torch.equal(network(*[torch.ones(5, 4)] * 3), torch.full((5, 4), 3.0))


def test_two_inputs_of_one_name_are_refused():
    class Twice(nn.Module):
        def forward(self, x_0, *x):
            return x_0 + x[0]

    with raises_case(ExportError, "same-name") as error:
        capture_network(Twice(), (torch.ones(2, 4), torch.ones(2, 4)))
    assert "x_0" in error.value.got and "x_0" in error.value.remedy


def test_a_tensor_computed_from_weights_before_the_call_is_a_constant():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Linear(4, 4).weight[0] * 2  # neither a parameter nor a leaf

        def forward(self, x):
            return x + self.shift

    module = Shifts()
    network = copy.deepcopy(capture_network(module, (torch.ones(2, 4),)))
    assert torch.equal(network(torch.ones(3, 4)), module(torch.ones(3, 4)))
    assert module.shift.requires_grad
