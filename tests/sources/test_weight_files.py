"""Weights of a file into a network: every format, names that training has changed, and all that is refused."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penjing as pj
from penjing.errors import CheckpointError, SourceError, UsageError
from penjing.sources import weights
from penjing.sources.source import open_source
from tests.raises import raises_case


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.register_buffer("grid", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))


@pytest.fixture
def trained():
    torch.manual_seed(1)
    net = Net()
    for tensor in (*net.parameters(), net.bn.running_mean):
        nn.init.normal_(tensor)
    return net


@pytest.fixture
def state(trained):
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def blank():
    torch.manual_seed(2)
    return Net()


def equal(net, state):
    own = net.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in state.items() if name in own)


def assert_unchanged_on(code, file, net=None, kind=CheckpointError, **options):
    """The error, after a look at the network: not one number has changed."""
    net = net or blank()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with raises_case(kind, code) as caught:
        pj.load_weights(net, file, **options)
    assert equal(net, before)
    return caught.value


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "old.pt", "anything"])
def test_every_format_gives_the_same_network(tmp_path, state, trained, name):
    file = tmp_path / name
    if name == "net.safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name != "old.pt")
    net = blank()
    assert pj.load_weights(net, file) is net
    assert equal(net, state)
    x = torch.rand(2, 1, 5, 5)
    assert torch.equal(net.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_index_of_several_files(tmp_path, state, suffix):
    names = list(state)
    parts = {f"model-1{suffix}": names[:3], f"model-2{suffix}": names[3:]}
    for file, part in parts.items():
        tensors = {name: state[name] for name in part}
        (save_file if suffix == ".safetensors" else torch.save)(tensors, tmp_path / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert equal(pj.load_weights(blank(), index), state)
    (tmp_path / f"model-2{suffix}").unlink()
    assert_unchanged_on("missing", index)


def test_the_network_can_be_any_source(tmp_path, state):
    torch.save(state, tmp_path / "net.pth")
    code = "from tests.sources.test_weight_files import Net\n\n\ndef make():\n    return Net()\n"
    (tmp_path / "net.py").write_text(code)
    assert equal(pj.load_weights(f"{tmp_path / 'net.py'}:make", tmp_path / "net.pth"), state)
    source = open_source(f"{tmp_path / 'net.py'}:make", weights=tmp_path / "net.pth")
    assert source.name == "make" and source.loaded.file == str(tmp_path / "net.pth")
    assert open_source(source) is source
    built_in = pj.architectures.build("squeezenet1_1").state_dict()
    torch.save({"model": built_in}, tmp_path / "big.pth")
    assert equal(pj.load_weights("squeezenet1_1", tmp_path / "big.pth"), built_in)


# --- training checkpoints and their names --------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_state_dict"], ["params", "ema"], ["a", "b", "c"]])
def test_weights_lie_below_keys_of_a_training_checkpoint(tmp_path, state, keys):
    inner = state
    for key in reversed(keys):
        inner = {key: inner, "epoch": 3, "loss": torch.tensor(0.5)}
    optimizer = torch.optim.Adam(Net().parameters())
    torch.save(inner | {"optimizer": optimizer.state_dict()}, tmp_path / "last.ckpt")
    assert equal(pj.load_weights(blank(), tmp_path / "last.ckpt"), state)


def test_of_two_that_fit_one_has_to_be_named(tmp_path, state):
    ema = {name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"model": state, "ema": ema}, tmp_path / "last.ckpt")
    error = assert_unchanged_on("ambiguous", tmp_path / "last.ckpt")
    assert error.got == "model, ema" and "last.ckpt:model" in error.remedy
    assert equal(pj.load_weights(blank(), f"{tmp_path / 'last.ckpt'}:ema"), ema)
    assert "ema" in assert_unchanged_on("no-key", f"{tmp_path / 'last.ckpt'}:emma").remedy
    torch.save({"model": state, "copy": state}, tmp_path / "same.ckpt")
    assert equal(pj.load_weights(blank(), tmp_path / "same.ckpt"), state)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: f"module.model.net.{name}",
        lambda name: name.replace("conv.", "conv._orig_mod.").replace("head.", "head._checkpoint_wrapped_module."),
    ],
)
def test_prefixes_of_training_are_taken_off(tmp_path, state, rename):
    torch.save({rename(name): tensor for name, tensor in state.items()}, tmp_path / "net.pth")
    assert equal(pj.load_weights(blank(), tmp_path / "net.pth"), state)


def test_what_torch_itself_wraps(tmp_path, trained, state):
    wrapped = {
        "parallel": nn.DataParallel(trained),
        "compiled": torch.compile(trained),
        "averaged": torch.optim.swa_utils.AveragedModel(trained, use_buffers=True),
    }
    for name, module in wrapped.items():
        torch.save(module.state_dict(), tmp_path / name)
        assert equal(pj.load_weights(blank(), tmp_path / name), state)


def test_a_prefix_stays_where_the_network_has_it(tmp_path, state):
    whole = nn.ModuleDict({"module": blank()})
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "net.pth")
    assert equal(pj.load_weights(whole, tmp_path / "net.pth")["module"], state)


def test_what_inference_does_not_read_may_lack_or_be_more(tmp_path, state):
    del state["bn.num_batches_tracked"]
    torch.save(state | {"grid": torch.zeros(4), "conv.num_batches_tracked": torch.tensor(3)}, tmp_path / "net.pth")
    net = pj.load_weights(blank(), tmp_path / "net.pth")
    assert equal(net, state) and torch.equal(net.grid, torch.arange(4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_converted_and_told(tmp_path, state, dtype):
    torch.save({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "net.pth")
    source = open_source(blank(), weights=tmp_path / "net.pth")
    assert source.module.conv.weight.dtype == torch.float32
    assert torch.equal(source.module.conv.weight, state["conv.weight"].to(dtype).float())
    (note,) = source.loaded.notes
    assert str(dtype).removeprefix("torch.") in note


def test_tied_weights(tmp_path):
    weight = torch.rand(6, 4)
    save_file({"embed.weight": weight}, tmp_path / "one.safetensors")
    net = pj.load_weights(Tied(), tmp_path / "one.safetensors")
    assert net.out.weight is net.embed.weight and torch.equal(net.out.weight, weight)
    torch.save({"embed.weight": weight, "out.weight": weight.clone()}, tmp_path / "both.pth")
    assert torch.equal(pj.load_weights(Tied(), tmp_path / "both.pth").out.weight, weight)
    torch.save({"embed.weight": weight, "out.weight": weight + 1}, tmp_path / "torn.pth")
    assert "embed.weight (tied to out.weight" in assert_unchanged_on("misfit", tmp_path / "torn.pth", Tied()).got


def test_names_of_an_older_version_that_the_network_itself_understands(tmp_path):
    old = {"fc.bias": torch.rand(2), "fc.weight_g": torch.rand(2, 1), "fc.weight_v": torch.rand(2, 4)}
    torch.save(old, tmp_path / "net.pth")
    net = pj.load_weights(Normed(), tmp_path / "net.pth")
    assert torch.equal(net.fc.parametrizations.weight.original1, old["fc.weight_v"])


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_with_the_nearest_names(tmp_path, state):
    state["heads.weight"] = state.pop("head.weight")
    state["conv.weight"] = torch.zeros(4, 1, 5, 5)
    state["bn.bias"] = torch.zeros(4, dtype=torch.int64)
    torch.save(state, tmp_path / "net.pth")
    got = assert_unchanged_on("misfit", tmp_path / "net.pth").got
    assert "1 missing" in got and "head.weight (nearest in the file: heads.weight)" in got
    assert "1 unexpected" in got and "heads.weight (nearest in the network: head.weight)" in got
    assert "conv.weight ([4, 1, 5, 5], and [4, 1, 3, 3] in the network)" in got
    assert "bn.bias (int64, and float32 in the network)" in got


def test_among_many_names_few_are_compared_and_none_is_loaded_on_trial(tmp_path, state, monkeypatch):
    compared, tried = [], []

    class Watched(Net):
        def load_state_dict(self, *args, **kwargs):
            tried.append(args)
            return super().load_state_dict(*args, **kwargs)

    def matches(word, names, **options):
        compared.append(len(names))
        return find(word, names, **options)

    find = weights.difflib.get_close_matches
    monkeypatch.setattr(weights.difflib, "get_close_matches", matches)
    many = {f"block.{i}.{part}": torch.zeros(1) for i in range(1500) for part in ("weight", "bias")}
    many["heads.weight"] = state["head.weight"]
    torch.save(many, tmp_path / "net.pth")
    error = assert_unchanged_on("misfit", tmp_path / "net.pth", Watched())
    assert "head.weight (nearest in the file: heads.weight)" in error.got
    assert max(compared) <= weights.COMPARED and not tried


def test_another_number_of_classes(tmp_path):
    torch.save(Net(classes=5).state_dict(), tmp_path / "net.pth")
    assert "number of classes" in assert_unchanged_on("misfit", tmp_path / "net.pth").remedy


def test_another_architecture(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "net.pth")
    assert "saved from" in assert_unchanged_on("misfit", tmp_path / "net.pth").remedy


def test_names_that_the_network_does_not_have_are_left_out_on_request(tmp_path, state):
    torch.save(state | {"loss.scale": torch.ones(1)}, tmp_path / "net.pth")
    assert "--ignore-weights 'loss.*'" in assert_unchanged_on("misfit", tmp_path / "net.pth").remedy
    assert equal(pj.load_weights(blank(), tmp_path / "net.pth", ignore=["loss.*"]), state)
    assert_unchanged_on("misfit", tmp_path / "net.pth", ignore=["head.*", "loss.*"])
    with raises_case(UsageError, "no-weights"):
        open_source(blank(), ignore=["loss.*"])


def test_the_key_that_is_nearest_is_the_one_that_is_told(tmp_path, state):
    near = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    torch.save({"opt": {"step": torch.tensor(1)}, "model": near}, tmp_path / "last.ckpt")
    error = assert_unchanged_on("misfit", tmp_path / "last.ckpt")
    assert "'model'" in error.what and "1 missing" in error.got and "opt" in error.got


@pytest.mark.parametrize(
    "tensor", [torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8), torch.rand(3).to_sparse()]
)
def test_tensors_that_are_not_plain(tmp_path, state, tensor):
    torch.save(state | {"head.bias": tensor}, tmp_path / "net.pth")
    assert_unchanged_on("misfit", tmp_path / "net.pth")


def test_networks_that_can_not_take_weights(tmp_path, state):
    torch.save(state, tmp_path / "net.pth")
    with raises_case(CheckpointError, "no-storage"):
        pj.load_weights(Net().to("meta"), tmp_path / "net.pth")
    with raises_case(CheckpointError, "no-storage"):
        pj.load_weights(nn.LazyLinear(3), tmp_path / "net.pth")
    program = torch.export.export(blank().eval(), (torch.rand(2, 1, 5, 5),))
    with raises_case(SourceError, "weights-of-a-program"):
        open_source(program, weights=tmp_path / "net.pth")


# --- files of strangers --------------------------------------------------------------------------------------------


class Trap:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, state, zipped):
    mark = tmp_path / "executed"
    torch.save({"state_dict": state, "trap": Trap(mark)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    torch.save(Net(), tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Trap(mark)))
    for name in "abc":
        assert "weights_only=False" in assert_unchanged_on("foreign-code", tmp_path / f"{name}.pth").remedy
    assert not mark.exists()


def test_torchscript_and_programs(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "torch.jit.load" in assert_unchanged_on("torchscript", tmp_path / "script.pt").remedy
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.rand(1, 2),)), tmp_path / "net.pt2")
    assert_unchanged_on("format", tmp_path / "net.pt2")


def test_files_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    torch.save([torch.zeros(2)], tmp_path / "b.pth")
    save_file({}, tmp_path / "c.safetensors")
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (tmp_path / "f.zip").write_bytes(b"")
    codes = ["no-weights", "no-weights", "no-weights", "format", "format", "format"]
    for name, code in zip(sorted(p.name for p in tmp_path.iterdir()), codes, strict=True):
        assert_unchanged_on(code, tmp_path / name)
    assert "a.pth" in assert_unchanged_on("folder", tmp_path).remedy
    assert "a.pth" in assert_unchanged_on("missing", tmp_path / "aa.pth").remedy


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a\\b", "..", "C:x"])
def test_an_index_stays_in_its_folder(tmp_path, place):
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"conv.weight": place}}))
    assert_unchanged_on("outside", tmp_path / "i.json")


def repacked(source, target, edit, compression=zipfile.ZIP_STORED):
    """The archive again, with members that `edit` has changed."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", compression) as copy:
        for member in archive.namelist():
            copy.writestr(member, edit(member, archive.read(member)))


