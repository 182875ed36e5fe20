"""Weights that are NaN are told by name when a source is opened, wherever it comes from."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from penjing.distill.teaching import opened
from penjing.errors import CheckpointError, SourceError
from penjing.sources.finite import check_module
from penjing.sources.source import load_weights, open_source
from penjing.tasks.task import Task
from tests.raises import raises_case

FACTORY = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def empty():  # as torch.empty may leave it
    network = good()
    network[0].weight.data.fill_(float("nan"))
    return network
"""


def network(number=float("nan")):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight.data[0, 1] = number
    return net


def saved(folder, kind):
    """A file of `network()`, and the name of the weight that is NaN in it."""
    path, net = folder / f"net.{kind}", network()
    if kind == "pt2":
        torch.export.save(torch.export.export(net, (torch.zeros(2, 3),)), path)
    else:
        weight, port = (
            numpy_helper.from_array(net[2].weight.detach().numpy(), "head.weight"),
            helper.make_tensor_value_info,
        )
        graph = helper.make_graph(
            [helper.make_node("Gemm", ["x", "head.weight"], ["y"], name="head", transB=1)],
            "graph",
            [port("x", TensorProto.FLOAT, ["n", 4])],
            [port("y", TensorProto.FLOAT, ["n", 2])],
            [weight],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path, "2.weight" if kind == "pt2" else "head.weight"


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_file_with_nan_is_refused_by_the_name_of_the_weight(tmp_path, kind):
    path, name = saved(tmp_path, kind)
    with raises_case(SourceError, "weight-not-finite") as error:
        open_source(path)
    assert f"the weight {name} of net" in error.value.what and "1 of 8" in error.value.got


def test_a_factory_a_module_and_a_teacher(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    path, _ = saved(tmp_path, "pt2")
    for open_door in (
        lambda: open_source(f"{tmp_path}/net.py:empty"),
        lambda: open_source(network()),
        lambda: opened(str(path), Task(example=torch.zeros(2, 3))),
    ):
        with raises_case(SourceError, "weight-not-finite"):
            open_door()


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_of_weights_with_nan_leaves_the_network_as_it_was(tmp_path, kind):
    path, net = tmp_path / f"weights.{kind}", network(1.0)
    write = save_file if kind == "safetensors" else torch.save
    write(network().state_dict(), path)
    before = net[0].weight.clone()
    with raises_case(CheckpointError, "weight-not-finite") as error:
        load_weights(net, path)
    assert "2.weight" in error.value.what and torch.equal(net[0].weight, before)


def test_what_is_replaced_by_a_file_may_be_nan(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    save_file(network(1.0).state_dict(), tmp_path / "weights.safetensors")
    source = open_source(f"{tmp_path}/net.py:empty", weights=tmp_path / "weights.safetensors")
    assert source.module[2].weight[0, 1] == 1


def test_infinities_and_constants_of_the_code_are_no_damage():
    net = network(float("inf"))
    net[2].weight.data[1, 1] = float("-inf")  # opposite ones have the sum NaN
    net.register_buffer("mask", torch.full((2,), float("-inf")))
    net.register_buffer("unset", torch.full((2,), float("nan")), persistent=False)
    net.register_buffer("count", torch.tensor(0))
    net.register_parameter("lazy", nn.UninitializedParameter())
    assert open_source(net).module is net


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_every_kind_of_number(dtype):
    net = nn.Module()
    net.register_buffer("stored", torch.tensor([1.0, float("nan")]).to(dtype))
    with raises_case(SourceError, "weight-not-finite") as error:
        check_module(net, "net")
    assert "1 of 2" in error.value.got


def test_names_of_many_weights_are_cut():
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))
    for parameter in net.parameters():
        parameter.data.fill_(float("nan"))
    with raises_case(SourceError, "weight-not-finite") as error:
        check_module(net, "net")
    assert "and 13 more" in error.value.got and "4.weight" not in error.value.got
