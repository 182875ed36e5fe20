import sys

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import MissingDependency, TaskError
from penjing.tasks.datasets import image_folder, npz_arrays
from penjing.tasks.opening import open_task
from penjing.tasks.task import calibration_calls, fingerprint, numpy_predictor
from tests.raises import raises_case

Image = pytest.importorskip("PIL.Image")
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def paint(folder, classes=COLOURS, count=5, size=(12, 9), suffix="png"):
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, COLOURS[name]).save(folder / name / f"{i:02}.{suffix}")
    return folder


def by_colour(x):
    """Scores of (blue, green, red): the mean of the channel of that colour, (N, 3)."""
    return x.mean(axis=(2, 3))[:, ::-1]


def plain(folder, **settings):
    return image_folder(folder, size=8, mean=(0, 0, 0), std=(1, 1, 1), **settings)


# --- images ---------------------------------------------------------------------------------------------------


def test_a_flat_folder_keeps_every_fifth_picture_for_evaluation(tmp_path):
    task = plain(paint(tmp_path / "colours", count=10), batch=4)
    assert task.name == "colours" and task.metric_name == "top-1 accuracy" and task.call()[0][0].shape == (1, 3, 8, 8)
    assert sum(len(y) for _, y in task.train) == 24
    seen = []
    assert task.evaluate(lambda x: (seen.extend(x), by_colour(x))[1]) == 1.0
    assert len(seen) == 6
    assert task.evaluate(lambda x: by_colour(x)[:, ::-1]) == pytest.approx(1 / 3)  # only green is left right


@pytest.mark.parametrize("name", ["val", "test"])
def test_train_and_evaluation_folders(tmp_path, name):
    paint(tmp_path / "train", suffix="jpg")
    paint(tmp_path / name, classes=["red"], count=2)  # fewer classes keep the numbers of train
    task = plain(tmp_path)
    assert sum(len(y) for _, y in task.train) == 15
    assert task.evaluate(by_colour) == 1.0


def test_only_an_evaluation_folder_leaves_calibration_to_the_user(tmp_path):
    paint(tmp_path / "val")
    task = plain(tmp_path)
    assert task.calibration is None and task.train is None and task.evaluate(by_colour) == 1.0


def test_pictures_are_resized_cut_and_normalised(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle square is white, the sides are black
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "train" / "a" / "0.png")
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    task = image_folder(tmp_path, size=6, resize=10, mean=mean, std=std)
    ((args, _),) = calibration_calls(task)
    assert args[0].shape == (1, 3, 6, 6)
    assert [float(c) for c in args[0].mean((0, 2, 3))] == pytest.approx([1.0, 3.0, 0.5])


def test_small_grey_and_transparent_pictures_become_colour(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (3, 5), 128).save(folder / "grey.png")
    Image.new("RGBA", (30, 3), (9, 9, 9, 0)).save(folder / "alpha.PNG")
    ((args, _),) = calibration_calls(plain(tmp_path))
    assert args[0].shape == (2, 3, 8, 8)


def test_calibration_is_even_over_the_classes_and_the_same_every_time(tmp_path):
    task = plain(paint(tmp_path / "train").parent, calibration_samples=6, batch=4)
    sizes = [args[0].shape[0] for args, _ in calibration_calls(task)]
    assert sizes == [4, 2]
    images = torch.cat([args[0] for args, _ in calibration_calls(task)]).numpy()
    assert by_colour(images).argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    assert fingerprint(calibration_calls(task)) == fingerprint(calibration_calls(task))


def test_the_train_loader_shuffles_by_torchs_seed_alone(tmp_path):
    train = plain(paint(tmp_path / "train").parent, batch=4).train

    def labels(seed):
        torch.manual_seed(seed)
        return torch.cat([y for _, y in train]).tolist()

    np.random.seed(0)
    first = labels(1)
    np.random.seed(1)
    assert labels(1) == first != labels(2)
    assert sorted(first) == [0] * 5 + [1] * 5 + [2] * 5
    assert len(train) == len(list(train)) == 4
    for x, y in train:
        assert by_colour(x.numpy()).argmax(1).tolist() == y.tolist()


def test_it_trains_any_form_of_output(tmp_path):
    task = plain(paint(tmp_path / "train").parent)
    x, y = next(iter(task.train))
    scores = torch.zeros(len(x), 3, requires_grad=True)
    assert task.loss({"logits": scores}, y).item() == pytest.approx(np.log(3))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda root: None, "no-images"),
        (lambda root: (root / "a").mkdir(), "no-images"),
        (lambda root: Image.new("RGB", (4, 4)).save(root / "0.png"), "no-images"),
        (lambda root: (paint(root / "train", ["red"]), paint(root / "val", ["green"])), "unknown-classes"),
    ],
)
def test_folders_that_are_no_dataset(tmp_path, make, code):
    make(tmp_path)
    with raises_case(TaskError, code):
        plain(tmp_path)


def test_a_missing_folder(tmp_path):
    with raises_case(TaskError, "missing"):
        image_folder(tmp_path / "nothing")


def test_a_file_that_is_no_picture_is_named(tmp_path):
    paint(tmp_path / "train", ["red"], count=1)
    (tmp_path / "train" / "red" / "broken.png").write_bytes(b"no image")
    with raises_case(TaskError, "unreadable") as caught:
        list(calibration_calls(plain(tmp_path)))
    assert "broken.png" in caught.value.got


