import gzip
import hashlib
import os
import struct

import numpy as np
import pytest

from examples import data


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_fashion(tmp_path, monkeypatch):
    """A data set of the same form, three images each, where the Debian package would have put it."""
    folder = tmp_path / "installed"
    folder.mkdir()
    files = {}
    for name, (file, _) in data.FASHION_MNIST.items():
        array = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2) if "images" in name else np.array([1, 0, 2], np.uint8)
        (folder / f"{file}.gz").write_bytes(gzip.compress(idx(array)))
        files[name] = (file, hashlib.sha256(idx(array)).hexdigest())
    monkeypatch.setattr(data, "FASHION_MNIST", files)
    monkeypatch.setattr(data, "FASHION_MNIST_INSTALLED", folder)
    return folder


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0, 28, 28)])
def test_idx_files_read_back(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(data.read_idx(idx(array)), array)


@pytest.mark.parametrize("damage", [b"", b"\x00\x00\x0d\x01", idx(np.zeros((2, 3), np.uint8))[:-1]])
def test_a_file_that_is_not_idx_is_refused(damage):
    with pytest.raises(ValueError, match="IDX"):
        data.read_idx(damage)


def test_an_installed_data_set_is_read_where_it_lies(empty_cache, tiny_fashion):
    arrays = data.fashion_mnist()
    assert arrays["train_images"].shape == (3, 2, 2)
    assert arrays["test_labels"].tolist() == [1, 0, 2]


def test_a_damaged_data_set_is_never_used(empty_cache, tiny_fashion, monkeypatch):
    file = tiny_fashion / f"{data.FASHION_MNIST['test_labels'][0]}.gz"
    file.write_bytes(gzip.compress(idx(np.array([1, 0, 3], np.uint8))))
    monkeypatch.setattr(data, "FASHION_MNIST_OFFICIAL", tiny_fashion.as_uri() + "/")
    monkeypatch.setenv("PATH", "")  # and no apt-get
    with pytest.raises(data.DataUnavailable, match="t10k-labels-idx1-ubyte has SHA-256"):
        data.fashion_mnist()
    assert list(empty_cache.iterdir()) == []


def test_a_fetched_data_set_replaces_a_damaged_copy_in_the_cache(empty_cache, tiny_fashion, monkeypatch, tmp_path):
    folder = empty_cache / "fashion-mnist"
    folder.mkdir(parents=True)
    (folder / f"{data.FASHION_MNIST['train_images'][0]}.gz").write_bytes(b"cut of")
    monkeypatch.setattr(data, "FASHION_MNIST_INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(data, "FASHION_MNIST_OFFICIAL", tiny_fashion.as_uri() + "/")
    monkeypatch.setenv("PATH", "")
    fetched = data.fashion_mnist()
    monkeypatch.setattr(data, "FASHION_MNIST_OFFICIAL", (tmp_path / "nowhere").as_uri() + "/")
    cached = data.fashion_mnist()
    assert all(np.array_equal(fetched[name], cached[name]) for name in data.FASHION_MNIST)


def test_a_failed_fetch_leaves_nothing_in_the_cache(empty_cache):
    def fetch(aside):
        (aside / "half").mkdir()
        raise data.DataUnavailable("gone")

    with pytest.raises(data.DataUnavailable, match="gone"):
        data._cached("thing", fetch)
    assert list(empty_cache.iterdir()) == []


def test_what_is_cached_is_not_fetched_again(empty_cache):
    calls = []

    def fetch(aside):
        calls.append(aside)
        (aside / "made").mkdir()
        return aside / "made"

    assert data._cached("thing", fetch) == data._cached("thing", fetch) == empty_cache / "thing"
    assert len(calls) == 1


def test_a_file_of_another_content_is_refused(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"other")
    with pytest.raises(data.DataUnavailable, match=r"a\.whl is not the file"):
        data._check(tmp_path / "a.whl", "0" * 64)


def test_digits_are_whole():
    images, labels = data.digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_fashion_mnist_is_whole():
    try:
        arrays = data.fashion_mnist()
    except data.DataUnavailable as error:
        if os.environ.get("PENJING_REQUIRE_FASHION_MNIST") == "1":
            raise
        pytest.skip(str(error))
    assert arrays["train_images"].shape == (60_000, 28, 28)
    assert np.bincount(arrays["train_labels"]).tolist() == [6000] * 10
    assert np.bincount(arrays["test_labels"]).tolist() == [1000] * 10
