"""A frozen network in PyTorch's quantizers computes what it did in Penjing's, for every sort of grid."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.quantize import Dynamic, Static
from penjing.runtimes.decomposed import decomposed, site
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC, Entry, QuantSpec
from penjing.steps.step import Context
from penjing.surgery import freeze
from penjing.tasks.task import Task
from tests.raises import raises_case

SIGNED = QuantSpec(symmetric=False)
UNSIGNED = QuantSpec(signed=False, symmetric=False)


class Layers(nn.Module):
    """A convolution with batch norm, a depthwise one, an addition, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head((self.deep(x) + x).mean((2, 3)))


def frozen(weight, activation, step=Static):
    """A frozen network whose scales are powers of two, so that both ways of dividing round alike."""
    torch.manual_seed(0)
    task = Task(example=torch.randn(2, 3, 9, 9), calibration=[torch.randn(16, 3, 9, 9)])
    draft = Draft(capture_network(Layers().eval(), *task.call()))
    capabilities = replace(GENERIC, weight=weight, activation=activation)
    draft = step()(draft, Context(task=task, capabilities=capabilities))
    entries = {edge: rounded(entry) for edge, entry in draft.plan.entries.items()}
    return freeze(draft.network, replace(draft.plan, entries=entries)), task


def rounded(entry):
    return Entry(entry.spec, tuple(2.0 ** math.ceil(math.log2(s)) for s in entry.scale), entry.zero_point)


def operators(program):
    return [str(node.target) for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]


ROWS = QuantSpec(axis=0)
PAIRS = [
    *((QuantSpec(), SIGNED), (ROWS, UNSIGNED), (ROWS, replace(UNSIGNED, bits=7)), (ROWS, QuantSpec())),
    *((replace(ROWS, bits=4), SIGNED), (replace(ROWS, group=1), SIGNED)),
]


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=str)
def test_it_computes_what_the_frozen_network_does_at_every_batch(weight, activation):
    network, task = frozen(weight, activation)
    program = decomposed(network, task.call(), None)
    module = program.module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(module(x)[0], network(x), rtol=0, atol=1e-6)
    assert not [node for node in program.graph.nodes if "penjing" in str(node.target)]
    assert ("per_channel" in " ".join(operators(program))) == (weight.axis is not None)


def test_zero_points_and_scales_are_those_of_the_plan():
    network, task = frozen(QuantSpec(axis=0), SIGNED)
    program = decomposed(network, task.call(), None)
    numbers = {
        node.args[1:3] for node in program.graph.nodes if "quantized_decomposed.quantize_per_tensor" in str(node.target)
    }
    before = {
        tuple(
            getattr(network.get_submodule("integers"), str(n.target).rpartition(".")[2]).item() for n in node.args[1:3]
        )
        for node in network.graph.nodes
        if node.target is torch.ops.penjing.quantize.default
    }
    assert numbers == before and any(zero for _, zero in numbers)


def test_biases_become_floats_and_nothing_unread_is_kept():
    network, task = frozen(QuantSpec(axis=0), UNSIGNED)
    program = decomposed(network, task.call(), None)
    stored = [value for value in (*program.state_dict.values(), *program.constants.values())]
    assert torch.int32 not in {value.dtype for value in stored}
    assert sum(value.numel() for value in stored if value.dtype == torch.int8) == 8 * 3 * 9 + 8 * 9 + 8 * 6
    assert not [value for value in stored if value.dtype == torch.float32 and value.dim() > 1]


def test_operators_tell_the_site_that_they_come_from_also_in_a_decomposed_program():
    network, task = frozen(QuantSpec(axis=0), UNSIGNED)
    program = decomposed(network, task.call(), None).run_decompositions()
    told = {str(n.target).split(".")[1]: site(n) for n in program.graph.nodes if n.op == "call_function" and site(n)}
    assert told["addmm"] == "head" and told["add"] == "/add#0" and told["convolution"] == "deep"


def test_a_network_in_floating_point_is_exported_as_it_is():
    torch.manual_seed(0)
    task = Task(example=torch.randn(2, 3, 9, 9))
    network = capture_network(Layers().eval(), *task.call())
    module = decomposed(network, task.call(), None).module()
    x = torch.randn(3, 3, 9, 9)
    torch.testing.assert_close(module(x)[0], network(x), rtol=0, atol=1e-6)


def test_a_linear_layer_with_a_range_at_run_time_is_quantizers_and_a_product():
    network, task = frozen(QuantSpec(axis=0), UNSIGNED, Dynamic)
    program = decomposed(network, task.call(), None)
    assert [name.split(".")[1] for name in operators(program)].count("choose_qparams") == 1
    x = torch.randn(4, 3, 9, 9)
    step = network(x).abs().max() / 64
    assert (program.module()(x)[0] - network(x)).abs().max() < step


@torch.library.custom_op("penjing_tests::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@turned.register_fake
def _(x):
    return torch.empty_like(x)


class Turned(torch.nn.Module):
    def forward(self, x):
        return turned(x) + 1


def test_an_operator_of_another_library_is_named_before_a_converter_sees_it():
    network = capture_network(Turned(), (torch.randn(2, 3),))
    with raises_case(ExportError, "custom-operator") as refusal:
        decomposed(network, ((torch.randn(2, 3),), {}), None)
    assert refusal.value.got == "penjing_tests.turned.default"
    assert "/turned#0" in refusal.value.what and "turned(x) + 1" in refusal.value.what