def test_without_pillow_the_install_command_is_given(tmp_path, monkeypatch):
    paint(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)  # as Python marks a module that is not there
    with raises_case(MissingDependency, "not-installed") as caught:
        image_folder(tmp_path)
    assert caught.value.remedy == "pip install pillow"


def test_open_task_opens_both_kinds(tmp_path):
    assert open_task(str(paint(tmp_path / "images"))).name == "images"
    np.savez(tmp_path / "data.npz", x_train=np.zeros((3, 2)))
    assert open_task(str(tmp_path / "data.npz")).name == "data"


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


X = np.random.default_rng(0).normal(size=(30, 4))


def test_classes(save):
    y = X.argmax(1)
    task = npz_arrays(save(x_train=X, y_train=y, x_test=X, y_test=y[:, None]), batch=8)
    assert task.metric_name == "accuracy" and task.call()[0][0].dtype == torch.float32
    assert task.evaluate(lambda x: x) == 1.0
    assert task.evaluate(lambda x: {"logits": -x}) == 0.0
    x, target = next(iter(task.train))
    assert x.shape == (8, 4) and target.dtype == torch.int64
    assert task.loss(x, target).item() == pytest.approx(nn.functional.cross_entropy(x, target).item())
    assert [a[0].shape[0] for a, _ in calibration_calls(task)] == [8, 8, 8, 6]


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 2)])
def test_values_are_judged_by_the_variance_they_explain(save, shape):
    y = np.random.default_rng(1).normal(size=shape).astype(np.float32) + 5
    task = npz_arrays(save(x_train=X, y_train=y, x_test=X, y_test=y), batch=7)
    assert task.metric_name == "R²" and task.higher_is_better
    lookup = {row.astype(np.float32).tobytes(): value for row, value in zip(X, y, strict=True)}
    perfect = lambda x: np.stack([np.atleast_1d(lookup[row.tobytes()]) for row in x])  # noqa: E731
    assert task.evaluate(perfect) == pytest.approx(1.0)
    mean = y.mean(axis=0)
    assert task.evaluate(lambda x: np.broadcast_to(mean, (len(x), *shape[1:]))) == pytest.approx(0.0, abs=1e-6)
    noisy = lambda x: perfect(x) + 0.1  # noqa: E731
    error = 0.01 * y.size / ((y - mean) ** 2).sum()
    assert task.evaluate(noisy) == pytest.approx(1 - error, rel=1e-5)
    x, target = next(iter(task.train))
    assert task.loss(target.reshape(len(x), -1) + 2, target).item() == pytest.approx(4.0)


def test_calibration_prefers_its_own_array(save):
    task = npz_arrays(save(x_train=X, x_calibration=X[:3]))
    assert sum(a[0].shape[0] for a, _ in calibration_calls(task)) == 3
    assert task.train is None and task.evaluate is None and task.loss is None


def test_token_ids_stay_integers(save):
    task = npz_arrays(save(x_calibration=np.ones((3, 5), np.int64)))
    assert task.call()[0][0].dtype == torch.int64


def test_calibration_spreads_over_the_train_data(save):
    task = npz_arrays(save(x_train=np.arange(100.0)[:, None]), calibration_samples=4)
    ((args, _),) = calibration_calls(task)
    assert args[0].flatten().tolist() == [0, 25, 50, 75]


def test_the_metric_runs_through_a_network(save):
    network = nn.Linear(4, 3)
    y = network(torch.from_numpy(X).float()).argmax(1).numpy()
    task = npz_arrays(save(x_test=X, y_test=y))
    assert task.evaluate(numpy_predictor(network)) == 1.0 and task.calibration is None


def test_python_objects_are_refused_and_do_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "trace"), "w")

    np.savez(tmp_path / "data.npz", x_train=np.array([Bomb()], dtype=object))
    with raises_case(TaskError, "pickle"):
        npz_arrays(tmp_path / "data.npz")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"y_train": X}, "no-inputs"),
        ({"x_train": X, "y_test": X}, "unpaired"),
        ({"x_train": X, "y_train": np.zeros(29, int)}, "lengths"),
        ({"x_train": X, "y_train": np.zeros((30, 2), int)}, "not-classes"),
        ({"x_train": X[:0]}, "not-samples"),
        ({"x_train": np.array(["a", "b"])}, "not-samples"),
        ({"x_test": X, "y_test": np.ones(30)}, "equal-targets"),
        ({"x_train": X, "y_train": np.zeros(30, int), "x_test": X, "y_test": X[:, 0]}, "targets"),
    ],
)
def test_arrays_that_do_not_fit(save, arrays, code):
    with raises_case(TaskError, code):
        npz_arrays(save(**arrays))


def test_a_name_that_is_nearly_right_is_told(save):
    with raises_case(TaskError, "no-inputs") as caught:
        npz_arrays(save(X_train=X))
    assert caught.value.remedy.startswith("did you mean x_train")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with raises_case(TaskError, "unreadable"):
        npz_arrays(tmp_path / "data.npz")


def test_an_output_without_classes_is_said(save):
    task = npz_arrays(save(x_test=X, y_test=X.argmax(1)))
    with raises_case(TaskError, "scores"):
        task.evaluate(lambda x: x[:, 0])
