"""Updates: the new version comes out equal to the bit, on the right base alone, and the old one is never lost."""

import hashlib
import json
import lzma
import os
import random
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

pytest.importorskip("numba")

from penjing import cli
from penjing.errors import ArtifactError, OutputError
from penjing.records.folder import ARTIFACT
from penjing.storage import delta, packed
from penjing.storage.opened import TAIL
from tests.raises import raises_case


def first():
    """Tensors of every type, some of them sparse or empty; the same at every call."""
    torch.manual_seed(0)
    pruned = torch.randn(64, 100)
    pruned[torch.rand(64, 100) < 0.8] = 0
    return {
        "int8": (20 * torch.randn(64, 9, 3)).clamp(-127, 127).to(torch.int8),
        "uint8": (20 * torch.randn(40, 30) + 128).clamp(0, 255).to(torch.uint8),
        "float32": torch.randn(50, 30),
        "float16": torch.randn(50, 31).half(),
        "bfloat16": torch.randn(51, 30).bfloat16(),
        "pruned": pruned,
        "frozen": torch.randn(100, 100),
        "infinite": torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40]),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "int64": torch.arange(5),
    }


def trained(tensors, size=0.01):
    """These tensors after a small change of everything but the frozen ones; zeros stay."""
    after = {}
    for name, tensor in tensors.items():
        change = size * torch.randn(tensor.shape)
        if name in ("frozen", "none", "int64"):
            after[name] = tensor
        elif tensor.is_floating_point():
            after[name] = (tensor.float() + change * (tensor != 0)).to(tensor.dtype)
        else:
            after[name] = (
                (tensor + 100 * change).round().clamp(*((-127, 127) if name == "int8" else (0, 255))).to(tensor.dtype)
            )
    return after


def versions(folder, old, new):
    """Two files of these tensors."""
    save_file(old, folder / "old.safetensors")
    save_file(new, folder / "new.safetensors")
    return folder / "old.safetensors", folder / "new.safetensors"


def assert_patches(old, new, folder):
    """The update, after the new version came out of it equal to the bit."""
    update = delta.delta(old, new, folder / "update.pjd")
    files = delta.patch(old, update.path, folder / "again")
    if new.is_file():
        assert files == (folder / "again",) and files[0].read_bytes() == new.read_bytes()
        return update
    root = new / ARTIFACT if (new / ARTIFACT).is_dir() else new
    expected = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert {f.relative_to(folder / "again").as_posix(): f.read_bytes() for f in files} == expected
    return update


def test_tensors_of_every_type_come_out(tmp_path):
    old = first()
    update = assert_patches(*versions(tmp_path, old, trained(old)), tmp_path)
    assert update.tensors["unchanged"][0] == 1 and update.tensors["changed"][0] == 8
    assert update.size_bytes < 0.75 * packed.pack(tmp_path / "new.safetensors", tmp_path / "new.pj").size_bytes


def test_the_same_version_takes_a_few_bytes(tmp_path):
    old, new = versions(tmp_path, first(), first())
    shutil.copy(old, new)
    assert assert_patches(old, new, tmp_path).size_bytes < 400


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.74), (torch.float16, 0.6), (torch.bfloat16, 0.4)])
def test_a_small_change_of_floats_takes_what_it_must(tmp_path, dtype, share):
    # A change of a hundredth of the weights leaves about 20 bits of 32, 9 of 16 and 6 of 16 unknown.
    old = {"weight": torch.randn(300, 100).to(dtype)}
    new = {"weight": (old["weight"].float() + 0.01 * torch.randn(300, 100)).to(dtype)}
    update = assert_patches(*versions(tmp_path, old, new), tmp_path)
    assert update.size_bytes < share * update.new_bytes


def test_a_new_scale_of_a_row_costs_little(tmp_path):
    weight = torch.randn(64, 300)
    quantize = lambda scale: (weight * scale).round().clamp(-127, 127).to(torch.int8)  # noqa: E731
    scale = 30 * (1 + 0.1 * torch.rand(64, 1))
    old, new = versions(tmp_path, {"w": quantize(30)}, {"w": quantize(scale)})
    assert assert_patches(old, new, tmp_path).size_bytes < 0.2 * 64 * 300  # about 6 bits remain if nothing is known


