"""What stands around a network is taken off."""

import torch
from torch import nn

from penjing.errors import SourceError
from penjing.network.exporting import export_module
from penjing.network.wrappers import unwrapped
from penjing.sources.source import open_source
from tests.raises import raises_case


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def test_data_parallel_and_compile_are_taken_off():
    net = layers()
    for wrapped in (nn.DataParallel(net), torch.compile(net), torch.compile(nn.DataParallel(net))):
        assert unwrapped(wrapped) is net
        assert open_source(wrapped).module is net
        assert open_source(wrapped).name == "Sequential"
        assert set(export_module(wrapped, (torch.zeros(2, 4),)).state_dict) == set(net.state_dict())


def test_a_part_that_is_wrapped_keeps_its_place():
    net = layers()
    wrapped = nn.Sequential(torch.compile(net[0]), nn.DataParallel(net[1]))
    plain = unwrapped(wrapped)
    assert [type(part) for part in plain] == [nn.Linear, nn.Sequential]
    assert set(plain.state_dict()) == set(net.state_dict())
    assert type(wrapped[1]) is nn.DataParallel  # the user's own stays
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), net(x))


def test_a_module_compiled_in_place():
    net = layers()
    net.compile()
    plain = unwrapped(net)
    assert plain._compiled_call_impl is None and net._compiled_call_impl is not None
    assert plain[0] is net[0]


def test_what_is_not_wrapped_is_itself():
    net = layers()
    assert unwrapped(net) is net


def test_torchscript_is_refused_and_the_remedy_is_right():
    net = layers()
    scripted = torch.jit.trace(net, torch.zeros(1, 4))
    with raises_case(SourceError, "torchscript"):
        open_source(scripted)
    with raises_case(SourceError, "torchscript") as error:
        open_source(nn.Sequential(nn.Linear(4, 4), scripted))
    assert error.value.what.startswith("1 ")
    again = layers()
    again.load_state_dict(scripted.state_dict())
    assert open_source(again).module is again


def test_a_traced_function_is_no_network():
    with raises_case(SourceError, "not-a-network"):
        open_source(torch.jit.trace(lambda x: x + 1, torch.zeros(1)))
