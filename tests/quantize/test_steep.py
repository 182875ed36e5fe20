"""What goes into a root or a logarithm keeps floating point: magnitudes of spectra survive INT8."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze.noise import signal_to_noise
from penjing.network.capture import capture_network
from penjing.quantize.placement import place
from penjing.steps.plan import GENERIC

FORMS = {
    "root": lambda m, x: m.c(torch.sqrt(m.a(x).square() + m.b(x).square())),
    "root of a sum and a number": lambda m, x: m.c(torch.sqrt((m.a(x).square() + m.b(x).square()).flatten(2) + 1e-6)),
    "power": lambda m, x: m.c((m.a(x).abs() + m.b(x).abs()) ** 0.5),
    "logarithm": lambda m, x: m.c(torch.log((torch.relu(m.a(x)) + torch.relu(m.b(x))).clamp(min=1e-4))),
}


class Spectrum(nn.Module):
    """Two filters, what is computed of both, and a layer behind it."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.a, self.b = form, nn.Conv1d(1, 8, 16, bias=False), nn.Conv1d(1, 8, 16, bias=False)
        self.c = nn.Conv1d(8, 4, 3)

    def forward(self, x):
        return FORMS[self.form](self, x)


def loud_and_quiet(count, seed):
    """Sounds of magnitudes between 0.01 and 10."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 64, generator=draw) * 10 ** (3 * torch.rand(count, 1, 1, generator=draw) - 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_in_front_of_a_steep_function_keeps_floating_point(form):
    network = capture_network(Spectrum(form), (loud_and_quiet(2, 0),))
    placement = place(network, GENERIC, {})
    reasons = {name: reason for name, reason in placement.floats.items() if "steep near zero" in reason}
    assert [name.rpartition("/")[2] for name in reasons if "add#0" in name] == ["add#0"]
    assert not any("add#0" in edge for edge in placement.edges)
    assert {"a", "b", "c"} <= set(placement.weights)


def test_a_sum_behind_it_is_quantized():
    class Behind(Spectrum):
        def forward(self, x):
            y = torch.sqrt(self.a(x).square() + 1e-6) + self.b(x)
            return self.c(y)

    placement = place(capture_network(Behind("root"), (loud_and_quiet(2, 0),)), GENERIC, {})
    assert any("add#1" in edge for edge in placement.edges)


def test_quiet_sounds_survive():
    model, calibration = Spectrum("root").eval(), [loud_and_quiet(32, 1)]
    task = pj.Task(example=loud_and_quiet(2, 0), calibration=calibration)
    small = pj.apply(pj.Recipe(pj.quantize.Static()), model, task)
    quiet = loud_and_quiet(64, 2)
    quiet = quiet / quiet.abs().amax((1, 2), keepdim=True) * 2
    assert signal_to_noise(model, small, [((quiet,), {})]) > 25
