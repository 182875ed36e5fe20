"""What a network keeps of itself when its values are off by rounding: torch alone, without any artifact."""

import pytest
import torch
from torch import nn

from penjing.measure import differences, split
from penjing.network.capture import capture_network
from penjing.pipeline.conditioning import rounded_elsewhere
from penjing.tasks.outputs import to_numpy


def keeps(network, x, rounding, seed=0):
    """Decibels of the first output."""
    captured = capture_network(network.eval(), (x,), {})
    with torch.no_grad():
        reference = [to_numpy(network(x))]
    return differences(reference, rounded_elsewhere(captured, ((x,), {}), rounding, seed), split(reference))[0].snr_db


class Chaotic(nn.Module):
    """A map that doubles the distance of two values with every step."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        x = x.sigmoid()
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


class Cancels(nn.Module):
    def forward(self, x):
        return (x + 1000) - 1000


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def test_a_plain_network_keeps_what_the_rounding_leaves():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    for bits in (21, 11, 8):
        assert keeps(network, X, 2.0**-bits) == pytest.approx(6.02 * bits, abs=6)


def test_chaos_keeps_nothing_however_small_the_rounding():
    assert keeps(Chaotic(2), X, 2.0**-21) > 90
    assert keeps(Chaotic(40), X, 2.0**-21) < 10


def test_differences_of_large_numbers_lose_what_cancels():
    assert keeps(Cancels(), X, 2.0**-21) == pytest.approx(6.02 * 21 - 60 + 2, abs=4)


def test_masks_and_integers_stay_and_the_seed_decides():
    class Masks(nn.Module):
        def forward(self, x):
            lowest = torch.finfo(torch.float32).min
            return {"masked": x.masked_fill(x > 0, lowest), "inf": x.masked_fill(x > 0, -torch.inf), "at": x.argmax(1)}

    captured = capture_network(Masks(), (X,), {})
    masked, infinite, at = rounded_elsewhere(captured, ((X,), {}), 2.0**-8, 0)
    assert torch.equal(torch.isfinite(torch.from_numpy(masked)), torch.ones_like(X, dtype=torch.bool))
    assert (masked[X.numpy() > 0] < -1e38).all() and (infinite[X.numpy() > 0] == -float("inf")).all()
    assert (at == X.argmax(1).numpy()).mean() > 0.9
    again, other = (rounded_elsewhere(captured, ((X,), {}), 2.0**-8, seed)[0] for seed in (0, 1))
    assert (again == masked).all() and (other != masked).any()
