import zipfile

import numpy as np
import pytest
import torch

from penjing import runtimes
from penjing.errors import CheckpointError
from penjing.network.capture import capture_network
from penjing.tasks.task import Task
from tests.raises import raises_case
from tests.tiny_networks import CASES


@pytest.mark.parametrize("case", ["residual", "tokens", "branches"])
def test_the_stored_source_answers_to_the_bit_at_another_batch(exported, case):
    artifact = exported(case, "torch", "fp32")
    outputs = runtimes.open_artifact(artifact.folder, 1).run(artifact.arrays(5, seed=4))
    for mine, theirs in zip(outputs, artifact.answers(5, seed=4), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    assert tuple(port.name for port in artifact.manifest.programs[0].outputs) == CASES[case].outputs


def test_ports_say_names_types_and_which_axis_varies(exported):
    program = exported("tokens", "torch", "fp32").manifest.programs[0]
    assert [(port.name, port.dtype, tuple(port.shape)) for port in program.inputs] == [
        ("tokens", "float32", ("batch", 6, 8)),
        ("context", "float32", ("batch", 4)),
    ]
    assert [tuple(port.shape) for port in program.outputs] == [("batch", 3), ("batch", 6, 8)]


def test_eager_torch_gains_from_no_precision():
    assert runtimes.get("torch").capabilities(("avx512_vnni", "amx_bf16")).precisions == ("fp32",)


def test_a_file_that_would_run_code_is_refused(exported, tmp_path):
    artifact = exported("residual", "torch", "fp32")
    for path in artifact.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "model.pt2", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/data/weights/weight_0.pt", b"cos\nsystem\n(S'true'\ntR.")
    with raises_case(CheckpointError, "foreign-code"):
        runtimes.open_artifact(tmp_path, 1)


def test_a_damaged_file_is_an_error(exported, tmp_path):
    artifact = exported("residual", "torch", "fp32")
    for path in artifact.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.pt2").write_bytes(b"not a zip")
    with raises_case(CheckpointError, "damaged"):
        runtimes.open_artifact(tmp_path, 1)


def test_the_file_holds_nothing_of_the_example_but_its_shape(tmp_path):
    values = torch.full((1000, 8), 7.25)
    task = Task(example=(values[:2],))
    network = capture_network(torch.nn.Linear(8, 2), *task.call())
    manifest = runtimes.get("torch").export(network, task.call(), None, "fp32", {"kind": "tensor"}, tmp_path)
    data = (tmp_path / "model.pt2").read_bytes()
    assert values[0, :1].numpy().tobytes() * 2 not in data and len(data) < values.nbytes
    assert [x.shape for x in runtimes.get("torch").open_session(tmp_path, manifest, 1).example] == [(2, 8)]
