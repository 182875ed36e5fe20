import hashlib

import numpy as np
import pytest

from penjing.errors import ArtifactError
from penjing.measure.size import sha256, size_bytes
from tests.raises import raises_case


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "model.bin").write_bytes(rng.integers(-2, 3, 1_200_000).astype(np.int8).tobytes())
    (tmp_path / "model.xml").write_text("<net/>")
    (tmp_path / "load.py").write_text("not of the program")
    return tmp_path


def test_size_is_of_the_named_files(folder):
    assert size_bytes(folder, ["model.bin", "model.xml"]) == 1_200_006
    assert size_bytes(folder, ["model.xml", "model.xml"]) == 6
    assert size_bytes(folder, []) == 0


def test_hash_is_of_the_whole_file(folder):
    for name in ("model.bin", "model.xml"):
        assert sha256(folder / name) == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["gone.bin", "."])
def test_missing_file_is_named(folder, name):
    for call in (
        lambda: size_bytes(folder, [name]),
        lambda: sha256(folder / name),
    ):
        with raises_case(ArtifactError, "missing") as caught:
            call()
        assert str(folder / name) in caught.value.got
