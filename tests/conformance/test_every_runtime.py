"""What every runtime promises. A runtime joins by its row in `penjing.runtimes.SPECS`."""

import importlib
import importlib.util
import re

import numpy as np
import pytest

from penjing import measure, runtimes
from penjing.pipeline import building
from penjing.records.manifest import read_manifest
from penjing.runtimes import SPECS
from penjing.runtimes.artifact import predictor
from tests.pairs import FLOAT_DB, INTEGER_DB

every_runtime = pytest.mark.parametrize("name", SPECS)
ARTIFACTS = [
    pytest.param(name, precision, marks=pytest.mark.skipif(not runtimes.installed(name), reason=f"{name} is missing"))
    for name, spec in SPECS.items()
    for precision in importlib.import_module(spec.module).capabilities(measure.machine(1).instruction_sets).precisions
    if precision in ("fp32", "int8")
]
every_artifact = pytest.mark.parametrize(("name", "precision"), ARTIFACTS)
BATCHES = (1, 2, 5)


@pytest.fixture
def artifact(exported, name, precision):
    """An artifact of a convolutional network with a residual addition."""
    return exported("residual", name, precision)


def answers_db(outputs, reference):
    return measure.parity([reference], [outputs], "planned").snr_db


@every_runtime
def test_it_has_the_functions_that_its_row_promises(name):
    module, spec = importlib.import_module(SPECS[name].module), SPECS[name]
    assert runtimes.get(name) is module
    for function in ("capabilities", "export", "open_session", "executed"):
        assert callable(getattr(module, function))
    assert hasattr(module, "profile") == spec.times_operators
    assert hasattr(module, "expose") == spec.shows_values
    capabilities = module.capabilities(("avx2",))
    assert capabilities.runtime == name and "fp32" in capabilities.precisions
    assert isinstance(module.SETTINGS, dict)


@every_artifact
def test_its_manifest_says_what_lies_in_the_folder(name, precision, artifact):
    again = read_manifest(artifact.folder)
    assert again == artifact.manifest and (again.runtime, again.precision) == (name, precision)
    assert all((artifact.folder / file).is_file() for file in again.files())
    pattern = runtimes.get(name).SETTINGS
    assert all(re.fullmatch(pattern[key], value) for key, value in again.settings.items() if key != "precision")


@every_artifact
def test_it_answers_as_torch_at_every_batch_and_again(name, precision, artifact):
    session = runtimes.open_artifact(artifact.folder, 1)
    limit = INTEGER_DB if artifact.draft.plan else FLOAT_DB
    for batch in BATCHES:
        arrays = artifact.arrays(batch, seed=7)
        outputs = session.run(arrays)
        assert [x.shape for x in outputs] == [x.shape for x in artifact.answers(batch, seed=7)]
        assert answers_db(outputs, artifact.answers(batch, seed=7)) >= limit
        assert all(np.array_equal(x, y) for x, y in zip(outputs, session.run(arrays), strict=True))


@every_artifact
def test_it_says_in_which_precision_it_computes_every_layer(name, precision, artifact):
    operators = runtimes.executed(artifact.folder, artifact.manifest)
    if not SPECS[name].shows_operators:  # nothing is fused or changed: there is nothing to say
        assert operators == []
        return
    assert {operator.precision for operator in operators} <= {"binary", "int8", "bf16", "fp16", "fp32"}
    precisions = building.executed_precisions(artifact.folder, artifact.manifest)
    body = "binary" if SPECS[name].levels else precision
    assert {layer: precisions.get(layer) for layer in ("stem", "body", "head")} == {
        "stem": precision, "body": body, "head": precision,
    }  # fmt: skip


@every_artifact
def test_its_loader_answers_as_its_session(name, precision, artifact):
    if runtimes.absent(name):
        pytest.skip(runtimes.absent(name))
    spec = importlib.util.spec_from_file_location("load_of_a_test", artifact.folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (x,) = artifact.arrays(3, seed=8)
    predict = predictor(runtimes.open_artifact(artifact.folder, 1), artifact.manifest)
    np.testing.assert_allclose(module.predict(x), predict(x), rtol=0, atol=1e-6)
