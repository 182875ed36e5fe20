"""HDF5 files of Keras: what is said of them opens them."""

import os
import re

import pytest
import torch

from penjing.errors import CheckpointError, SourceError
from penjing.sources.source import open_source
from tests.raises import raises_case

os.environ["KERAS_BACKEND"] = os.environ.get("KERAS_BACKEND", "torch")
pytest.importorskip("keras")
pytest.importorskip("h5py")
from tests.sources.test_keras import filled, h5py, keras, layers, normal, predicted, weights_with

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="Keras runs on another backend")
BUILT = '[keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2, name="b")]'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and its files in HDF5: a network, weights of Keras 3, weights of Keras 2."""
    model = filled(keras.Sequential([keras.Input((4,)), layers.Dense(3, "relu", name="a"), layers.Dense(2, name="b")]))
    folder = tmp_path_factory.mktemp("h5")
    model.save(folder / "net.h5")
    model.save_weights(folder / "net.weights.h5")
    with h5py.File(folder / "net.h5") as whole, h5py.File(folder / "old.h5", "w") as old:
        weights = whole["model_weights"]
        for name in weights:
            weights.copy(name, old)
        old.attrs.update(weights.attrs)
    return model, folder


def assert_computes(source, model):
    x = normal(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(source.module(x), predicted(model, (x,))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_network_of_keras_2_is_refused_with_a_command_that_converts_it(files, as_weights):
    model, folder = files
    given = {"spec": model, "weights": folder / "net.h5"} if as_weights else {"spec": folder / "net.h5"}
    with raises_case(CheckpointError if as_weights else SourceError, "keras-h5") as error:
        open_source(**given)
    exec(re.search('KERAS_BACKEND=torch python -c "(.*)"', error.value.remedy)[1], {})
    assert_computes(open_source(folder / "net.keras"), model)


@pytest.mark.parametrize("name", ["net.weights.h5", "old.h5"])
def test_weights_of_keras_are_refused_with_a_factory_that_reads_them(files, name, tmp_path):
    model, folder = files
    for given, kind, code in (
        ({"spec": folder / name}, SourceError, "only-weights"),
        ({"spec": model, "weights": folder / name}, CheckpointError, "format"),
    ):
        with raises_case(kind, code) as error:
            open_source(**given)
        assert "weights of Keras" in error.value.got
    code = re.search(r"def factory\(\): .*", error.value.remedy)[0].replace("...", f"keras.Sequential({BUILT})")
    (tmp_path / "net.py").write_text(f"import keras\n\n{code}\n")
    assert_computes(open_source(f"{tmp_path}/net.py:factory"), model)


def test_other_hdf5_and_damaged_files_are_refused(tmp_path):
    (tmp_path / "torn.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (tmp_path / "other.h5").write_bytes(weights_with(lambda root: root.create_dataset("x", (4,), "f4")))
    for path in (tmp_path / "torn.h5", tmp_path / "other.h5", tmp_path / "missing.h5"):
        with raises_case(SourceError, "only-weights"):
            open_source(path)
        with raises_case(CheckpointError, "missing" if "missing" in path.name else "format"):
            open_source("resnet20", weights=path)