def test_four_bits_and_renamed_initializers(tmp_path):
    chance = np.random.default_rng(0)
    bytes_4 = chance.integers(0, 256, 5000, dtype=np.uint8)
    bytes_8 = chance.integers(-20, 20, (64, 32)).astype(np.int8)
    for name, word, change in (("old", "", 0), ("new", "_2", 1)):
        listed = [
            TensorProto(
                name=f"u4{word}", data_type=TensorProto.UINT4, dims=(3, 3333), raw_data=bytes_4.tobytes()[:5000]
            ),
            helper.make_tensor(f"i8{word}", TensorProto.INT8, (64, 32), (bytes_8 + change).tobytes(), raw=True),
        ]
        graph = helper.make_graph([], "net", [], [], listed)
        (tmp_path / f"{name}.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    update = assert_patches(tmp_path / "old.onnx", tmp_path / "new.onnx", tmp_path)
    assert update.tensors["unchanged"][0] == 1 and update.tensors["changed"][0] == 1 and update.size_bytes < 700


def test_added_removed_and_reshaped_tensors(tmp_path):
    old = first()
    new = trained({name: tensor for name, tensor in old.items() if name != "float16"})
    new |= {"float32": torch.randn(50, 31), "more": torch.randn(9, 9)}
    update = assert_patches(*versions(tmp_path, old, new), tmp_path)
    assert update.tensors["new"][0] == 2


def test_a_base_that_does_not_help_costs_little(tmp_path):
    old, new = versions(tmp_path, {"w": torch.randn(100, 100)}, {"w": torch.randn(100, 100)})
    alone = packed.pack(new, tmp_path / "new.pj").size_bytes
    assert assert_patches(old, new, tmp_path).size_bytes < alone + 100


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_artifacts_come_out(tmp_path, exported, runtime):
    old, new = (exported("residual", runtime, precision).folder for precision in ("fp32", "int8"))
    assert_patches(old, new, tmp_path)
    shutil.rmtree(tmp_path / "again")
    again = delta.delta(new, new, tmp_path / "none.pjd")
    assert again.size_bytes < 0.2 * again.new_bytes


def test_packed_files_are_versions_too(tmp_path):
    old, new = versions(tmp_path, first(), trained(first()))
    before, after = (packed.pack(p, p.with_suffix(".pj")).path for p in (old, new))
    update = delta.delta(before, new, tmp_path / "update.pjd")
    delta.patch(before, update.path, tmp_path / "again.pj")
    assert (tmp_path / "again.pj").read_bytes() == after.read_bytes()


def test_large_tensors_come_in_chunks(tmp_path, monkeypatch):
    old = {"a": torch.randn(300, 70), "b": torch.randn(10), "c": torch.randint(-9, 9, (55, 55), dtype=torch.int8)}
    old |= {f"small{i}": torch.randn(300) for i in range(9)}
    monkeypatch.setattr("penjing.storage.chunks.VALUES", 1000)
    monkeypatch.setattr("penjing.storage.delta_file.PIECE", 100)
    new = trained(old)
    new["d"] = torch.randn(2000)
    assert_patches(*versions(tmp_path, old, new), tmp_path)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_update_is_the_same_whatever_the_threads(tmp_path, threads):
    old, new = versions(tmp_path, first(), trained(first()))
    one, other = (delta.delta(old, new, tmp_path / f"{n}.pjd", threads=n).path for n in (threads, 3))
    assert one.read_bytes() == other.read_bytes()


def test_other_bytes_are_copied_from_where_they_were(tmp_path):
    chance = random.Random(0)
    text = "".join(chance.choice("abcdefgh \n") for _ in range(50_000))
    (tmp_path / "old.xml").write_text(text)
    (tmp_path / "new.xml").write_text("new " + text[20_000:] + text[:30_000].replace("abc", "xyz") + "end")
    assert assert_patches(tmp_path / "old.xml", tmp_path / "new.xml", tmp_path).size_bytes < 1200


def test_another_base_is_refused(tmp_path):
    old, new = versions(tmp_path, first(), trained(first()))
    delta.delta(old, new, tmp_path / "update.pjd")
    before = new.read_bytes()
    with raises_case(ArtifactError, "other-base"):
        delta.patch(new, tmp_path / "update.pjd", new, force=True)
    assert new.read_bytes() == before
    shutil.move(old, tmp_path / "other name.bin")
    assert delta.patch(tmp_path / "other name.bin", tmp_path / "update.pjd", tmp_path / "out")


def test_the_old_file_stays_until_the_new_one_takes_its_place(tmp_path, monkeypatch):
    old, new = versions(tmp_path, first(), trained(first()))
    update = delta.delta(old, new, tmp_path / "update.pjd").path
    before = old.read_bytes()
    with raises_case(OutputError, "exists"):
        delta.patch(old, update, old)
    replace = os.replace

    def interrupted(*places):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delta.patch(old, update, old, force=True)
    assert old.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "old.safetensors", "update.pjd"]
    monkeypatch.setattr(os, "replace", replace)
    delta.patch(old, update, old, force=True)
    assert old.read_bytes() == new.read_bytes()


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for name, tensors in (("a", first()), ("b", trained(first()))):
        (tmp_path / name / "deep").mkdir(parents=True)
        save_file(tensors, tmp_path / name / "deep" / "net.safetensors")
    (tmp_path / "b" / "more.txt").write_text("more")
    update = assert_patches(tmp_path / "a", tmp_path / "b", tmp_path).path
    delta.patch(tmp_path / "a", update, tmp_path / "a", force=True)
    assert (tmp_path / "a" / "more.txt").read_text() == "more"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "again", "b", "update.pjd"]


