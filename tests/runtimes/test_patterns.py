"""Patterns that converters lack, in every runtime that has a converter of its own: the artifact answers as torch."""

import numpy as np
import pytest
from torch import nn

from penjing import runtimes
from penjing.runtimes import isolated
from tests.tiny_networks import Case, export


class WholeMaxima(nn.Module):
    """The maximum of whole pictures and rows, as a layer and by axes; and the smallest value."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.pool, self.rows = nn.AdaptiveMaxPool2d(1), nn.AdaptiveMaxPool1d(1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(x).flatten(1)), self.rows(x.flatten(2))[..., 0], x.amax((2, 3)), x.amin(1)


@pytest.fixture
def own_cache(monkeypatch):
    """``own_cache(folder)``: TVM tunes nothing and keeps what it compiles there; its process is told as it starts."""

    def end_worker():
        if "tvm" in isolated._workers:
            isolated._workers["tvm"].close()

    def use(folder):
        monkeypatch.setenv("PENJING_TVM_SECONDS", "0")
        monkeypatch.setenv("PENJING_CACHE", str(folder))
        end_worker()

    yield use
    end_worker()


@pytest.mark.parametrize("runtime", ["litert", "executorch", "tvm"])
def test_global_max_pooling(runtime, tmp_path, tmp_path_factory, own_cache):
    if not runtimes.installed(runtime):
        pytest.skip(f"{runtime} is not installed")
    if runtime == "tvm":
        own_cache(tmp_path_factory.mktemp("cache"))
    artifact = export(Case(WholeMaxima, ((3, 7, 6),), {}, tuple("abcd")), runtime, "fp32", tmp_path)
    answers = isolated.open_artifact(artifact.folder, 1).run(artifact.arrays(2, seed=3))
    for answer, expected in zip(answers, artifact.answers(2, seed=3), strict=True):
        np.testing.assert_allclose(answer, expected, atol=1e-5)


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, x):
        return self.norm(self.stem(x))


def test_groups_are_normalized_for_any_number_of_samples_in_core_ml(tmp_path):
    if not runtimes.installed("coreml"):
        pytest.skip("coremltools is not installed")
    artifact = export(Case(Groups, ((3, 7, 6),), {}, ("output",)), "coreml", "fp32", tmp_path)
    for samples in (1, 3):
        (answer,) = isolated.open_artifact(artifact.folder, 1).run(artifact.arrays(samples, seed=3))
        np.testing.assert_allclose(answer, artifact.answers(samples, seed=3)[0], atol=1e-4)
