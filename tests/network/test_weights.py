"""Fingerprints of weights stand in records, requests and names of files: they stay what they were."""

import torch
from torch import nn

from penjing.network.capture import capture_network
from penjing.network.weights import fingerprint, fingerprint_by_name, fingerprint_with_graph


class Mixed(nn.Module):
    """Its tensors are not in the order of their names, and have three types."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.arange(6.0).reshape(2, 3).to(torch.bfloat16))
        self.register_buffer("a", torch.tensor([True, False]))
        self.c = nn.Linear(2, 1)
        with torch.no_grad():
            self.c.weight.fill_(0.5)
            self.c.bias.fill_(-1)


def test_what_stands_in_files_is_found_again():
    assert fingerprint(Mixed()) == "cd9c81aa606890a2388d91a23357803a1e8ca6199e2c7923d4741cd0e101159a"
    one = "2ca6c6118e73cea281d2111a56b6d89335a5a87a8fb8f52a332526fe7c8692c9"
    two = "f3c7ad4db93cd28815a882d4bfde39740339deed4802b0197ad990f16903b6db"
    assert fingerprint_by_name([Mixed()]) == one
    assert fingerprint_by_name([Mixed(), Mixed()]) == two


def test_how_a_tensor_lies_in_memory_does_not_count():
    turned = Mixed()
    turned.b.data = turned.b.data.T.contiguous().T
    assert not turned.b.is_contiguous() and fingerprint(turned) == fingerprint(Mixed())


def test_operators_count_where_the_graph_is_asked_for():
    def captured(activation):
        torch.manual_seed(0)
        return capture_network(nn.Sequential(nn.Linear(2, 2), activation).eval(), (torch.zeros(1, 2),))

    one, same, other = captured(nn.ReLU()), captured(nn.ReLU()), captured(nn.Sigmoid())
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint_with_graph(one) == fingerprint_with_graph(same) != fingerprint_with_graph(other)
    with torch.no_grad():
        next(same.parameters()).add_(1)
    assert fingerprint_with_graph(one) != fingerprint_with_graph(same)
