"""Complex numbers as pairs of real ones: rotary embeddings however they are written, in torch and in both runtimes."""

import pytest
import torch
from torch import nn

from penjing import runtimes
from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.pipeline.building import build
from penjing.records.manifest import read_manifest
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.raises import raises_case


def angles():
    return torch.outer(torch.arange(12.0), 100.0 ** -(torch.arange(0, 8, 2) / 8))


def turns():
    return torch.polar(torch.ones(12, 4), angles())


def pairs(x):
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


class Attention(nn.Module):
    """One layer of attention whose queries and keys go through `turn`."""

    def __init__(self, turn, **stored):
        super().__init__()
        self.embedding, self.qkv, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 5)
        self.turn = turn
        for name, value in stored.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=not name.startswith("made"))

    def forward(self, ids):
        n, length = ids.shape
        q, k, v = self.qkv(self.embedding(ids)).view(n, length, 3, 2, 8).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (self.turn(self, q), self.turn(self, k), v))
        attended = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(n, length, 16))


def llama(self, x):
    return (
        torch.view_as_real(pairs(x.float()) * self.table[: x.shape[1]].view(1, x.shape[1], 1, 4)).flatten(3).type_as(x)
    )


def not_stored(self, x):
    return torch.view_as_real(pairs(x) * self.made_table[None, : x.shape[1], None]).flatten(3)


def polar_in_forward(self, x):
    turn = torch.polar(torch.ones_like(self.angles), self.angles).unsqueeze(0).unsqueeze(2)[:, : x.shape[1]]
    z = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * turn
    return torch.cat((z.real, z.imag), -1)


def from_cosine_and_sine(self, x):
    turn = torch.complex(self.angles.cos(), self.angles.sin())[None, : x.shape[1], None]
    z = torch.complex(x[..., ::2], x[..., 1::2]) * turn.conj()
    return torch.stack((z.real, z.imag), -1).flatten(3)


def exponential(self, x):
    return torch.view_as_real(pairs(x) * torch.exp(1j * self.angles[: x.shape[1]])[None, :, None]).flatten(3)


def stored_as_real(self, x):
    turn = torch.view_as_complex(self.table[: x.shape[1]].unsqueeze(0).unsqueeze(2))
    return torch.view_as_real(pairs(x) * turn).flatten(-2)


def by_positions(self, x):
    turn = self.table[torch.arange(x.shape[1])].unsqueeze(-2)
    return torch.view_as_real(pairs(x) * turn).flatten(3)


def arithmetic(self, x):
    z = pairs(x)
    n, length, heads, width = z.shape
    first, second = (z * 2 + (0.5 - 1j)).to(torch.complex64).view(n * length, heads, width).split(2, -1)
    z = torch.cat((first / (second + 2), second.abs() * first.conj()), -1).view(z.shape) - z / 3 + z.angle()
    z = torch.where(x[..., :4] > 0, z, torch.square(z)) + 1 / z.abs().clamp(min=1)
    return torch.view_as_real(z).flatten(3)


def weights(self, x):
    z = torch.einsum("nthi,io->ntho", pairs(x) @ self.first, torch.view_as_complex(self.second))
    return torch.view_as_real(z).flatten(3)


CASES = {
    "Llama's own": lambda: Attention(llama, table=turns()),
    "in double precision": lambda: Attention(llama, table=turns().to(torch.complex128)),
    "not in the state": lambda: Attention(not_stored, made_table=turns()),
    "polar in forward": lambda: Attention(polar_in_forward, angles=angles()),
    "complex and conj": lambda: Attention(from_cosine_and_sine, angles=angles()),
    "an exponential": lambda: Attention(exponential, angles=angles()),
    "stored as real numbers": lambda: Attention(stored_as_real, table=torch.view_as_real(turns()).clone()),
    "rows by their positions": lambda: Attention(by_positions, table=turns()),
    "arithmetic": lambda: Attention(arithmetic),
    "complex weights": lambda: Attention(
        weights,
        first=nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)),
        second=nn.Parameter(torch.randn(4, 4, 2)),
    ),
}


def tokens(batch):
    return torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", CASES)
def test_the_same_values_in_torch_and_in_the_runtimes(name, tmp_path):
    torch.manual_seed(0)
    net = CASES[name]().eval()
    network = capture_network(net, (tokens(2),))
    assert not any(value.is_complex() for value in network.state_dict().values())
    with torch.no_grad():
        answer = net(tokens(5))
        torch.testing.assert_close(network(tokens(5)), answer, rtol=1e-4, atol=1e-5)
    _, structure = flatten_outputs(answer)
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path / runtime
        folder.mkdir()
        build(Draft(network), runtime, "fp32", Task(example=tokens(2)), structure, folder)
        theirs = predictor(runtimes.open_artifact(folder, 1), read_manifest(folder))(tokens(5).numpy())
        torch.testing.assert_close(torch.from_numpy(theirs), answer, rtol=1e-4, atol=1e-5)


def test_a_stored_table_keeps_its_name_with_a_last_axis_of_two():
    net = CASES["Llama's own"]()
    network = capture_network(net, (tokens(2),))
    assert torch.equal(network.state_dict()["table"], torch.view_as_real(net.table))
    assert net.table.is_complex()


def test_complex_weights_train():
    network = capture_network(CASES["complex weights"](), (tokens(2),)).train()
    network(tokens(3)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


class Identity(nn.Module):
    def forward(self, x):
        return torch.view_as_complex(x) if not x.is_complex() else torch.view_as_real(x)


def test_complex_inputs_and_outputs_are_refused_with_the_remedy():
    with raises_case(ExportError, "complex-output") as error:
        capture_network(Identity(), (torch.randn(2, 3, 2),))
    assert "(test_complex_pairs.py:" in error.value.what and "view_as_real" in error.value.remedy
    with raises_case(ExportError, "complex-input") as error:
        capture_network(Identity(), (torch.randn(2, 3, dtype=torch.complex64),))
    assert "view_as_complex" in error.value.remedy
