"""Convolutions with as many groups as samples: the same values in torch and in both runtimes, at any batch."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case


class DynamicConvolution(nn.Module):
    """Kernels and biases mixed per sample by a router; two groups of channels, stride and dilation."""

    def __init__(self):
        super().__init__()
        self.experts, self.biases = nn.Parameter(torch.randn(3, 8, 2, 3, 3)), nn.Parameter(torch.randn(3, 8))
        self.router, self.norm = nn.Linear(4, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        n, _, height, width = x.shape
        mix = self.router(F.adaptive_avg_pool2d(x, 1).flatten(1)).softmax(-1)
        weight = (mix @ self.experts.view(3, -1)).view(-1, 2, 3, 3)
        bias = (mix @ self.biases).view(-1)
        y = F.conv2d(x.view(1, -1, height, width), weight, bias, 2, (1, 2), (2, 1), 2 * n)
        return self.norm(y.view(n, 8, y.shape[-2], y.shape[-1]))


class OneDimension(nn.Module):
    """Lightweight kernels of each sample along a line, as many groups as channels and samples, padded to the same."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Linear(6, 12)

    def forward(self, x):
        n, channels, length = x.shape
        kernel = self.kernel(x.mean(2)).view(n * 3, 4).softmax(-1).view(n, 3, 1, 4).repeat(1, 1, 2, 1)
        y = F.conv1d(x.reshape(1, -1, length), kernel.view(-1, 1, 4), padding="same", groups=n * channels)
        return y.view(n, channels, length)


class Modulated(nn.Module):
    """A style scales the kernel of each sample; the image grows by a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.weight, self.start = nn.Parameter(torch.randn(1, 4, 6, 3, 2)), nn.Parameter(torch.randn(1, 4, 5, 5))
        self.style, self.bias = nn.Linear(7, 4), nn.Linear(7, 6)

    def forward(self, z):
        n = z.shape[0]
        weight = (self.weight * self.style(z).view(n, 4, 1, 1, 1)).view(-1, 6, 3, 2)
        x = self.start.expand(n, -1, -1, -1).reshape(1, -1, 5, 5)
        y = F.conv_transpose2d(x, weight, self.bias(z).view(-1), (2, 3), (1, 0), (1, 2), n, (1, 2))
        return y.view(n, 6, y.shape[-2], y.shape[-1])


class Correlation(nn.Module):
    """A tracker: the features of one image are the kernel for those of another."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)

    def forward(self, template, search):
        template, search = self.features(template), self.features(search)
        x = search.reshape(1, -1, search.shape[-2], search.shape[-1])
        return F.conv2d(x, template, groups=template.shape[0]).transpose(0, 1)


def numbers(*shapes):
    def inputs(batch):
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)

    return inputs


CASES = {
    DynamicConvolution: (numbers((4, 9, 8)), None),
    OneDimension: (numbers((6, 9)), None),
    Modulated: (numbers((7,)), None),
    Correlation: (numbers((3, 6, 5), (3, 10, 11)), {0: {0: "batch"}, 1: {0: "batch", 2: "height", 3: "width"}}),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_same_values_in_torch_and_in_the_runtimes(kind, tmp_path):
    torch.manual_seed(0)
    net, (data, dynamic) = kind().eval(), CASES[kind]
    network = capture_network(net, data(2), dynamic=dynamic)
    inputs = data(5)
    with torch.no_grad():
        answer = net(*inputs)
        torch.testing.assert_close(network(*inputs), answer, rtol=1e-4, atol=1e-5)
    _, structure = flatten_outputs(answer)
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(Draft(network), runtime, "fp32", Task(example=data(2), dynamic=dynamic), structure, folder)
        predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
        theirs = torch.from_numpy(predict(*[x.numpy() for x in inputs]))
        torch.testing.assert_close(theirs, answer, rtol=1e-4, atol=1e-5)


def test_they_train():
    network = capture_network(DynamicConvolution(), CASES[DynamicConvolution][0](2)).train()
    network(torch.randn(3, 4, 9, 8)).square().sum().backward()
    assert len(list(network.parameters())) == 6
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_a_kernel_whose_size_varies_is_refused_by_its_line():
    dynamic = {i: {0: "batch", 2: f"height{i}", 3: f"width{i}"} for i in range(2)}
    with raises_case(ExportError, "kernel-size") as error:
        capture_network(Correlation(), CASES[Correlation][0](2), dynamic=dynamic)
    assert re.search(r"\(test_varying_groups.py:\d+ in forward", error.value.what)


def test_a_known_number_of_groups_is_left_a_layer():
    network = capture_network(nn.Conv2d(4, 8, 3, groups=2), (torch.zeros(1, 4, 8, 8),))
    assert [node.op for node in network.graph.nodes] == ["placeholder", "call_module", "output"]
