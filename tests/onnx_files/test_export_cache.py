"""What is written once is not exported again, and nothing else is taken for it."""

import pytest
import torch
from torch import nn

from penjing.network.capture import capture_network
from penjing.onnx_files import export_cache
from penjing.onnx_files import write as onnx_file

X = torch.zeros(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(export_cache, "_files", type(export_cache._files)())


def network(seed: int = 0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    return capture_network(module, (X,), {})


def mark(given, call=((X,), {}), *others):
    return export_cache.fingerprint(given, call, *others)


def test_the_same_network_is_exported_once(tmp_path, monkeypatch):
    exports = []
    export = onnx_file.export
    monkeypatch.setattr(onnx_file, "export", lambda *a: exports.append(1) or export(*a))
    ports = [onnx_file.write(network(), ((X,), {}), None, ["y"], tmp_path / f"{i}.onnx") for i in range(2)]
    assert len(exports) == 1 and ports[0] == ports[1]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    onnx_file.write(network(), ((X,), {}), None, ["y"], tmp_path / "half.onnx", half=True)
    onnx_file.write(network(), ((X,), {}), None, ["y"], tmp_path / "2.onnx")
    assert len(exports) == 1
    assert (tmp_path / "half.onnx").stat().st_size < (tmp_path / "2.onnx").stat().st_size
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    onnx_file.write(network(1), ((X,), {}), None, ["y"], tmp_path / "other.onnx")
    assert len(exports) == 2 and (tmp_path / "other.onnx").read_bytes() != (tmp_path / "0.onnx").read_bytes()


def edit_weight(given):
    with torch.no_grad():
        given.get_submodule("0").weight[0, 0, 0, 0] += 1


def edit_attribute(given):
    given.get_submodule("0").stride = (2, 2)


def edit_operator(given):
    relu = next(n for n in given.graph.nodes if "relu" in n.name or "1" in str(n.target))
    relu.target = torch.ops.aten.sigmoid.default if relu.op == "call_function" else "3"


def edit_site(given):
    next(n for n in given.graph.nodes if n.op not in ("placeholder", "output")).meta["site"] = "elsewhere"


@pytest.mark.parametrize("edit", [edit_weight, edit_attribute, edit_operator, edit_site])
def test_an_edit_in_place_makes_another_network(edit):
    given = network()
    before = mark(given)
    assert before == mark(network())
    edit(given)
    assert mark(given) != before


def test_a_constant_that_is_no_buffer_counts():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.ones(3, 1, 1)

        def forward(self, x):
            return x + self.shift

    given = capture_network(Shifted().eval(), (X,), {})
    node = next(n for n in given.graph.nodes if n.op == "get_attr")
    before = mark(given)
    path, _, leaf = str(node.target).rpartition(".")
    owner, old = given.get_submodule(path), getattr(given.get_submodule(path), leaf).clone()
    delattr(owner, leaf)
    setattr(owner, leaf, old)  # a plain attribute
    assert leaf not in dict(owner.named_buffers())
    plain = mark(given)
    getattr(owner, leaf).add_(1)
    assert len({before, plain, mark(given)}) == 3


def test_inputs_and_names_count_and_their_values_do_not():
    given = network()
    assert mark(given, ((X + 1,), {})) == mark(given)
    assert mark(given, ((X[:, :, 1:],), {})) != mark(given)
    assert mark(given, ((X.double(),), {})) != mark(given)
    assert mark(given, ((X,), {}), ["y"]) != mark(given, ((X,), {}), ["z"])


def test_a_layer_that_torch_did_not_write_is_not_kept():
    class Own(nn.ReLU):
        pass

    given = network()
    given.add_submodule("own", Own())
    assert mark(given) is None
    export_cache.store(None, b"1234")
    assert export_cache.recall(None) is None


def test_what_was_not_asked_for_for_longest_goes_first(monkeypatch):
    monkeypatch.setattr(export_cache, "LIMIT", 10)
    export_cache.store("a", b"1234")
    export_cache.store("b", b"1234")
    assert export_cache.recall("a") == b"1234"
    export_cache.store("c", b"1234")
    assert [export_cache.recall(k) for k in "abc"] == [b"1234", None, b"1234"]
    export_cache.store("large", b"12345678901")
    assert export_cache.recall("large") is None and export_cache.recall("a") is not None
