"""Attention with a learned bias in its mask, as Swin and T5 have it: what ONNX Runtime computes from the file."""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from penjing.network.capture import capture_network
from penjing.onnx_files import write as onnx_file


class Biased(nn.Module):
    """Four heads over five tokens; every distance between two tokens has a bias for every head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.table = nn.Embedding(9, 4)
        self.register_buffer("distance", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (f(x).view(n, length, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table(self.distance).permute(2, 0, 1)[None])
        return self.out(y.transpose(1, 2).reshape(n, length, width))


def test_attention_with_a_learned_bias_is_exported(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    network = capture_network(Biased(), (x,))
    assert network.table.weight.requires_grad  # what made the exporter take two kernels
    onnx_file.write(network, ((x,), {}), None, ["y"], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    more = torch.randn(3, 5, 16)
    (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, network(more).numpy(), atol=1e-5)