def test_a_folder_with_more_than_a_version_is_not_replaced(tmp_path):
    for name, tensors in (("a", first()), ("b", trained(first()))):
        (tmp_path / name / ARTIFACT).mkdir(parents=True)
        save_file(tensors, tmp_path / name / ARTIFACT / "net.safetensors")
        (tmp_path / name / "record.json").write_text("{}")
    update = delta.delta(tmp_path / "a", tmp_path / "b", tmp_path / "update.pjd").path
    with raises_case(OutputError, "foreign") as refusal:
        delta.patch(tmp_path / "a", update, tmp_path / "a", force=True)
    assert "record.json" in refusal.value.got and (tmp_path / "a" / "record.json").exists()
    delta.patch(tmp_path / "a", update, tmp_path / "a" / ARTIFACT, force=True)
    assert load_file(tmp_path / "a" / ARTIFACT / "net.safetensors").keys() == first().keys()


def test_the_commands_say_what_it_takes(tmp_path, capsys):
    old, new = versions(tmp_path, first(), trained(first()))
    update, again = str(tmp_path / "u.pjd"), str(tmp_path / "again.safetensors")
    assert cli.main(["delta", str(old), str(new), "-o", update, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["size_bytes"] == os.path.getsize(update) and printed["new_bytes"] == new.stat().st_size
    assert cli.main(["delta", str(old), str(new), "-o", update, "--force"]) == 0
    assert "changed" in capsys.readouterr().out
    assert cli.main(["patch", str(old), update, "-o", again]) == 0
    assert "again.safetensors" in capsys.readouterr().out.replace("\n", "")
    assert load_file(again).keys() == load_file(new).keys()
    assert cli.main(["patch", str(new), update, "-o", again, "--force", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "other-base"


def test_mutated_updates_are_refused_and_nothing_is_written(tmp_path):
    old, new = versions(tmp_path, first(), trained(first()))
    whole = delta.delta(old, new, tmp_path / "update.pjd").path.read_bytes()
    place, length, _, _ = TAIL.unpack(whole[-TAIL.size :])
    chance, harmless = random.Random(0), 0
    for case in range(300):
        data = bytearray(whole)
        hashed = case % 2  # half of them have a hash that is right
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(8 if hashed else 0, place if hashed else len(data))] ^= 1 << chance.randrange(8)
        if hashed:
            sha = hashlib.sha256(data[: -TAIL.size]).digest()
            data[-TAIL.size :] = TAIL.pack(place, length, sha, whole[-8:])
        elif case % 4 == 0:
            data = data[: chance.randrange(len(data))]
        (tmp_path / "bad.pjd").write_bytes(data)
        try:
            (out,) = delta.patch(old, tmp_path / "bad.pjd", tmp_path / "out")
        except ArtifactError as error:
            assert error.code == "unreadable"
        else:  # what was changed has no meaning, as a weight of neighbours that no tensor has
            assert hashed and out.read_bytes() == new.read_bytes()
            out.unlink()
            harmless += 1
    assert harmless < 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pjd", "new.safetensors", "old.safetensors", "update.pjd"]


def rewritten(path, change):
    """An update whose contents were changed, with a hash that is right."""
    data = path.read_bytes()
    place, length, _, magic = TAIL.unpack(data[-TAIL.size :])
    contents = json.loads(lzma.decompress(data[place : place + length]))
    change(contents)
    body = data[:place] + (text := lzma.compress(json.dumps(contents).encode()))
    path.write_bytes(body + TAIL.pack(place, len(text), hashlib.sha256(body).digest(), magic))


HOSTILE = {
    "a name outside": lambda c: c["files"][0].__setitem__(0, "../other"),
    "an absolute name": lambda c: c["files"][0].__setitem__(0, "/tmp/other"),
    "the same name twice": lambda c: c["files"].append(c["files"][0]),
    "no file": lambda c: c["files"].clear(),
    "a newer format": lambda c: c.update(format=2),
    "a negative size": lambda c: c["files"][0].__setitem__(1, -1),
    "a size that is a text": lambda c: c["files"][0].__setitem__(1, "5"),
    "an old file that is not there": lambda c: c["files"][0].__setitem__(3, 7),
    "a tensor outside its file": lambda c: c["files"][0][4][-1].__setitem__(0, 10**9),
    "a tensor before its file": lambda c: c["files"][0][4][0].__setitem__(0, -(10**9)),
    "an unknown type": lambda c: c["files"][0][4][0].__setitem__(1, "f64"),
    "values of absurd number": lambda c: c["files"][0][4][0].__setitem__(2, 2**60),
    "rows of absurd width": lambda c: c["files"][0][4][0].__setitem__(3, 2**62),
    "rows of no width": lambda c: c["files"][0][4][0].__setitem__(3, 0),
    "a kernel of no width": lambda c: c["files"][0][4][0].__setitem__(4, 0),
    "a kernel of absurd size": lambda c: c["files"][0][4][0].__setitem__(5, 2**62),
    "an unknown mode": lambda c: c["files"][0][4][0].__setitem__(6, 3),
    "a tensor outside the old file": lambda c: c["files"][0][4][0].__setitem__(8, 10**9),
    "a tensor before the old file": lambda c: c["files"][0][4][0].__setitem__(8, -(10**9)),
    "an unknown coding": lambda c: c["files"][0][5][0].__setitem__(0, "other"),
    "a chunk of another length": lambda c: c["files"][0][5][0].__setitem__(1, 5),
    "a chunk of no parts": lambda c: c["files"][0][5][0].__setitem__(2, 0),
    "a chunk of too many parts": lambda c: c["files"][0][5][0].__setitem__(2, 10**9),
    "a chunk that is missing": lambda c: c["files"][0][5].pop(),
    "another hash": lambda c: c["files"][0].__setitem__(2, "0" * 64),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_contents_are_refused(tmp_path, change):
    old, new = versions(tmp_path, first(), trained(first()))
    path = delta.delta(old, new, tmp_path / "update.pjd").path
    rewritten(path, change)
    with raises_case(ArtifactError, "unreadable"):
        delta.patch(old, path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "old.safetensors", "update.pjd"]


def test_a_size_that_no_disk_has_is_refused(tmp_path):
    old, new = versions(tmp_path, first(), trained(first()))
    path = delta.delta(old, new, tmp_path / "update.pjd").path
    rewritten(path, lambda c: c["files"][0].__setitem__(1, 2**60))
    with raises_case(OutputError, "unwritable"):
        delta.patch(old, path, tmp_path / "out")


def test_versions_that_are_missing_or_in_the_way(tmp_path):
    old, new = versions(tmp_path, first(), trained(first()))
    with raises_case(ArtifactError, "missing"):
        delta.delta(tmp_path / "nothing", new, tmp_path / "update.pjd")
    with raises_case(OutputError, "exists"):
        delta.delta(old, new, old)
    with raises_case(OutputError, "exists"):
        delta.delta(old, new, old, force=True)
    (tmp_path / "folder").mkdir()
    with raises_case(OutputError, "folder"):
        delta.delta(old, new, tmp_path / "folder", force=True)
    with raises_case(ArtifactError, "unreadable"):
        delta.contents(old)
    with raises_case(ArtifactError, "unreadable"):
        delta.patch(old, tmp_path / "nothing.pjd", tmp_path / "out")
