"""Calibration data in every form in which it may be given."""

import numpy as np
import pytest
import torch

from penjing.errors import TaskError
from penjing.tasks.task import Task, calibration_calls
from penjing.tasks.unlabelled import calibration_task
from tests.raises import raises_case

X = np.arange(25 * 3, dtype=np.float32).reshape(25, 3)


def samples(task):
    """The first input of all batches, joined, and the sizes of the batches."""
    parts = [next(iter([*args, *kwargs.values()])) for args, kwargs in calibration_calls(task)]
    return torch.cat(parts).numpy(), [len(part) for part in parts]


def saved(folder, name, **arrays):
    (np.savez if name.endswith(".npz") else lambda path, x: np.save(path, x))(folder / name, **arrays)
    return str(folder / name)


@pytest.mark.parametrize(
    "given",
    [
        lambda folder: X,
        lambda folder: torch.from_numpy(X),
        lambda folder: [X[:20], X[20:]],
        lambda folder: (part for part in (X[:20], X[20:])),  # may be read once, and is read several times
        lambda folder: saved(folder, "inputs.npy", x=X),
        lambda folder: saved(folder, "inputs.npz", whatever=X),
        lambda folder: saved(folder, "inputs.npz", x_calibration=X),
        lambda folder: saved(folder, "inputs.npz", a=X, b=X),
        lambda folder: Task(example=X[:1], calibration=[X]),
    ],
)
def test_all_samples_arrive_in_order_and_again(tmp_path, given):
    task = calibration_task(given(tmp_path))
    for _ in range(2):
        assert np.array_equal(samples(task)[0], X)


@pytest.mark.parametrize("text", ["data = [torch.ones(2, 3)] * 4", "def data():\n    return torch.ones(8, 3)"])
def test_a_name_in_python(tmp_path, text):
    (tmp_path / "inputs.py").write_text(f"import torch\n{text}\n", encoding="utf-8")
    assert samples(calibration_task(f"{tmp_path / 'inputs.py'}:data"))[0].shape == (8, 3)


def test_batches_have_the_size_that_the_source_is_fixed_to():
    task = calibration_task(X, (torch.zeros(4, 3),), {})
    assert samples(task)[1] == [4] * 6
    assert samples(calibration_task(X, (torch.zeros(4, 3),), {0: {0: "batch"}}))[1] == [10, 10, 5]


def test_an_array_for_every_input(tmp_path):
    task = calibration_task(saved(tmp_path, "inputs.npz", a=X, b=-X))
    args, kwargs = next(calibration_calls(task))
    assert args == () and torch.equal(kwargs["a"], -kwargs["b"])


@pytest.mark.parametrize("folders", ["", "cat"])
def test_images_of_the_size_of_the_networks_own_example(tmp_path, folders):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / folders).mkdir(exist_ok=True)
    for i in range(3):
        image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / folders / f"{i}.png")
    x, _ = samples(calibration_task(tmp_path, (torch.zeros(1, 3, 16, 16),)))
    assert x.shape == (3, 3, 16, 16) and x[0].max() < x[2].max()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (lambda folder: folder / "nowhere.npy", "missing"),
        (lambda folder: folder, "no-images"),
        (lambda folder: {"x": X}, "not-calibration"),
        (lambda folder: 3, "not-calibration"),
        (lambda folder: [], "empty"),
        (lambda folder: saved(folder, "a.npz", a=X, b=X[:3]), "not-samples"),
        (lambda folder: saved(folder, "a.npy", x=np.array([{}], dtype=object)), "unreadable"),
    ],
)
def test_what_is_not_calibration_data(tmp_path, given, code):
    with raises_case(TaskError, code):
        calibration_task(given(tmp_path))


def test_fewer_samples_than_the_batch_that_the_source_is_fixed_to():
    with raises_case(TaskError, "too-few"):
        calibration_task(X, (torch.zeros(64, 3),), {})