def test_archives_that_claim_more_than_they_hold(tmp_path, state):
    torch.save(state, tmp_path / "net.pth")
    repacked(tmp_path / "net.pth", tmp_path / "bomb.pth",
             lambda name, data: bytes(1 << 24) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED)  # fmt: skip
    assert "unpacks to" in assert_unchanged_on("damaged", tmp_path / "bomb.pth").got
    torch.save({"conv.bias": torch.zeros(4)}, tmp_path / "small.pth")

    def claim(name, data):
        return data.replace(b"K\x04", b"J" + struct.pack("<i", 1 << 30)) if name.endswith("data.pkl") else data

    repacked(tmp_path / "small.pth", tmp_path / "claim.pth", claim)
    assert_unchanged_on("damaged", tmp_path / "claim.pth")


def test_headers_that_claim_more_than_they_hold(tmp_path):
    for size, header in [(1 << 60, b"{}"), (100, b"{}"), (2, b"{}"), (9, b'{"a":{}}  ')]:
        (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", size) + header)
        assert_unchanged_on("no-weights" if size == 2 else "damaged", tmp_path / "net.safetensors")


def test_one_state_dict_that_is_reached_in_a_thousand_ways(tmp_path, state):
    level = state
    for _ in range(4):
        level = {f"key{i}": level for i in range(100)}
    torch.save(level, tmp_path / "deep.pth")
    assert_unchanged_on("no-weights", tmp_path / "deep.pth")
