"""Fourier transforms as matrix products: torch's own values in torch, and in both runtimes at another batch size."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.network.graph import operator_name
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: the lowest frequencies are mixed by complex weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 5, dtype=torch.cfloat) / 4)
        self.p, self.o = nn.Conv1d(3, 6, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x = self.p(x)
        mixed = torch.zeros(x.shape[0], 8, x.shape[-1] // 2 + 1, dtype=torch.cfloat)
        mixed[:, :, :5] = torch.einsum("bix,iox->box", torch.fft.rfft(x)[:, :, :5], self.w)
        return self.o(F.gelu(torch.fft.irfft(mixed, n=x.shape[-1])))


class SpectralPlane(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(3, 8, 4, 4, dtype=torch.cfloat) / 4) for _ in "ab")
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        f = torch.fft.rfft2(x)
        mixed = torch.zeros(x.shape[0], 8, x.shape[-2], x.shape[-1] // 2 + 1, dtype=torch.cfloat)
        mixed[:, :, :4, :4] = torch.einsum("bixy,ioxy->boxy", f[:, :, :4, :4], self.a)
        mixed[:, :, -4:, :4] = torch.einsum("bixy,ioxy->boxy", f[:, :, -4:, :4], self.b)
        return self.o(torch.fft.irfft2(mixed, s=x.shape[-2:]))


class GlobalFilter(nn.Module):
    """Weights stored as pairs; the axes that are transformed are not the last ones."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(12, 7, 3, 2) / 4), nn.Linear(3, 2)

    def forward(self, x):
        f = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.w)
        return self.o(torch.fft.irfft2(f, s=(12, 12), dim=(1, 2), norm="ortho"))


class LongConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x, n=32) * torch.fft.rfft(self.k, n=32), n=32)[..., :16]


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def function(apply):
    return lambda: Called(apply)


def shifted(x):
    f = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) * torch.linspace(0, 1, 15)
    return torch.fft.ifft2(torch.fft.ifftshift(f, dim=(-2, -1))).real


def autocorrelation(x):
    f = torch.fft.rfft(x)
    return torch.fft.irfft(f * f.conj())


LAYERS = {
    "a spectral layer": (Spectral, (3, 16)),
    "in two dimensions": (SpectralPlane, (3, 12, 12)),
    "a global filter": (GlobalFilter, (3, 12, 12)),
    "a long convolution": (LongConvolution, (3, 16)),
    "mixing of tokens": (function(lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real), (5, 8)),
    "sizes and angles": (function(lambda x: torch.cat([torch.fft.rfft(x).abs(), torch.fft.rfft(x).imag], 1)), (3, 9)),
    "the middle in the middle": (function(shifted), (4, 15)),
    "autocorrelation": (function(autocorrelation), (3, 16)),
    "three axes": (function(lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2, 3)), (4, 5, 6))), (4, 5, 6)),
}


def transformed(network):
    return [node for node in network.graph.nodes if operator_name(node).startswith("fft_")]


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_values_in_torch_and_in_the_runtimes(name, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    net, x = make().eval(), torch.randn(5, *shape)
    network = capture_network(net, (torch.randn(2, *shape),))
    assert not transformed(network)
    with torch.no_grad():
        answer = net(x)
        torch.testing.assert_close(network(x), answer, rtol=1e-4, atol=1e-4)
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        task = Task(example=torch.randn(2, *shape))
        build(Draft(network), runtime, "fp32", task, flatten_outputs(answer)[1], folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        np.testing.assert_allclose(predict(x.numpy()), answer.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("norm", "size"), list(itertools.product((None, "ortho", "forward"), (None, 6, 11))))
def test_every_transform_has_torchs_values_whatever_its_norm_and_length(norm, size):
    sides = None if size is None else (size, 5)
    forward = [
        lambda x: torch.fft.fft(x, size, -2, norm),
        lambda x: torch.fft.rfft(x, size, 1, norm),
        lambda x: torch.fft.fft2(x, sides, norm=norm),
        lambda x: torch.fft.rfft2(x, sides, norm=norm),
        lambda x: torch.fft.fftn(x, sides, (1, 2), norm),
        lambda x: torch.fft.rfftn(x, sides, (1, 2), norm),
    ]
    back = [
        lambda f: torch.fft.ifft(f, size, -2, norm),
        lambda f: torch.fft.ifft2(f, sides, norm=norm),
        lambda f: torch.fft.ifftn(f, sides, (1, 2), norm),
        lambda f: torch.fft.irfft(f, size, -1, norm) + 0j,
        lambda f: torch.fft.irfft2(f, sides, norm=norm) + 0j,
        lambda f: torch.fft.irfftn(f, sides, (1, 2), norm) + 0j,
    ]

    def every(x):
        f = torch.complex(x, x.flip(1).sin())
        parts = [way(x) for way in forward] + [way(f) for way in back]
        return tuple(torch.view_as_real(part) for part in parts)

    x = torch.randn(2, 7, 8)
    network = capture_network(Called(every).eval(), (x,))
    assert not transformed(network)
    for given, expected in zip(network(x), every(x), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_the_weights_train_and_the_waves_do_not():
    network = capture_network(Spectral(), (torch.randn(2, 3, 16),)).train()
    network(torch.randn(4, 3, 16)).square().sum().backward()
    trained = {name.partition("_")[0].partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"w", "p", "o"}
    assert all(p.grad.any() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(("length", "dynamic"), [(16, {0: {0: "batch", 2: "length"}}), (5000, None)])
def test_a_length_that_varies_or_is_long_is_left_to_the_runtimes_exporter(length, dynamic):
    net = Called(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=x.shape[-1])).eval()
    x = torch.randn(2, 1, length)
    network = capture_network(net, (x,), dynamic=dynamic)
    assert len(transformed(network)) == 2
    torch.testing.assert_close(network(x), net(x))
