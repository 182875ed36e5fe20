"""Files of strangers: what is refused before anything is built, and that nobody waits for a pipe."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

from penjing.records import reading


@pytest.fixture
def file(tmp_path):
    """``file(bytes)``: its path."""

    def write(content):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestWhatIsNoFile:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="not a regular file"):
            reading.data(tmp_path / "pipe", 10)

    @pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
    def test_a_device_is_not_read(self):
        with pytest.raises(ValueError, match="not a regular file"):
            reading.text("/dev/zero")

    def test_a_folder(self, tmp_path):
        with pytest.raises((ValueError, OSError)):
            reading.text(tmp_path)

    def test_a_large_file_is_not_read(self, file):
        with pytest.raises(ValueError, match="11 bytes, and at most 10"):
            reading.data(file(b"x" * 11), 10)


class TestJson:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("[" * 200_000, "nested deeper"),
            ("[" * 70 + "]" * 70, "nested deeper"),
            ('{"a":' * 5000, "nested deeper|not valid JSON"),
            ("1" + "0" * 400, "more than 64 bits"),
            ("1" + "0" * 10_000, "more than 64 bits"),
            ("1e400", "too large"),
            ("-1e400", "too large"),
            ("NaN", "not a number"),
            ("[Infinity]", "not a number"),
            ('{"a": 1, "a": 2}', "'a' appears twice"),
            (json.dumps("x" * 70_000), "70,000 characters"),
            (json.dumps({"x" * 70_000: 1}), "70,000 characters"),
            ("", "not valid JSON"),
            ("{", "not valid JSON"),
            (b"\xff\xfe{}", "not a text in UTF-8"),
        ],
    )
    def test_is_refused(self, file, text, why):
        with pytest.raises(ValueError, match=why):
            reading.json_file(file(text))

    def test_comes_back(self, file):
        value = {"a": [1, -2.5, None, True, "ü"], "b": {"c": 2**63}}
        assert reading.json_file(file(json.dumps(value))) == value
        assert reading.json_text("[Infinity]", finite=False) == [float("inf")]


def npz(members, encrypt=False):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    content = bytearray(stream.getvalue())
    if encrypt:
        for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + place] |= 1
    return bytes(content)


def npy(shape, dtype="<f4", body=b"\0" * 16):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


class TestArrays:
    def test_come_back(self, tmp_path):
        stored = {
            "a": np.arange(6, dtype=np.int16).reshape(2, 3),
            "b": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
            "c": np.float32(2.5),
            "d": np.zeros((0, 3), bool),
        }
        for write in (np.savez, np.savez_compressed):
            write(tmp_path / "x.npz", **stored)
            loaded = reading.arrays(tmp_path / "x.npz")
            assert list(loaded) == list(stored)
            for name, value in stored.items():
                assert loaded[name].dtype == value.dtype
                np.testing.assert_array_equal(loaded[name], value)
        assert list(reading.arrays(tmp_path / "x.npz", names=("a",))) == ["a"]

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (npz({"a.npy": npy((10**12,))}), r"claims to be \(1000000000000,\)"),
            (npz({"a.npy": npy((2**62, 2**62))}), "claims to be"),
            (npz({"a.npy": npy((-4,))}), "claims to be|can't|valid"),
            (npz({"a.npy": npy((3,))}), "longer than it says"),
            (npz({"a.npy": npy((4,), "|O")}), "allow_pickle"),
            (npz({"a.npy": npy((4,))[:20]}), "."),
            (npz({"a.npy": b"no array"}), "."),
            (npz({"a.npy": npy((4,))}, encrypt=True), "is encrypted"),
            (npz({"a.npy": npy((4,))}).replace(b"\0" * 16, b"\1" * 16), "CRC"),
            (npz({"a.npy": npy((4,))})[:60], "zip"),
            (b"", "zip"),
        ],
    )
    def test_are_refused(self, file, content, why):
        with pytest.raises(ValueError, match=why):
            reading.arrays(file(content))

    def test_a_bomb_is_not_unpacked(self, tmp_path):
        np.savez_compressed(tmp_path / "x.npz", a=np.zeros(10**7, np.uint8))
        assert (tmp_path / "x.npz").stat().st_size < 10**5
        with pytest.raises(ValueError, match="at most 1,000,000 are read"):
            reading.arrays(tmp_path / "x.npz", 10**6)


class TestSafetensors:
    def test_comes_back(self, tmp_path):
        from safetensors.numpy import save_file

        save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "x.safetensors", {"format": "pt"})
        assert list(reading.safetensors_header(tmp_path / "x.safetensors")) == ["w"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 2) + b"{",
            struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36000]}}  ',
            struct.pack("<Q", 8) + b'{"w": 1}',
        ],
    )
    def test_is_refused(self, file, content):
        with pytest.raises(ValueError):
            reading.safetensors_header(file(content))

    def test_a_long_shape_is_not_multiplied_out(self, file):
        # Each step of the whole product takes longer than the one before: minutes here, hours in the largest header.
        entry = {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}
        header = json.dumps({"w": entry}).encode()
        with pytest.raises(ValueError, match="claims the shape") as error:
            reading.safetensors_header(file(struct.pack("<Q", len(header)) + header + bytes(4)))
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("shape", "most", "fit"),
    [([], 1, True), ([], 0, False), ([2, 3], 6, True), ([2, 3], 5, False), ([9, 9, 0], 1, True), ([1] * 99, 1, True)],
)
def test_whether_a_shape_fits(shape, most, fit):
    assert reading.fits(shape, most) is fit
