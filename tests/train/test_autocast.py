"""What a training's forward pass computes in bfloat16, and what stays in 32 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.steps.step import Context
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune, train
from penjing.train.precision import bf16_pays, caster

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
DEPTHWISE, GROUPED, DENSE = (torch.full((8, n, 3, 3), 0.1) for n in (1, 4, 8))


def depthwise_net():
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def cast():
    return caster("bf16", depthwise_net(), "cpu")


class TestDepthwise:
    @pytest.mark.parametrize(
        "convolve",
        [
            lambda x: F.conv2d(x, DEPTHWISE, None, 1, 0, 1, 8),
            lambda x: F.conv2d(x, weight=DEPTHWISE, groups=8),
            lambda x: F.conv2d(input=x, weight=DEPTHWISE, groups=8),
            lambda x: F.conv2d(x, DEPTHWISE, padding="same", groups=8),
            lambda x: torch.ops.aten.conv2d.default(x, DEPTHWISE, None, [1, 1], [0, 0], [1, 1], 8),
            lambda x: torch.ops.aten.conv2d.padding(x, DEPTHWISE, None, [1, 1], "same", [1, 1], 8),
            lambda x: F.conv1d(x.flatten(2), DEPTHWISE[..., 0], groups=8),
            lambda x: F.conv3d(x[..., None], DEPTHWISE[..., None], groups=8),
            nn.Conv2d(8, 16, 3, groups=8),
            nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        ],
    )
    def test_computes_in_32_bits_and_gives_what_autocast_gives(self, cast, convolve):
        with cast():
            output = convolve(X)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, convolve(X).to(torch.bfloat16))

    def test_takes_what_a_layer_before_it_left_in_16_bits(self, cast):
        x = X.to(torch.bfloat16).requires_grad_()
        with cast():
            output = F.conv2d(x, DEPTHWISE, groups=8)
        output.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16
        assert torch.equal(output, F.conv2d(x.float(), DEPTHWISE, groups=8).to(torch.bfloat16))

    def test_doubles_stay_doubles(self, cast):
        with cast():
            assert F.conv2d(X.double(), DEPTHWISE.double(), groups=8).dtype == torch.float64


class TestTheRest:
    @pytest.mark.parametrize("weight, groups", [(GROUPED, 2), (DENSE, 1)])
    def test_other_convolutions_are_in_bfloat16(self, cast, weight, groups):
        with cast():
            assert F.conv2d(X, weight, groups=groups).dtype == torch.bfloat16

    def test_a_stem_of_one_channel_is_no_depthwise_layer(self, cast):
        with cast():
            assert F.conv2d(X[:, :1], DEPTHWISE).dtype == torch.bfloat16

    def test_layers_behind_a_depthwise_one_are_in_bfloat16(self, cast):
        with cast():
            assert depthwise_net()(X).dtype == torch.bfloat16

    def test_nothing_is_left_behind(self, cast):
        with pytest.raises(ZeroDivisionError), cast():
            1 / 0  # noqa: B018
        assert F.conv2d(X, DENSE).dtype == torch.float32

    def test_without_depthwise_layers_it_is_torch_own(self):
        assert isinstance(caster("bf16", nn.Conv2d(8, 8, 3, groups=1), "cpu")(), torch.autocast)

    @pytest.mark.parametrize("choice", ["off", "auto"])
    def test_off_and_where_bf16_does_not_pay(self, choice, monkeypatch):
        monkeypatch.setattr("penjing.train.precision.bf16_pays", lambda device: False)
        with caster(choice, depthwise_net(), "cpu")():
            assert F.conv2d(X, DENSE).dtype == torch.float32

    def test_auto_where_bf16_pays(self, monkeypatch):
        monkeypatch.setattr("penjing.train.precision.bf16_pays", lambda device: True)
        with caster("auto", depthwise_net(), "cpu")():
            assert F.conv2d(X, DENSE).dtype == torch.bfloat16

    def test_whether_it_pays_is_what_torch_says_of_the_processor(self):
        assert bf16_pays("cpu") == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class TestInTheLoop:
    def test_channels_last_orders_the_strides_of_single_channels(self, monkeypatch):
        # oneDNN takes a layer as channels-last by its strides, which a single channel leaves open.
        monkeypatch.setattr("penjing.train.loop.channels_last_pays", lambda device: True)
        seen = {}
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 2))
        task = Task(example=X[:, :1], train=[(X[:, :1], torch.tensor([0, 1]))], loss=F.cross_entropy)
        captured = capture_network(network, *task.call(), task.dynamic)
        stem, depthwise = captured.get_submodule("0"), captured.get_submodule("1")
        stem.register_forward_pre_hook(lambda module, args: seen.update(images=args[0].stride()))
        depthwise.register_forward_pre_hook(lambda module, args: seen.update(weights=module.weight.stride()))
        train(captured, Context(task=task), Finetune(steps=1, learning_rate=0.1, distill=()))
        assert seen == {"images": (36, 1, 6, 1), "weights": (9, 1, 3, 1)}
        assert depthwise.weight.stride() == (9, 9, 3, 1)  # a state dict has no strides: a run that goes on has none

    def test_volumes_stay_as_they_are(self, monkeypatch):
        monkeypatch.setattr("penjing.train.loop.channels_last_pays", lambda device: True)

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.volume, self.image = nn.Conv3d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 6)

            def forward(self, x):
                return self.image(self.volume(x).mean(2)).flatten(1)

        x = X[:, :, None].expand(-1, -1, 3, -1, -1).contiguous()
        task = Task(example=x, train=[(x, torch.tensor([0, 1]))], loss=F.cross_entropy)
        captured = capture_network(Both(), *task.call(), task.dynamic)
        before = captured.get_submodule("volume").weight.clone()
        train(captured, Context(task=task), Finetune(steps=1, learning_rate=0.1, distill=()))
        assert not torch.equal(before, captured.get_submodule("volume").weight)
