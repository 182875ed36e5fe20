"""What every runtime promises. A runtime joins by its row in `penjing.runtimes.SPECS`."""

import importlib
import importlib.util
import re

import numpy as np
import pytest

from penjing import measure, runtimes
from penjing.errors import TaskError, UsageError
from penjing.pipeline import building
from penjing.records.manifest import read_manifest
from penjing.runtimes import SPECS
from penjing.runtimes.artifact import predictor
from tests.pairs import FLOAT_DB, INTEGER_DB
from tests.raises import raises_case

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


OTHERS = {
    "another size": lambda x: x[:, :, :6, :6],
    "as many values in other axes": lambda x: x.transpose(0, 2, 3, 1),
    "one axis less": lambda x: x[0],
    "one channel more": lambda x: np.concatenate([x, x[:, :1]], 1),
}


@every_artifact
def test_it_takes_no_inputs_but_its_own_and_goes_on(name, precision, artifact):
    session = runtimes.open_artifact(artifact.folder, 1)
    (x,) = artifact.arrays(2, seed=3)
    before = session.run([x])
    for other in OTHERS.values():
        with raises_case(TaskError, "shape"):
            session.run([np.ascontiguousarray(other(x))])
    for other in (x.astype(np.float64), x.astype(">f4"), x.astype(np.int64), x.astype(object)):
        with raises_case(TaskError, "dtype"):
            session.run([other])
    for count in (0, 2):
        with raises_case(TaskError, "inputs"):
            session.run([x] * count)
    assert [y.shape for y in session.run([x[:0]])] == [(0, *y.shape[1:]) for y in before]
    assert all(np.array_equal(a, b) for a, b in zip(session.run([x[::-1][::-1]]), before, strict=True))


@every_artifact
def test_threads_are_one_or_more(name, precision, artifact):
    for threads in (0, -1):
        with raises_case(UsageError, "threads"):
            runtimes.open_artifact(artifact.folder, threads)


def loaded(folder):
    """The module of an artifact's `load.py`."""
    spec = importlib.util.spec_from_file_location("load_of_a_test", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_artifact
def test_its_loader_answers_as_its_session(name, precision, artifact):
    if runtimes.absent(name):
        pytest.skip(runtimes.absent(name))
    module = loaded(artifact.folder)
    (x,) = artifact.arrays(3, seed=8)
    predict = predictor(runtimes.open_artifact(artifact.folder, 1), artifact.manifest)
    np.testing.assert_allclose(module.predict(x), predict(x), rtol=0, atol=1e-6)
    assert module.predict(x[:0]).shape == (0, *predict(x).shape[1:])
    for other in OTHERS.values():
        with pytest.raises(ValueError, match="expected"):
            module.predict(other(x))
