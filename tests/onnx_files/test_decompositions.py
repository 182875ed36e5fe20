"""Operators without an ONNX form are replaced node by node, by what torch's own decomposition replaces them by; what
has no rule is left to torch.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.onnx_files import decompositions, write

onnx = pytest.importorskip("onnx")

IMAGES = torch.randn(3, 4, 8, 8)

REPLACED = {
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[:, :, 0], 1),
    "adaptive_avg_pool2d to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d to four": lambda x: F.adaptive_avg_pool2d(x, 2),
    "chunk": lambda x: x.chunk(3, 1)[0] + x.chunk(3, 1)[1],
    "contiguous": lambda x: x.transpose(1, 2).contiguous() + 1,
    "to another type": lambda x: x.to(torch.int64),
    "to its own type": lambda x: x.to(torch.float32) + 1,
    "flatten": lambda x: x.flatten(1) * 2,
    "flatten in the middle": lambda x: x.flatten(1, 2) * 2,
    "flatten of nothing": lambda x: x.flatten(2, 2) * 2,
    "flatten of what is transposed": lambda x: x.transpose(1, 2).flatten(2) * 2,
    "unflatten of what is transposed": lambda x: x.transpose(1, 3).unflatten(1, (2, 4)) + 1,
    "mT": lambda x: x.mT @ x,
    "reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], 256) + 1,
    "unflatten": lambda x: x.unflatten(1, (2, 2)) + 1,
}
LAYERS = {
    "batch_norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "dropout": nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.ReLU()),
    "conv_transpose2d": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose2d in groups": nn.ConvTranspose2d(4, 4, 3, groups=2, dilation=2, bias=False),
}
LEFT_TO_TORCH = {
    "adaptive_avg_pool2d to nine": lambda x: F.adaptive_avg_pool2d(x, 3),
    "flatten of the batch": lambda x: x.flatten(0, 1).sum(1),
    "std after a flatten": lambda x: x.flatten(1).std(1),
    "reshape of nothing": lambda x: torch.cat([x[:, :0].reshape(x.shape[0], 8, 0), x[:, 0, :, :1]], 2),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def nodes(path):
    """Every node of a file: its operator, its inputs and outputs by their places, its settings."""
    graph = onnx.load(path).graph
    places = {value.name: f"input {i}" for i, value in enumerate(graph.input)}
    places |= {tensor.name: f"tensor {list(tensor.dims)} {tensor.raw_data!r}" for tensor in graph.initializer}
    listed = []
    for node in graph.node:
        places |= {name: f"value {len(places) + i}" for i, name in enumerate(node.output)}
        settings = sorted(attribute.SerializeToString() for attribute in node.attribute)
        listed.append((node.op_type, [places.get(name, "") for name in node.input], settings))
    return listed


def written(module, path, monkeypatch, torchs_own):
    """The nodes of the module's file, and for each export whether all was replaced node by node."""
    results = []
    replace_all = decompositions._replace_all
    network = capture_network(module.eval(), (IMAGES,))
    with monkeypatch.context() as patch:
        patch.setattr(write.export_cache, "recall", lambda key: None)
        patch.setattr(decompositions, "_replace_all", lambda *args: results.append(replace_all(*args)) or results[-1])
        if torchs_own:
            patch.setattr(write, "node_by_node", nullcontext)
        write.write(network, ((IMAGES,), {}), None, ["output"], path)
    return nodes(path), results


@pytest.mark.parametrize("module", [*map(Function, REPLACED.values()), *LAYERS.values()], ids=[*REPLACED, *LAYERS])
def test_the_file_is_the_one_that_torchs_own_decomposition_gives(module, tmp_path, monkeypatch):
    ours, results = written(module, tmp_path / "ours.onnx", monkeypatch, torchs_own=False)
    assert results == [True]
    torchs, results = written(module, tmp_path / "torchs.onnx", monkeypatch, torchs_own=True)
    assert results == []
    assert ours == torchs


@pytest.mark.parametrize(
    ("function", "replaced"),
    [*((function, False) for function in LEFT_TO_TORCH.values()), (lambda x: x[:, :1].expand_as(x) * x, True)],
    ids=[*LEFT_TO_TORCH, "expand_as reads its sizes elsewhere"],
)
def test_the_file_computes_the_same_for_another_batch(function, replaced, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, results = written(Function(function), tmp_path / "file.onnx", monkeypatch, torchs_own=False)
    assert results == [replaced]
    session = onnxruntime.InferenceSession(tmp_path / "file.onnx", providers=["CPUExecutionProvider"])
    for batch in (IMAGES, IMAGES[:2]):
        result = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(result), function(batch), rtol=1e-5, atol=1e-5)
