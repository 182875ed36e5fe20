"""Packed files that are damaged or lie are refused, and nothing is written."""

import hashlib
import itertools
import json
import lzma
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("numba")

from penjing.errors import ArtifactError, OutputError
from penjing.storage import packed
from penjing.storage.lzma2 import XZ, compressed
from penjing.storage.opened import TAIL
from penjing.storage.packed_file import LENGTH, MAGIC
from tests.packed_samples import every_type
from tests.raises import raises_case


def test_mutated_files_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "net").mkdir()
    every_type(tmp_path / "net")
    whole = packed.pack(tmp_path / "net", tmp_path / "net.pj").path.read_bytes()
    chance = random.Random(0)
    for case in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if case % 4 == 0:
            data = data[: chance.randrange(len(data))]
        (tmp_path / "bad.pj").write_bytes(data)
        with raises_case(ArtifactError, "unreadable"):
            packed.unpack(tmp_path / "bad.pj", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def contents_of(data):
    """The contents of a packed file, and the bytes that follow them."""
    place, length, _, _ = TAIL.unpack(data[-TAIL.size :])
    plain = lzma.decompress(data[place : place + length], lzma.FORMAT_RAW, filters=XZ)
    end = LENGTH.size + LENGTH.unpack_from(plain)[0]
    return json.loads(plain[LENGTH.size : end]), plain[end:]


def with_contents(chunk_bytes, contents, rest):
    """A packed file with these contents, and hashes that are right."""
    text = json.dumps(contents).encode()
    coded = compressed(LENGTH.pack(len(text)) + text + rest)
    return chunk_bytes + coded + TAIL.pack(len(chunk_bytes), len(coded), hashlib.sha256(coded).digest(), MAGIC)


def rewritten(path, change):
    """A packed file whose contents were changed, with hashes that are right."""
    data = path.read_bytes()
    contents, rest = contents_of(data)
    change(contents)
    path.write_bytes(with_contents(data[: TAIL.unpack(data[-TAIL.size :])[0]], contents, rest))


def of_chunk(key, value, chunk=1):
    """A change of one chunk; the first one lies within the contents."""
    return lambda contents: contents["chunks"][key].__setitem__(chunk, value)


HOSTILE = {
    "a name outside": lambda c: c["files"][0].update(name="../other"),
    "an absolute name": lambda c: c["files"][0].update(name="/tmp/other"),
    "a drive": lambda c: c["files"][0].update(name="C:other"),
    "the same name twice": lambda c: c["files"].append(c["files"][0]),
    "a newer format": lambda c: c.update(format=2),
    "a negative size": lambda c: c["files"][0].update(bytes=-1),
    "a size that is a text": lambda c: c["files"][0].update(bytes="5"),
    "a tensor outside its file": lambda c: c["files"][0]["gaps"].__setitem__(0, 10**9),
    "a tensor within another": lambda c: c["files"][0]["gaps"].__setitem__(1, -5),
    "an unknown type": lambda c: c["files"][0]["types"].__setitem__(0, "f65"),
    "a shape of absurd size": lambda c: c["files"][0]["shapes"].__setitem__(0, [2**40, 2**40]),
    "fewer shapes than names": lambda c: c["files"][0]["shapes"].pop(),
    "a chunk outside": of_chunk("length", 10**9),
    "a chunk of negative length": of_chunk("length", -1),
    "a chunk of more values than its tensor": of_chunk("count", 10**6),
    "more bytes than the contents hold": of_chunk("count", 10**6, chunk=0),
    "a negative number of bytes": of_chunk("count", -1, chunk=0),
    "a chunk of another file": of_chunk("file", 7),
    "a copy of nothing": of_chunk("coding", "copy"),
    "an unknown coding": of_chunk("coding", "other"),
    "bytes within the contents as a tensor": of_chunk("coding", "contents"),
    "a chunk that is missing": lambda c: [column.pop() for column in c["chunks"].values()],
    "lists of different lengths": lambda c: c["chunks"]["first"].pop(),
    "no chunks": lambda c: c.pop("chunks"),
    "another hash": lambda c: c["files"][0].update(sha256="0" * 64),
}


STRANGE = [0, -1, 1, 3, 2**31, 2**63, 2**70, 1.5, None, "i4", [2], []]


def altered_behind_checksums(chance, data, contents):
    """A packed file with a few bytes of a chunk or numbers of the contents altered, and checksums that are right."""
    place = TAIL.unpack(data[-TAIL.size :])[0]
    chunk_bytes, contents = bytearray(data[:place]), json.loads(json.dumps(contents))
    columns = contents["chunks"]
    if chance.random() < 0.7:
        for _ in range(chance.choice([1, 1, 2, 8])):
            chunk_bytes[chance.randrange(8, place)] = chance.randrange(256)
        ends = np.cumsum([8, *columns["length"]])
        columns["checksum"] = [zlib.crc32(chunk_bytes[a:b]) for a, b in itertools.pairwise(ends.tolist())]
    else:
        lists = [*columns.values(), *contents["files"][0].values()]
        numbers = [column for column in lists if isinstance(column, list) and column]
        column = chance.choice(numbers)
        column[chance.randrange(len(column))] = chance.choice(
            [0, -1, 1, 3, 2**31, 2**63, 2**70, 1.5, None, "i4", [2], []]
        )
    return bytes(chunk_bytes), contents


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutations_behind_right_checksums_are_refused(tmp_path, count):
    (tmp_path / "net").mkdir()
    tensors = every_type(tmp_path / "net")
    for name in ("int8", "uint8", "pruned"):  # rows and columns of different scales
        scales = torch.exp(torch.randn(60, 1)) * torch.exp(torch.randn(70))
        tensors[f"scaled {name}"] = (torch.randn(60, 70) * scales * 9).clamp(-127, 127).to(torch.int8)
    save_file(tensors, tmp_path / "net" / "weights.safetensors")
    data = packed.pack(tmp_path / "net", tmp_path / "net.pj").path.read_bytes()
    contents, rest = contents_of(data)
    original = (tmp_path / "net" / "weights.safetensors").read_bytes()
    chance = random.Random(0)
    for _ in range(count):
        chunk_bytes, changed = altered_behind_checksums(chance, data, contents)
        (tmp_path / "bad.pj").write_bytes(with_contents(chunk_bytes, changed, rest))
        try:
            packed.unpack(tmp_path / "bad.pj", tmp_path / "out")
        except ArtifactError as error:
            assert error.code == "unreadable"
            assert not (tmp_path / "out").exists()
            continue
        assert (tmp_path / "out" / "weights.safetensors").read_bytes() == original  # nothing that matters was altered
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_contents_are_refused(tmp_path, change):
    (tmp_path / "net").mkdir()
    every_type(tmp_path / "net")
    path = packed.pack(tmp_path / "net", tmp_path / "net.pj").path
    rewritten(path, change)
    with raises_case(ArtifactError, "unreadable"):
        packed.unpack(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "net.pj"]


def test_a_tensor_of_more_chunks_than_it_has_is_refused(tmp_path):
    every_type(tmp_path)
    path = packed.pack(tmp_path / "weights.safetensors", tmp_path / "net.pj").path
    assert packed.read(path, "float32").shape == (50, 30)
    rewritten(path, lambda c: [column.extend(column[1:] * 3) for column in c["chunks"].values()])
    with raises_case(ArtifactError, "unreadable"):
        packed.read(path, "float32")


def test_a_size_that_no_disk_has_is_refused(tmp_path):
    save_file({"a": torch.randn(3)}, tmp_path / "net.safetensors")
    path = packed.pack(tmp_path / "net.safetensors", tmp_path / "net.pj").path
    rewritten(path, lambda c: c["files"][0].update(bytes=2**60))
    with raises_case(OutputError, "unwritable"):
        packed.unpack(path, tmp_path / "out")
